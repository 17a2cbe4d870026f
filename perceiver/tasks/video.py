"""Tasks on videos: their frames, their sound and what happens in them."""
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from perceiver import pictures
from perceiver.architectures import MultimodalAutoencoderConfig
from perceiver.config import Config
from perceiver.data import ClipShape, Shuffled, VideoDataConfig, WithQueries, load_clips
from perceiver.errors import UserError
from perceiver.tasks.base import Task


class MultimodalAutoencoding(Task):
    """Perceiver IO gives back frames and sound of a clip, and tells its class (Perceiver IO, section 4.3).

    A training step asks for a random part of the pixels and of the sound, and shows the class to half of the examples.
    Evaluation asks for everything and shows no class.
    """
    ModelConfig = MultimodalAutoencoderConfig
    DataConfig = VideoDataConfig

    def __init__(self, config: Config):
        super().__init__(config)
        model = config.model.input
        self.shape = ClipShape(model.image_shape, model.num_audio_samples, config.data.sample_rate)
        if model.image_shape[3] != 3:
            raise UserError(f"model.input.image_shape={list(model.image_shape)} has {model.image_shape[3]} channels; "
                            "videos have 3")

    def load_data(self) -> tuple[Dataset, Dataset]:
        data, model = self.config.data, self.config.model.input
        self.train_clips, self.val_clips = load_clips(data, self.shape)
        self.check_classes(self.train_clips.class_names, "model.input.num_classes", model.num_classes)
        queried = WithQueries(self.train_clips, data, math.prod(model.image_shape[:3]), *model.audio_grid)
        return Shuffled(queried, data.batch_size, self.config.train.seed), self.val_clips

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        data, targets = self.config.data, {name: batch[name] for name in ("image", "audio")}
        classes = torch.eye(self.config.model.input.num_classes, device=batch["image"].device)[batch["label"]]
        inputs = targets | {"label": classes}
        if model.training:
            positions = {name: batch[f"{name}_positions"] for name in targets}
            mask = batch["label_mask"]  # (B, 1)
            outputs = model(inputs | {"label_mask": mask}, output_positions=positions | {"label": None})
            values = {"image": batch["image"].movedim(2, -1).flatten(1, 3),  # (B, O, 3)
                      "audio": batch["audio"].view(len(mask), -1, self.config.model.input.samples_per_patch)}
            targets = {name: values[name].take_along_dim(positions[name][..., None], 1) for name in values}
        else:
            outputs, mask = model.reconstruct(inputs, data.num_chunks), torch.ones_like(batch["label"])[:, None]
        errors = {name: (outputs[name].float() - target).flatten(1) for name, target in targets.items()}
        squares = {name: error.square().mean(1).sum() for name, error in errors.items()}
        distances = squares if data.distance == "l2" else {name: error.abs().mean(1).sum()
                                                           for name, error in errors.items()}
        loss = (data.image_weight * distances["image"] + data.audio_weight * distances["audio"]
                + data.label_weight * F.cross_entropy(outputs["label"].float(), batch["label"], reduction="sum"))
        right = outputs["label"].argmax(-1) == batch["label"]
        return {"loss": loss, "count": torch.tensor(len(right), device=loss.device),
                "image_error": squares["image"], "audio_error": squares["audio"],
                "audio_power": targets["audio"].flatten(1).square().mean(1).sum(),
                "masked": mask.sum(), "masked_right": (mask[:, 0] * right).sum()}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """`psnr` of the frames, of which 1 is the peak, and `audio_snr`, signal to noise, in decibels, of all clips
        together; `accuracy` of classes that were masked."""
        metrics = super().metrics(sums) | {"psnr": decibels(sums["count"], sums["image_error"])}
        if sums["audio_power"]:  # it isn't silence
            metrics["audio_snr"] = decibels(sums["audio_power"], sums["audio_error"])
        return metrics | ({"accuracy": sums["masked_right"] / sums["masked"]} if sums["masked"] else {})

    def show(self, model: nn.Module) -> dict[str, Tensor | tuple[Tensor, int]]:
        """The first validation clip above its reconstruction, and how they sound."""
        clip = self.val_clips[0]
        image, audio, _ = self.reconstruct(model, clip["image"], clip["audio"])
        return {"frames": pictures.contact_sheet(clip["image"], image),
                "sound": (clip["audio"], self.shape.sample_rate), "sound_again": (audio, self.shape.sample_rate)}

    def reconstruct(self, model: nn.Module, image: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (T, 3, H, W) and sound (S, 1) of a clip -> the same as the model gives them back, in their ranges, and
        the logits of its class."""
        training, device = model.training, next(model.parameters()).device
        inputs = {"image": image, "audio": audio, "label": torch.zeros(self.config.model.input.num_classes)}
        with torch.inference_mode():
            outputs = model.eval().reconstruct({name: values[None].to(device) for name, values in inputs.items()},
                                               self.config.data.num_chunks)
        model.train(training)
        return (outputs["image"][0].float().clamp(0, 1).cpu(), outputs["audio"][0].float().clamp(-1, 1).cpu(),
                outputs["label"][0])

    def summary(self, metrics: dict[str, float]) -> str:
        """Beside what it would be for predicting a mean frame, of the training clips or the clip's own; by 256 clips at
        most of each."""
        def images(clips: Dataset) -> Iterator[Tensor]:  # one at a time: they are large
            return (clips[index]["image"] for index in range(min(256, len(clips))))

        frames = [image.mean(0) for image in images(self.train_clips)]
        mean = sum(frames) / len(frames)  # (3, H, W)
        errors = [torch.stack([(image - frame).square().mean() for frame in (mean, image.mean(0))])
                  for image in images(self.val_clips)]
        psnr, own_psnr = (decibels(1.0, error) for error in (sum(errors) / len(errors)).tolist())
        return (f"validation: PSNR {metrics['psnr']:.2f} dB; predicting the mean frame of training clips it would be "
                f"{psnr:.2f} dB, the mean of the clip's own frames {own_psnr:.2f} dB")


def decibels(signal: float, noise: float) -> float:
    ratio = signal / max(noise, 1e-30)
    return 10 * math.log10(ratio) if ratio > 0 else ratio - math.inf  # a loss that is not finite is told by train.py
