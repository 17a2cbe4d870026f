"""Tasks: what a run is about. The loop in train.py asks the task for everything that depends on the modality.

Losses and metrics travel as sums over examples and ranks; the loop divides only at the end, so that neither the number
of ranks nor uneven batches change a result.
"""
import gzip
import lzma
import math
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from perceiver import checkpoint, pictures, sampling
from perceiver.adapters import ImageClassifierConfig, MaskedLMConfig, TextClassifierConfig
from perceiver.config import Config, from_dict
from perceiver.data import (IGNORE, ByteTokenizer, IdTokenizer, ImageDataConfig, MaskedBlocks, MaskedTextDataConfig,
                            MaskedWindows, Shuffled, TextBlocks, TextClassificationDataConfig, TextDataConfig,
                            TextWindows, load_images, load_labelled_text, load_text)
from perceiver.errors import UserError
from perceiver.model import PerceiverARConfig
from perceiver.pretrained import load_weights, start_from


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

    @abstractmethod
    def load_data(self) -> tuple[Dataset, Dataset]:
        """The training set, by key (step, index in the global batch), and the validation set."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the batch: `loss` in nats, its `count`, and whatever `metrics` needs."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means, by name, of sums."""
        metrics = {"loss": sums["loss"] / sums["count"]}
        if "correct" in sums:
            metrics["accuracy"] = sums["correct"] / sums["count"]
        return metrics

    def show(self, model: nn.Module) -> dict[str, str | Tensor]:
        """Things to look at after an evaluation, by name: texts, and pictures (3, H, W) of uint8."""
        return {}

    def summary(self, metrics: dict[str, float]) -> str | None:
        """A closing line: the result on the validation set beside a yardstick."""
        return None


class CausalLM(Task):
    """Perceiver AR on text: predict the next byte (or token id) at each of the last N positions of a window."""
    ModelConfig = PerceiverARConfig
    DataConfig = TextDataConfig
    rate = "tokens_per_s"

    def __init__(self, config: Config):
        super().__init__(config)
        self.tokenizer = IdTokenizer() if config.data.holds_ids else ByteTokenizer()
        self.unit = "token" if config.data.holds_ids else "byte"
        if self.unit == "byte" and config.model.vocab_size < ByteTokenizer.vocab_size:
            raise UserError(f"model.vocab_size={config.model.vocab_size} is too small for bytes, "
                            f"which need {ByteTokenizer.vocab_size}")

    def load_data(self) -> tuple[Dataset, Dataset]:
        model, data = self.config.model, self.config.data
        train, self.val_tokens = load_text(data)
        for tokens in (train, self.val_tokens) if self.unit == "token" else ():
            if tokens.values.max() >= model.vocab_size or tokens.values.min() < 0:
                raise UserError(f"data.path={data.path} holds token {tokens.values.max()}, outside of the vocabulary; "
                                f"model.vocab_size is {model.vocab_size}")
        num_kept = model.num_kept(model.max_seq_len - model.num_latents)
        return (TextWindows(train, model.max_seq_len, model.num_latents, num_kept, self.config.train.seed),
                TextBlocks(self.val_tokens, model.max_seq_len, model.num_latents))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"]  # (B, N)
        logits = model(batch["input_ids"], labels.shape[1], batch.get("pad_mask"), batch.get("prefix_keep"))
        return token_sums(logits, labels)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["count"]
        return {"loss": loss, f"bits_per_{self.unit}": loss / math.log(2)}

    def show(self, model: nn.Module) -> dict[str, str]:
        """A text that continues the start of the validation text."""
        prompt = self.val_tokens[:32].tolist()
        tokens = sampling.generate(model, [prompt], max_new_tokens=256, temperature=0.8, top_p=0.95)
        return {"sample": self.tokenizer.decode(prompt + [token.item() for token in tokens])}

    def summary(self, metrics: dict[str, float]) -> str | None:
        if self.unit == "token":
            return None
        text = self.val_tokens.values[1:].tobytes()  # the first byte is never predicted
        gzip_bits, xz_bits = (8 * len(packed) / len(text)
                              for packed in (gzip.compress(text, 9), lzma.compress(text, preset=9)))
        return (f"validation: {metrics['bits_per_byte']:.3f} bits per byte; for the same {len(text):,} bytes "
                f"gzip -9 needs {gzip_bits:.3f} and xz -9 {xz_bits:.3f}")


class MaskedLM(Task):
    """Perceiver IO on text: some words are masked, predict their bytes (Perceiver IO, section 4.1)."""
    ModelConfig = MaskedLMConfig
    DataConfig = MaskedTextDataConfig

    def load_data(self) -> tuple[Dataset, Dataset]:
        if self.config.data.holds_ids:
            raise UserError(f"data.path={self.config.data.path} holds token ids; words are masked in text alone")
        length, data = self.config.model.input.max_seq_len, self.config.data
        self.train_tokens, val_tokens = load_text(data)
        self.val_set = MaskedBlocks(val_tokens, length, data.mask_prob)
        return MaskedWindows(self.train_tokens, length, data.mask_prob, self.config.train.seed), self.val_set

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = model(batch["input_ids"], batch.get("pad_mask")), batch["labels"]  # (B, L, V), (B, L)
        sums = token_sums(logits, labels) | {"correct": (logits.argmax(-1) == labels).sum()}
        sums["masked_loss"] = sums["loss"]
        if model.training and (weight := self.config.data.unmasked_weight):
            unmasked = batch["input_ids"].where(labels == IGNORE, IGNORE)
            sums["loss"] = sums["loss"] + weight * token_sums(logits, unmasked)["loss"]
        return sums

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return super().metrics(sums) | {"bits_per_byte": sums["masked_loss"] / sums["count"] / math.log(2)}

    def show(self, model: nn.Module) -> dict[str, str | Tensor]:
        """The start of the validation text as the model gets it, each masked byte a _, as it fills that in, and a
        picture of where it looks."""
        example = {name: torch.from_numpy(values)[None].to(next(model.parameters()).device)
                   for name, values in self.val_set[0].items()}
        with torch.inference_mode():
            best = model.eval()(example["input_ids"], example["pad_mask"])[..., ByteTokenizer.OFFSET :].argmax(-1)
        model.train()
        ids, tokenizer = example["input_ids"][0, :512], ByteTokenizer()
        masked = ids == tokenizer.MASK
        blanks = torch.full_like(ids, ord("_")) + tokenizer.OFFSET
        filled = best[0, :512] + tokenizer.OFFSET
        texts = {name: tokenizer.decode(torch.where(masked, there, ids).tolist())
                 for name, there in (("masked", blanks), ("filled", filled))}
        return texts | {"attention": first_text_attention(model, self.val_set)}

    def summary(self, metrics: dict[str, float]) -> str:
        """Beside the best that can be done without looking at the text around a byte."""
        counts = np.bincount(self.train_tokens.values, minlength=256) + 1  # one more of each: none is impossible
        bits = -np.log2(counts / counts.sum())
        labels = np.concatenate([self.val_set[index]["labels"] for index in range(len(self.val_set))])
        frequency_bits = bits[labels[labels != IGNORE] - ByteTokenizer.OFFSET].mean()
        return (f"validation: {metrics['bits_per_byte']:.3f} bits per masked byte, {metrics['accuracy']:.1%} of them "
                f"right; by the frequencies of bytes it would be {frequency_bits:.3f} bits")


class Classification(Task):
    """One label for an input, whatever that is."""

    def share(self, train_set: Dataset, val_set: Dataset) -> tuple[Dataset, Dataset]:
        """The data in the order of training, once its classes are found to be the model's."""
        num_classes, self.class_names = self.config.model.num_classes, train_set.class_names
        if len(self.class_names) != num_classes:
            raise UserError(f"model.num_classes={num_classes}, but the data has {len(self.class_names)} classes: "
                            f"{', '.join(self.class_names[:12])}{', ...' if len(self.class_names) > 12 else ''}")
        self.val_set = val_set
        return Shuffled(train_set, self.config.data.batch_size, self.config.train.seed), val_set

    def class_sums(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Of logits (B, E) and classes (B,) or their probabilities (B, E)."""
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
        classes = labels if labels.ndim == 1 else labels.argmax(-1)
        return {"loss": loss, "count": torch.tensor(len(logits), device=loss.device),
                "correct": (logits.argmax(-1) == classes).sum()}


class TextClassification(Classification):
    """Perceiver IO on texts with labels; usually on an encoder that a masked language model trained."""
    ModelConfig = TextClassifierConfig
    DataConfig = TextClassificationDataConfig

    def load_data(self) -> tuple[Dataset, Dataset]:
        return self.share(*load_labelled_text(self.config.data, self.config.model.input.max_seq_len))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.class_sums(model(batch["input_ids"], batch.get("pad_mask")), batch["label"])

    def show(self, model: nn.Module) -> dict[str, Tensor]:
        """Where the model looks in the first validation text."""
        return {"attention": first_text_attention(model, self.val_set)}


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


def first_text_attention(model: nn.Module, texts: Dataset) -> Tensor:
    """A picture of where the model looks in the first text, without its padding."""
    example = texts[0]
    return pictures.over_text(model, torch.from_numpy(example["input_ids"][~example["pad_mask"]]))


def token_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of logits (B, L, V) and labels (B, L), where those are not IGNORE."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return {"loss": loss, "count": (labels != IGNORE).sum()}


TASKS = {"causal_lm": CausalLM, "masked_lm": MaskedLM, "text_classification": TextClassification,
         "image_classification": ImageClassification}


def load_checkpoint(path: str | Path, device: torch.device) -> tuple[Task, nn.Module]:
    """The task of a checkpoint of train.py and its model, rebuilt from the config in it, in evaluation mode. Raises
    UserError if there is none or it is broken."""
    saved = checkpoint.load(path, device)
    config = from_dict(saved["config"], TASKS)
    task = TASKS[config.task](config)
    task.class_names = saved.get("class_names")
    model = task.build_model().to(device)
    load_weights(model, saved["model"], str(path))
    return task, model.eval()
