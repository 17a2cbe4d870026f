"""The copy task: the first half of a sequence is random, and the second half repeats it backwards.

This is the long-context experiment of the Perceiver AR paper (arXiv 2202.07765, section 5.1; Google's
RandomMirroredDataset). The data is generated on the fly.
"""

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from perceiver import decoding
from perceiver.config import Count, NonNegativeInt
from perceiver.data import IGNORE, Example, IdTokenizer, LoaderConfig, example_rng
from perceiver.errors import UserError
from perceiver.tasks.base import Autoregression

EOS, SOS, FIRST_VALUE = 1, 2, 3  # 0 is padding in Google's code
NUM_VALUES = 256


@dataclass
class CopyDataConfig(LoaderConfig):
    min_seq_len: Count | None = None  # length of the shortest training window; null: model.num_latents
    curriculum_steps: NonNegativeInt = 0  # steps in which training windows grow from 32 tokens to full size
    val_size: Count = 64  # number of validation sequences; all tokens of their second halves count


def mirrored_sequence(length, rng):
    """A sequence (length,): SOS, random values, the same values backwards, EOS."""
    values = rng.integers(FIRST_VALUE, FIRST_VALUE + NUM_VALUES, length // 2 - 1)
    return np.concatenate(([SOS], values, values[::-1], [EOS]))


def window(sequence: np.ndarray, end: int, num_labels: int) -> Example:
    """An example: input_ids (end,), the first tokens of the sequence; labels (N,), the token after each of the last
    N = `num_labels` of them; mirrored (N,), true for labels in the second half."""
    targets = np.arange(end - num_labels, end) + 1
    return {"input_ids": sequence[:end], "labels": sequence[targets], "mirrored": targets >= len(sequence) // 2}


@dataclass
class CopyWindows(Dataset):
    """Training windows by key (step, index in the global batch): the first tokens of a new sequence.

    A window has a random length from `min_seq_len` to `length` - 1. Some of its labels may be in the first half: they
    are random, and no model can predict them.

    Learning long sequences from scratch is slow: at first, attention averages thousands of values, and only one of them
    is the value to copy. The curriculum makes the start easy. A window ends less than `reach` tokens after the middle,
    and the model sees only its last 2 * `reach` tokens, at their usual positions. `reach` grows from 16 to half of the
    sequence.
    """

    length: int
    num_latents: int
    min_seq_len: int
    seed: int
    curriculum_steps: int = 0

    def __getitem__(self, key):
        """A `window`. In the curriculum, it also has prefix_keep (P',), and at first fewer labels."""
        step, _ = key
        rng = example_rng(self.seed, key)
        sequence = mirrored_sequence(self.length, rng)
        if step >= self.curriculum_steps:
            end = rng.integers(self.min_seq_len, self.length)
            return window(sequence, end, self.num_latents)
        middle = self.length // 2
        first_reach = min(16, middle)
        progress = (step / self.curriculum_steps) ** 2
        reach = int(first_reach * (middle / first_reach) ** progress)
        num_latents = min(self.num_latents, reach)
        end = middle + rng.integers(min(num_latents, reach // 2), reach)
        # Positions before the start become SOS: all windows of a step must keep the same number of positions.
        prefix_keep = np.arange(end - 2 * reach, end - num_latents).clip(min=0)
        return window(sequence, end, num_latents) | {"prefix_keep": prefix_keep}


@dataclass
class CopyBlocks(Dataset):
    """Validation: each token of the second halves is predicted once, in blocks of N, after all tokens before it."""

    length: int
    num_latents: int
    num_sequences: int

    def __post_init__(self):
        self.starts = range(self.length // 2, self.length, self.num_latents)  # the first token of each block

    def __len__(self):
        return self.num_sequences * len(self.starts)

    def sequence(self, number):
        seed = (0, 0, number, 1)  # seeds of training windows have three numbers
        return mirrored_sequence(self.length, np.random.default_rng(seed))

    def __getitem__(self, index):
        number, block = divmod(index, len(self.starts))
        start = self.starts[block]  # the first token to predict
        end = min(start + self.num_latents, self.length)
        example = window(self.sequence(number), end - 1, self.num_latents)
        known = np.arange(end - self.num_latents, end) < start
        labels = np.where(known, IGNORE, example["labels"])
        return example | {"labels": labels, "mirrored": ~known}


class Copy(Autoregression):
    """Perceiver AR on mirrored sequences of model.max_seq_len tokens."""

    name = "copy"
    DataConfig = CopyDataConfig
    options = ("stop", "no_prompt")
    vocab_size = FIRST_VALUE + NUM_VALUES

    def __init__(self, config):
        super().__init__(config)
        self.tokenizer = IdTokenizer()
        length, num_latents = config.model.max_seq_len, config.model.num_latents
        self.min_seq_len = config.data.min_seq_len or num_latents
        if length % 2:
            raise UserError(f"model.max_seq_len={length} must be even")
        if not num_latents <= self.min_seq_len < length:
            raise UserError(
                f"data.min_seq_len={self.min_seq_len} must be at least model.num_latents={num_latents}, "
                f"and less than model.max_seq_len={length}"
            )

    def load_data(self):
        model, data = self.config.model, self.config.data
        shape = model.max_seq_len, model.num_latents
        windows = CopyWindows(*shape, self.min_seq_len, self.config.train.seed, data.curriculum_steps)
        self.val_set = CopyBlocks(*shape, data.val_size)
        return windows, self.val_set

    def sums(self, logits, batch):
        mirrored = batch["mirrored"]
        correct = (logits.argmax(-1) == batch["labels"]) & mirrored
        return super().sums(logits, batch) | {"correct": correct.sum(), "mirrored": mirrored.sum()}

    def metrics(self, sums):
        """`accuracy` counts only the second half. In training, `loss` and `bits_per_token` count both halves."""
        metrics = super().metrics(sums)
        if sums["mirrored"]:
            metrics["accuracy"] = sums["correct"] / sums["mirrored"]
        return metrics

    def visualize(self, model):
        """The first 16 tokens of a second half, and the tokens that the model generates after the first half."""
        sequence = self.val_set.sequence(0).tolist()
        half = len(sequence) // 2
        expected = sequence[half : half + 16]
        tokens = decoding.generate(model, [sequence[:half]], max_new_tokens=len(expected), temperature=0)
        copied = [token.item() for token in tokens]
        return {"expected": self.tokenizer.decode(expected), "copied": self.tokenizer.decode(copied)}

    def summary(self, metrics):
        return f"validation: {metrics['accuracy']:.2%} of second-half tokens right; guessing gives {1 / NUM_VALUES:.2%}"

    generate = Autoregression.continue_text
