"""Tasks on images."""
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from perceiver import pictures, sampling
from perceiver.architectures import ImageClassifierConfig
from perceiver.config import Config
from perceiver.data import (START, ImageDataConfig, PixelBlocks, PixelCrops, PixelDataConfig, Shuffled, Tokens,
                            load_images, to_images, to_tokens)
from perceiver.errors import UserError
from perceiver.tasks.base import Autoregression, Classification, bits_by_frequency


class ImageClassification(Classification):
    """Perceiver or Perceiver IO on images with labels."""
    ModelConfig = ImageClassifierConfig
    DataConfig = ImageDataConfig

    def load_data(self) -> tuple[Dataset, Dataset]:
        return self.share(*load_images(self.config.data, self.config.model.input.image_shape))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        smoothing = self.config.data.label_smoothing if model.training else 0.0
        return self.class_sums(model(batch["image"]), batch["label"], smoothing)

    def show(self, model: nn.Module) -> dict[str, Tensor]:
        """Where the model looks in the first validation image."""
        return {"attention": self.attention(model, self.val_set[0]["image"])}

    def attention(self, model: nn.Module, image: Tensor, latents: list[int] | None = None) -> Tensor:
        """A picture of it over an image (C, H, W), normalised as the model gets it."""
        return pictures.over_image(model, image, self.config.data.mean, self.config.data.std, latents)


class ImageSequences(Autoregression):
    """Perceiver AR on images: predict each value of a pixel from those before it."""
    DataConfig = PixelDataConfig
    unit = "dim"

    def __init__(self, config: Config):
        super().__init__(config)
        model, data = config.model, config.data
        if model.vocab_size <= START:
            raise UserError(f"model.vocab_size={model.vocab_size} must be at least {START + 1}: 256 values and a start")
        if model.num_latents > data.num_values:
            raise UserError(f"model.num_latents={model.num_latents} must be at most {data.num_values}, the values of "
                            f"data.image_shape={list(data.image_shape)}")
        height, *row = data.image_shape
        self.num_given = 1 + height // 2 * row[0] * row[1]  # tokens of the upper half, and START

    def load_data(self) -> tuple[Dataset, Dataset]:
        model, data = self.config.model, self.config.data
        self.train_images, self.val_images = load_images(data, data.image_shape)
        length = min(model.max_seq_len, data.num_values)
        crops = PixelCrops(self.train_images, length, model.num_latents, model.num_kept(length - model.num_latents))
        return (Shuffled(crops, data.batch_size, self.config.train.seed),
                PixelBlocks(self.val_images, data.num_values, length, model.num_latents))

    def show(self, model: nn.Module) -> dict[str, Tensor]:
        """The lower halves of some validation images, as the model completes the upper ones."""
        number = min(8, len(self.val_images))
        tokens = np.stack([to_tokens(self.val_images[index]["image"]) for index in range(number)])  # (B, 1 + S)
        steps = sampling.generate(model, tokens[:, : self.num_given].tolist(), tokens.shape[1] - self.num_given)
        return {"completions": self.picture(tokens, torch.stack(list(steps), 1)[None].cpu())}

    def picture(self, tokens: np.ndarray, lower: Tensor) -> Tensor:
        """Images `tokens` (B, 1 + S), and below them those with the lower halves (K, B, S / 2) instead."""
        images, shape = torch.from_numpy(tokens[:, 1:]), self.config.data.image_shape
        upper = images[:, : self.num_given - 1].expand(len(lower), -1, -1)
        return pictures.completions(to_images(images, shape), to_images(torch.cat((upper, lower), -1), shape))

    def summary(self, metrics: dict[str, float]) -> str:
        """Beside the best that can be done without looking at other values, of a thousand images."""
        train, val = (Subset(images, range(0, len(images), -(-len(images) // 1000)))
                      for images in (self.train_images, self.val_images))
        values = Tokens(np.concatenate([to_tokens(example["image"])[1:] for example in train]))
        num_values, num_latents = self.config.data.num_values, self.config.model.num_latents
        bits = bits_by_frequency(values, PixelBlocks(val, num_values, num_values, num_latents))
        return (f"validation: {metrics['bits_per_dim']:.3f} bits per dimension; by the frequencies of values it would "
                f"be {bits:.3f}")
