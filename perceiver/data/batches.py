"""The order in which examples are read, and batches of them."""
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from perceiver.config import require
from perceiver.distributed import Ranks


@dataclass
class LoaderConfig:
    """What the data configs of all tasks have in common."""
    batch_size: int = 16  # examples of one optimizer step, over all ranks and micro-batches
    num_workers: int = 0  # processes that load data, per rank; 0: the training process itself

    def __post_init__(self):
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        require(self.num_workers >= 0, f"num_workers={self.num_workers} must not be negative")


class Shuffled(Dataset):
    """A finite set of examples for training, by key (step, index in the global batch): each once an epoch.

    Random transforms must draw from torch's CPU generator, as torchvision's do. It is seeded for the example, and then
    goes on as if nothing had happened.
    """

    def __init__(self, examples: Dataset, batch_size: int, seed: int):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed

    def __getitem__(self, key: tuple[int, int]):
        step, index = key
        epoch, place = divmod(step * self.batch_size + index, len(self.examples))
        number = int(epoch_order(self.seed, epoch, len(self.examples))[place])
        before = torch.get_rng_state()
        # The last number sets it apart from the seeds of dropout, (seed, step, rank).
        seed = np.random.SeedSequence((self.seed, step, index, 1)).generate_state(1)[0]
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would touch the GPU's generator
        try:
            return self.examples[number]
        finally:
            torch.set_rng_state(before)


@lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


class TrainKeys(Sampler):
    """The keys (step, index in the global batch) of one rank's micro-batches, from `first_step` on."""

    def __init__(self, batch_size: int, accumulate: int, ranks: Ranks, first_step: int, last_step: int):
        self.size = batch_size // (accumulate * ranks.world_size)  # of a micro-batch
        self.accumulate, self.ranks, self.steps = accumulate, ranks, range(first_step, last_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for micro in range(self.accumulate):
                first = (micro * self.ranks.world_size + self.ranks.rank) * self.size
                yield [(step, index) for index in range(first, first + self.size)]


def train_loader(dataset: Dataset, keys: TrainKeys, num_workers: int) -> DataLoader:
    return DataLoader(dataset, batch_sampler=keys, num_workers=num_workers, worker_init_fn=own_process_group,
                      collate_fn=collate_padded, pin_memory=keys.ranks.device.type == "cuda")


def eval_loader(dataset: Dataset, batch_size: int, ranks: Ranks, num_workers: int) -> DataLoader:
    """This rank's share of a dataset, every example once."""
    share = torch.utils.data.Subset(dataset, range(ranks.rank, len(dataset), ranks.world_size))
    return DataLoader(share, batch_size=batch_size, num_workers=num_workers, worker_init_fn=own_process_group,
                      collate_fn=collate_padded)


def own_process_group(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM are sent to the whole process group: workers leave it, and go on until the training
    process, which saves, ends them."""
    os.setpgrp()


def collate_padded(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch without `pad_mask` where nothing is padded: attention is faster without a mask. Examples whose input_ids
    differ in length get padding on the left, up to the longest of them."""
    lengths = [len(example.get("input_ids", ())) for example in examples]
    if max(lengths) > min(lengths):
        examples = [pad_left(example, max(lengths)) for example in examples]
    batch = default_collate(examples)
    if "pad_mask" in batch and not batch["pad_mask"].any():
        del batch["pad_mask"]
    return batch


def pad_left(example: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """An example of Perceiver AR with `length` input_ids, and pad_mask (length,); prefix_keep goes with its tokens."""
    padding = length - len(example["input_ids"])
    moved = {"prefix_keep": example["prefix_keep"] + padding} if "prefix_keep" in example else {}
    return example | moved | {"input_ids": np.pad(example["input_ids"], (padding, 0)),
                              "pad_mask": np.arange(length) < padding}
