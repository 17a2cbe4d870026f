"""The parts that classifiers of all modalities share."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.adapters import ClassificationOutput, TrainableQueries
from perceiver.config import Count
from perceiver.data import Shuffled
from perceiver.io import report
from perceiver.model import Perceiver, PerceiverDecoder, PerceiverIO, PerceiverIOConfig
from perceiver.tasks.base import Task


@dataclass
class ClassifierConfig(PerceiverIOConfig):
    """Options of classifiers: any inputs -> logits of classes (B, E). A subclass adds the section `input`.

    With decoder=None the model is the original Perceiver, which averages the latents.
    """

    num_classes: Count = 10  # E
    freeze_encoder: bool = field(default=False, kw_only=True)  # train only the decoder and the output

    def build(self):
        input_adapter = self.input.build(self.encoder.init_scale)
        encoder = self.build_encoder(input_adapter.num_channels)
        if self.freeze_encoder:
            freeze(input_adapter)
            freeze(encoder)
        if self.decoder is None:
            output = ClassificationOutput(self.num_latent_channels, self.num_classes, self.encoder.init_scale)
            return Perceiver(input_adapter, encoder, output)
        num_channels = self.decoder.num_query_channels or self.num_latent_channels
        init_scale = self.decoder.init_scale
        return PerceiverIO(
            input_adapter,
            encoder,
            TrainableQueries(1, num_channels, init_scale=init_scale),
            PerceiverDecoder(self.decoder, self.num_latent_channels, num_channels),
            ClassificationOutput(num_channels, self.num_classes, init_scale),
        )


def freeze(module: nn.Module):
    """Turns off gradients and stays in evaluation mode: no dropout, and BatchNorm keeps its statistics."""
    module.requires_grad_(False).eval()
    module.train = lambda mode=True: module


class Classification(Task):
    """One label for each input."""

    options = ("attention",)
    confusion: Tensor | None = None  # if set, `loss` counts in it: (E, E), rows are classes, columns are answers

    def prepare(self, train_set, val_set):
        """Checks the classes of the data and shuffles the training set. `val_set` has class_names and labels."""
        config = self.config
        self.check_classes(val_set.class_names, "model.num_classes", config.model.num_classes)
        if config.model.freeze_encoder and config.model.init_from is None:
            self.data_note += "; the encoder is frozen at random weights: set model.init_from"
        self.val_set = val_set
        return Shuffled(train_set, config.data.batch_size, config.train.seed), val_set

    def class_sums(self, logits, labels, label_smoothing=0.0):
        """Sums from logits (B, E) and labels: classes (B,), or their probabilities (B, E)."""
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
        classes = labels if labels.ndim == 1 else labels.argmax(-1)
        answers = logits.argmax(-1)
        if self.confusion is not None:
            self.confusion.index_put_((classes, answers), torch.ones_like(answers), accumulate=True)
        return {
            "loss": loss,
            "count": loss.new_full((), len(logits)),  # torch.tensor would wait for the GPU
            "correct": (answers == classes).sum(),
        }

    def summary(self, metrics):
        """The validation accuracy beside the accuracy of always choosing the most frequent class."""
        counts = np.bincount(self.val_set.labels)
        return (
            f"{self.config.data.eval_name}: {metrics['accuracy']:.1%} right; "
            f"always choosing the most frequent class would give {counts.max() / counts.sum():.1%}"
        )


def report_classes(
    args: Namespace, source: str, logits: Tensor, class_names: list[str] | None, files: Iterable[Path] = ()
):
    """Prints the most likely classes of `source` from logits (E,). With --json also the `files` written for it."""
    names = class_names or [f"class {label}" for label in range(len(logits))]
    top = logits.float().softmax(-1).topk(min(args.top_k, len(logits)))
    ranking = [(names[label], probability.item()) for probability, label in zip(top.values, top.indices)]
    classes = [{"name": name, "probability": probability} for name, probability in ranking]
    lines = [f"  {probability:7.2%}  {name}" for name, probability in ranking]
    report(args, {"input": source, "classes": classes, "files": list(map(str, files))}, source, *lines)
