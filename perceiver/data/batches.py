"""The order in which examples are read, and batches of them."""
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from perceiver.distributed import Ranks


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
    return DataLoader(dataset, batch_sampler=keys, num_workers=num_workers, worker_init_fn=ignore_interrupt,
                      pin_memory=keys.ranks.device.type == "cuda")


def eval_loader(dataset: Dataset, batch_size: int, ranks: Ranks, num_workers: int) -> DataLoader:
    """This rank's share of a dataset, every example once."""
    share = torch.utils.data.Subset(dataset, range(ranks.rank, len(dataset), ranks.world_size))
    return DataLoader(share, batch_size=batch_size, num_workers=num_workers, worker_init_fn=ignore_interrupt,
                      collate_fn=collate_padded)


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches workers too: they go on, until the training process has saved and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate_padded(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch without `pad_mask` where nothing is padded: attention is faster without a mask."""
    batch = default_collate(examples)
    if "pad_mask" in batch and not batch["pad_mask"].any():
        del batch["pad_mask"]
    return batch
