"""Processes: one a GPU (or several on a CPU), started by torchrun; without torchrun, one process."""
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from perceiver.errors import UserError


@dataclass
class Ranks:
    """This process among those of the run."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Numbers by name, added up over the ranks."""
        if self.world_size == 1:
            return sums
        values = torch.stack(list(sums.values()))
        dist.all_reduce(values)
        return dict(zip(sums, values))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all wait for all. Goes over the CPU: it doesn't wait for the GPU's queue."""
        return self.sum({"flag": torch.tensor(int(flag))})["flag"].item() > 0

    def main_first(self, work: Callable):
        """What `work` returns, on every rank; the others begin when the first is done."""
        if not self.is_main:
            self.any(False)
        result = work()
        if self.is_main:
            self.any(False)
        return result

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it's called in training, with gradients averaged over the ranks."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def init_ranks(device: str) -> Ranks:
    """Joins the processes torchrun started; `device` is auto, cpu or cuda. Raises UserError without a GPU to use."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError("device cuda: PyTorch sees no CUDA GPU here; use device cpu or auto")
    if gpus and local_rank >= gpus:
        raise UserError(f"process {local_rank} of this machine has no GPU, there are {gpus}; "
                        f"start torchrun with --nproc-per-node {gpus}")
    where = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(where)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    return Ranks(rank, world_size, where)


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next forward and backward of a wrapped model exchange gradients."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on


def add(totals: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    """Adds sums to totals by name, in float64."""
    for name, value in sums.items():
        totals[name] = totals.get(name, 0) + value.detach().double()


def floats(sums: dict[str, Tensor]) -> dict[str, float]:
    """Numbers for the host, fetched from the device at once."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist()))


class StopSignal:
    """SIGTERM or Ctrl-C, noted: the loop ends after the step it is in."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        self.received = number

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else "another process"
