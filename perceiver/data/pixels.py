"""Images as sequences: the values of their pixels, row by row, red, green and blue of a pixel one after the other."""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perceiver.config import require
from perceiver.data.image import ImageDataConfig, Images
from perceiver.data.text import TextBlocks, Tokens, left_padded

START = 256  # the token before an image, after those of values from 0 to 255


@dataclass
class PixelDataConfig(ImageDataConfig):
    image_shape: tuple[int, ...] = (28, 28, 1)  # height, width, channels (1: grey, 3: RGB)

    def __post_init__(self):
        require(self.mean in (None, (0.0,)) and self.std in (None, (1.0,)),
                f"mean={self.mean} and std={self.std} must be null: values of pixels are tokens")
        self.mean, self.std = (0.0,), (1.0,)
        super().__post_init__()
        require(len(self.image_shape) == 3 and min(self.image_shape) >= 1,
                f"image_shape={self.image_shape} must be 3 positive numbers")
        for name in ("mixup_alpha", "cutmix_alpha", "label_smoothing"):
            require(not getattr(self, name), f"{name}={getattr(self, name)} must be 0: there are no labels")

    @property
    def num_values(self) -> int:
        """S: tokens of an image, without START."""
        height, width, channels = self.image_shape
        return height * width * channels


def to_tokens(image: Tensor) -> np.ndarray:
    """START and the values of an image (C, H, W) in [0, 1]: (1 + S,)"""
    values = (255 * image).round().long().movedim(0, -1).flatten()
    return np.concatenate(([START], values.numpy()))


def to_images(tokens: Tensor, image_shape: tuple[int, ...]) -> Tensor:
    """Images (..., C, H, W) of uint8 of S tokens each, (..., S)."""
    return tokens.clamp(max=255).to(torch.uint8).unflatten(-1, image_shape).movedim(-1, -3)


class PixelCrops(Dataset):
    """Training examples: the start of an image, of which the last N tokens are predicted, as Google's dataset.py crops
    sequences that fit into the context. Lengths are uniform from N to S; randomness is from torch's CPU generator."""

    def __init__(self, images: Images, max_seq_len: int, num_latents: int, num_kept: int):
        self.images, self.max_seq_len, self.num_latents, self.num_kept = images, max_seq_len, num_latents, num_kept

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """input_ids (T,), padded on the left, labels (N,), pad_mask (T,), prefix_keep (P',)"""
        tokens = to_tokens(self.images[index]["image"])
        end = torch.randint(1 + self.num_latents, 1 + len(tokens), ()).item()
        window = tokens[max(0, end - 1 - self.max_seq_len) : end]
        example = left_padded(window, self.num_latents, self.max_seq_len, self.num_latents, START)
        prefix_length = self.max_seq_len - self.num_latents
        if self.num_kept < prefix_length:
            example["prefix_keep"] = torch.randperm(prefix_length)[: self.num_kept].sort().values
        return example


class PixelBlocks(Dataset):
    """Whole images for evaluation: every value is predicted once, N at a time, with all of the context that fits."""

    def __init__(self, images: Images, num_values: int, max_seq_len: int, num_latents: int):
        self.images, self.max_seq_len, self.num_latents = images, max_seq_len, num_latents
        self.blocks = -(-num_values // num_latents)  # of an image

    def __len__(self) -> int:
        return len(self.images) * self.blocks

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """input_ids (T,), padded on the left, labels (N,), pad_mask (T,)"""
        number, block = divmod(index, self.blocks)
        tokens = Tokens(to_tokens(self.images[number]["image"]))
        return TextBlocks(tokens, self.max_seq_len, self.num_latents, START)[block]
