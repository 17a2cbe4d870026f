"""The copy task: half of a sequence is random, the other half is the first one backwards.

The data of Perceiver AR's experiment on long contexts (arXiv 2202.07765, section 5.1; Google's RandomMirroredDataset),
made when it is needed.
"""
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from perceiver.config import require
from perceiver.data.batches import LoaderConfig
from perceiver.data.text import IGNORE

EOS, SOS, FIRST_VALUE = 1, 2, 3  # 0 is padding in Google's code
VOCAB_SIZE = FIRST_VALUE + 256


@dataclass
class CopyDataConfig(LoaderConfig):
    min_crop: int | None = None  # tokens of the shortest training window; null: as many as latents
    grow_steps: int = 0  # first steps, in which training windows grow from 32 tokens around the middle to the sequence
    num_val_sequences: int = 64  # sequences to validate on, all of their second halves

    def __post_init__(self):
        super().__post_init__()
        require(self.grow_steps >= 0, f"grow_steps={self.grow_steps} must not be negative")
        require(self.num_val_sequences >= 1, f"num_val_sequences={self.num_val_sequences} must be at least 1")


def mirrored(length: int, rng: np.random.Generator) -> np.ndarray:
    """(length,): SOS, random values, the same backwards, EOS. The second half follows from the first."""
    values = rng.integers(FIRST_VALUE, VOCAB_SIZE, length // 2 - 1)
    return np.concatenate(([SOS], values, values[::-1], [EOS]))


def window(sequence: np.ndarray, end: int, num_labels: int) -> dict[str, np.ndarray]:
    """The first `end` tokens: input_ids (end,), the next token at the last of them, labels (N,), and which of those are
    of the second half, mirrored (N,)"""
    targets = np.arange(end - num_labels, end) + 1
    return {"input_ids": sequence[:end], "labels": sequence[targets], "mirrored": targets >= len(sequence) // 2}


class CopyWindows(Dataset):
    """Training windows by key (step, index in the global batch): the start of a new sequence, and any number of tokens
    from `min_crop` to length - 1. Where it ends early in the second half, the first labels can't be known.

    To look back 4,000 positions is slow to learn from nothing: each value is one of thousands that attention averages.
    So in the first `grow_steps` the prefix is cut to what is near the middle, where all positions are what they are in
    the whole sequence, and the reach to both sides grows from 16 tokens to half of the sequence.
    """

    def __init__(self, length: int, num_latents: int, min_crop: int, seed: int, grow_steps: int = 0):
        self.length, self.num_latents, self.min_crop, self.seed = length, num_latents, min_crop, seed
        self.grow_steps = grow_steps

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """input_ids (m,), labels (N,), mirrored (N,), and while windows grow prefix_keep (P',), with fewer latents"""
        rng = np.random.default_rng((self.seed, *key))
        sequence, middle, step = mirrored(self.length, rng), self.length // 2, key[0]
        if step >= self.grow_steps:
            return window(sequence, rng.integers(self.min_crop, self.length), self.num_latents)
        first = min(16, middle)
        reach = int(first * (middle / first) ** (step / self.grow_steps) ** 2)
        num_latents = min(self.num_latents, reach)
        end = middle + rng.integers(min(num_latents, reach // 2), reach)
        keep = np.arange(end - 2 * reach, end - num_latents).clip(min=0)  # SOS several times, to have the same number
        return window(sequence, end, num_latents) | {"prefix_keep": keep}


class CopyBlocks(Dataset):
    """The second halves of some sequences, always the same: every token is predicted once, N at a time, each with all
    that is before it."""

    def __init__(self, length: int, num_latents: int, num_sequences: int):
        self.length, self.num_latents, self.num_sequences = length, num_latents, num_sequences
        self.num_blocks = -(-(length // 2) // num_latents)  # of one sequence

    def __len__(self) -> int:
        return self.num_sequences * self.num_blocks

    def sequence(self, number: int) -> np.ndarray:
        return mirrored(self.length, np.random.default_rng((0, 0, number, 1)))  # the 1 sets it apart from training's

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, block = divmod(index, self.num_blocks)
        first = self.length // 2 + block * self.num_latents  # the first token to predict
        end = min(first + self.num_latents, self.length)
        example = window(self.sequence(number), end - 1, self.num_latents)
        known = np.arange(end - self.num_latents, end) < first  # of the first half, or in the block before
        return example | {"labels": np.where(known, IGNORE, example["labels"]), "mirrored": ~known}
