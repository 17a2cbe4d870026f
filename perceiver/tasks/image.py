"""Tasks on images."""
from torch import Tensor, nn
from torch.utils.data import Dataset

from perceiver import pictures
from perceiver.architectures import ImageClassifierConfig
from perceiver.data import ImageDataConfig, load_images
from perceiver.tasks.base import Classification


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
