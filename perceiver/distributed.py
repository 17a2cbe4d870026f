"""Processes: torchrun starts one for each GPU, or several on a CPU. Without torchrun there is one process."""

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
    """The rank of this process, the number of processes, and the device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums scalars over the ranks, by name."""
        if self.world_size == 1:
            return sums
        values = torch.stack(list(sums.values()))
        dist.all_reduce(values)
        return dict(zip(sums, values))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. The ranks exchange it on the CPU, without waiting for the GPU."""
        return bool(self.sum({"flag": torch.tensor(int(flag))})["flag"])

    def barrier(self):
        """Waits until all ranks have called it."""
        self.any(False)

    def main_first(self, work: Callable):
        """Calls `work` on every rank and returns its result. The other ranks start when the main rank is done."""
        if not self.is_main:
            self.barrier()
        result = work()
        if self.is_main:
            self.barrier()
        return result

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model for training steps. Its backward pass averages gradients over the ranks."""
        if self.world_size == 1:
            return model
        # BatchNorm changes its buffers. The others are constant, such as tables of Fourier features.
        has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=has_batch_norm)


def find_device(name: str) -> torch.device:
    """The device of this process; `name` is auto, cuda or cpu. Raises UserError if a GPU is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no CUDA GPU; use device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU, because there are only {gpus}; "
            f"start torchrun with --nproc-per-node {gpus}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: `precision` is bf16, or it is auto and bf16 is faster than float32 on the device.

    On CPUs this is taken to hold with AMX, and with AVX512_BF16 on AMD. Intel's cores with AVX512_BF16 that do not
    offer AMX, as in some virtual machines, multiply in bf16 more slowly than in float32. Unlike AMD's, they have
    AVX512_FP16.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # an older version of torch, which does not tell AVX512_FP16
        return torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()  # on ARM, without these names
    has_amx = capabilities.get("amx_bf16", False)
    has_avx = capabilities.get("avx512_bf16", False)
    return has_amx or (has_avx and not capabilities.get("avx512_fp16", False))


def init_ranks(device_name: str) -> Ranks:
    """Joins the processes that torchrun started. Raises UserError like `find_device`."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(device_name)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, world_size, device)


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def sync_gradients(model: nn.Module, enabled: bool):
    """Turns the exchange of gradients between ranks on or off for the next forward and backward pass."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled


def add(totals: dict[str, Tensor], sums: dict[str, Tensor]):
    """Adds `sums` to `totals` by name, in float64."""
    for name, value in sums.items():
        totals[name] = totals.get(name, 0) + value.detach().double()


def to_floats(sums: dict[str, Tensor]) -> dict[str, float]:
    """Copies scalars from the device to the host in one transfer."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist()))


class StopSignal:
    """Remembers SIGTERM or Ctrl-C, so that the training loop can save a checkpoint and end."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame):
        self.received = number

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else "another process"
