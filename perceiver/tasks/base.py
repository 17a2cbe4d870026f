"""What a task is, and what several of them have in common.

A task is what a run is about: the loop in train.py asks it for everything that depends on the modality. Losses and
metrics travel as sums over examples and ranks; the loop divides only at the end, so that neither the number of ranks
nor uneven batches change a result.
"""
import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from perceiver.config import Config
from perceiver.data import IGNORE, Shuffled, Tokens
from perceiver.errors import UserError
from perceiver.model import PerceiverARConfig
from perceiver.pretrained import start_from


class Task(ABC):
    """A task has the dataclasses of its config sections, `ModelConfig` and `DataConfig`, and these methods."""
    ModelConfig: type
    DataConfig: type
    rate = "samples_per_s"  # what is counted of the speed; tokens_per_s counts as `count` does in `loss`
    class_names: list[str] | None = None  # of a classifier, once the data is loaded

    def __init__(self, config: Config):
        self.config = config

    def build_model(self) -> nn.Module:
        return self.config.model.build()

    def initialise(self, model: nn.Module) -> None:
        """What a new run does to a new model; a resumed one doesn't."""
        if getattr(self.config.model, "init_from", None) is not None:
            start_from(model, self.config.model.init_from, self.config)

    def state(self) -> dict:
        """What a checkpoint keeps beside the config, because the data told it."""
        return {"class_names": self.class_names}

    def restore(self, saved: dict) -> None:
        """Takes the `state` in a checkpoint."""
        self.class_names = saved.get("class_names")

    @abstractmethod
    def load_data(self) -> tuple[Dataset, Dataset]:
        """The training set, by key (step, index in the global batch), and the validation set."""

    def check_classes(self, names: list[str], key: str, num_classes: int) -> None:
        """Keeps the data's classes, which must be as many as `key` in the config says."""
        self.class_names = names
        if len(names) != num_classes:
            raise UserError(f"{key}={num_classes}, but the data has {len(names)} classes: "
                            f"{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}")

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the batch: `loss` in nats, its `count`, and whatever `metrics` needs."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means, by name, of sums."""
        metrics = {"loss": sums["loss"] / sums["count"]}
        if "correct" in sums:
            metrics["accuracy"] = sums["correct"] / sums["count"]
        return metrics

    def show(self, model: nn.Module) -> dict[str, str | Tensor | tuple[Tensor, int]]:
        """Things to look at after an evaluation, by name: texts, pictures (3, H, W) of uint8, and sounds (S, 1) in
        [-1, 1] with their sample rate."""
        return {}

    def summary(self, metrics: dict[str, float]) -> str | None:
        """A closing line: the result on the validation set beside a yardstick."""
        return None


class Autoregression(Task):
    """Perceiver AR on sequences of any kind: predict the next token at each of the last N positions of a window."""
    ModelConfig = PerceiverARConfig
    rate = "tokens_per_s"
    unit = "token"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"]  # (B, N)
        logits = model(batch["input_ids"], labels.shape[1], batch.get("pad_mask"), batch.get("prefix_keep"))
        sums = self.sums(logits, batch)
        if model.training and (weight := self.config.model.z_loss):
            log_z = logits.float().logsumexp(-1) * (labels != IGNORE)  # (B, N)
            sums["loss"] = sums["loss"] + weight * log_z.square().sum()
        return sums

    def sums(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As of `loss`, without z-loss."""
        sums = token_sums(logits, batch["labels"])
        return sums | {"cross_entropy": sums["loss"]}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        bits = sums["cross_entropy"] / sums["count"] / math.log(2)
        return {"loss": sums["loss"] / sums["count"], f"bits_per_{self.unit}": bits}


class Classification(Task):
    """One label for an input, whatever that is."""

    def share(self, train_set: Dataset, val_set: Dataset) -> tuple[Dataset, Dataset]:
        """The data in the order of training, once its classes are found to be the model's."""
        self.check_classes(train_set.class_names, "model.num_classes", self.config.model.num_classes)
        self.val_set = val_set
        return Shuffled(train_set, self.config.data.batch_size, self.config.train.seed), val_set

    def class_sums(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Of logits (B, E) and classes (B,) or their probabilities (B, E)."""
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
        classes = labels if labels.ndim == 1 else labels.argmax(-1)
        return {"loss": loss, "count": torch.tensor(len(logits), device=loss.device),
                "correct": (logits.argmax(-1) == classes).sum()}


def token_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of logits (B, L, V) and labels (B, L), where those are not IGNORE."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return {"loss": loss, "count": (labels != IGNORE).sum()}


def bits_by_frequency(train: Tokens, val_set: Dataset) -> float:
    """The yardstick of a prediction: bits of a label of `val_set` by how frequent it is in the training data."""
    labels = np.concatenate([val_set[index]["labels"] for index in range(len(val_set))])
    labels = labels[labels != IGNORE] - train.offset
    counts = np.bincount(train.values, minlength=labels.max() + 1) + 1  # one more of each: none is impossible
    return -np.log2(counts / counts.sum())[labels].mean()
