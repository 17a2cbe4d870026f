"""Processes: torchrun starts one for each GPU, or several on a CPU. Without torchrun there is one process."""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from perceiver.config import Config, TrainConfig
from perceiver.errors import UserError, print_error
from perceiver.model import SelfAttentionLayer


@dataclass
class Ranks:
    """The rank of this process, the number of processes, and the device of this process."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0  # among the processes of this host
    patient: dist.ProcessGroup | None = None  # all ranks, on the CPU; waits for a slow rank as long as it takes

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
        """Waits until all ranks have called it, as long as it takes."""
        if self.world_size > 1:
            dist.barrier(self.patient)

    def main_first(self, work: Callable) -> Any:
        """Calls `work` on every rank and returns its result. The ranks of a host share the files that it leaves.

        Rank 0 is the first, then one rank of each other host, then all others. So it does not matter whether the hosts
        share a disk.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for number in range(3):
            if number == turn:
                result = work()
            self.barrier()
        return result

    def gather_objects(self, value: Any) -> list:
        """The `value` of every rank."""
        values = [value]
        if self.world_size > 1:
            values *= self.world_size
            dist.all_gather_object(values, value, self.patient)
        return values

    def newest(self, file: Path | None) -> int | None:
        """The rank on whose disk its `file` was written last. None if all ranks give None; 0 if no file exists."""
        time = -1
        if file is not None:
            time = file.stat().st_mtime_ns if file.exists() else 0
        times = self.gather_objects(time)
        return times.index(max(times)) if max(times) >= 0 else None

    def gather(self, state: Any) -> Any:
        """A copy of `state`, which is nested dicts and lists, on the CPU of rank 0. Sharded tensors become whole.

        All ranks must call it. On the other ranks, tensors become None.
        """

        def copy(name: str, tensor: Tensor) -> Tensor | None:
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            return tensor.to("cpu", copy=True) if self.is_main else None

        return map_tensors(copy, state)

    def share(self, state: Any, owner: int, keep: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor) -> Any:
        """The `state` of the rank `owner`, which is nested dicts and lists, on every rank. Tensors are on the CPU.

        The other ranks give None. `keep(name, tensor)` returns what this rank holds of a tensor; one tensor at a time
        is whole on all ranks.
        """
        if self.world_size == 1:
            return map_tensors(keep, state)
        is_owner = self.rank == owner
        tensors = []
        outline = map_tensors(lambda name, tensor: tensors.append(tensor) or tensor.to("meta"), state)
        outlines = [outline]
        dist.broadcast_object_list(outlines, owner, self.patient)

        def receive(name: str, outline: Tensor) -> Tensor:
            tensor = tensors.pop(0) if is_owner else torch.empty_like(outline, device="cpu")
            tensor = tensor.contiguous()
            dist.broadcast(tensor, owner, self.patient)
            return keep(name, tensor)

        return map_tensors(receive, outlines[0])

    def share_weights(self, model: nn.Module):
        """Copies the weights and buffers of a model on the CPU from rank 0 to the others."""
        model.load_state_dict(self.share(model.state_dict() if self.is_main else None, 0))

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict, owner: int):
        """Loads the weights and the optimizer's state that the rank `owner` has in `saved`, whole."""
        meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
        buffers = dict(model.named_buffers())

        def keep(name: str, tensor: Tensor) -> Tensor:
            if not meshes or tensor.ndim == 0 or name in buffers:
                return tensor
            return distribute_tensor(tensor.to(self.device), meshes[0], [Shard(0)], src_data_rank=None)

        model.load_state_dict(self.share(saved.get("model"), owner, keep))
        optimizer.load_state_dict(self.share(saved.get("optimizer"), owner, keep))

    def wrap(self, model: nn.Module, options: TrainConfig, bf16: bool) -> nn.Module:
        """Moves a model to the device and returns the model for training steps, which has the same parameters.

        Its backward pass averages gradients over the ranks. With train.parallel=fsdp, each rank holds a part of each
        parameter. FSDP gathers a layer before it runs and then frees it. Call `wrap` before the optimizer is built.
        """
        if self.world_size > 1 and options.parallel == "fsdp":
            self.share_weights(model)
            return self.shard(model, options.compile, bf16)
        model.to(self.device)
        train_model = torch.compile(model) if options.compile else model
        if self.world_size == 1:
            return train_model
        # BatchNorm changes its buffers. The others are constant, such as tables of Fourier features.
        is_new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if is_new else "broadcast_buffers"
        buffers = {name: bool(batch_norms(model))}
        return DistributedDataParallel(train_model, gradient_as_bucket_view=True, **buffers)

    def shard(self, model: nn.Module, compile: bool, bf16: bool) -> nn.Module:
        """Applies FSDP2: to each self-attention layer, and to the rest of the model as a whole.

        The rest is small, and stays gathered during a step. With bf16, GPUs gather layers in bf16 and average gradients
        in float32. The inputs of layers stay float32: autocast casts them, as without FSDP. On a CPU, autocast casts
        the weights too, because LayerNorm there does not take weights in bf16 with inputs in float32.
        """
        twin = deepcopy(model)  # for `whole`
        free_parameters(twin)
        model.twin = (twin.to(self.device),)  # in a tuple it is not a part of the model
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if bf16 and self.device.type == "cuda":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in model.modules():
            if isinstance(layer, SelfAttentionLayer):
                if compile:
                    layer.compile()
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        model.to(self.device)  # the buffers
        if norms := batch_norms(model):
            model.register_forward_pre_hook(lambda *_: share_buffers(norms))
        return model


def check_batch_size(config: Config, ranks: Ranks):
    """Raises UserError unless all micro-batches of all ranks have the same size."""
    batch_size, micro_batches = config.data.batch_size, config.train.gradient_accumulation_steps
    if batch_size % (micro_batches * ranks.world_size):
        raise UserError(
            f"data.batch_size={batch_size} is not divisible by train.gradient_accumulation_steps="
            f"{micro_batches} x {ranks.world_size} processes"
        )


def load_data(task, ranks: Ranks) -> tuple[Dataset, Dataset]:
    """The training and the validation set of a task. Raises UserError on all ranks if their data differs."""
    train_set, val_set = ranks.main_first(task.load_data)
    about = {"examples for validation": len(val_set), "data": task.state_dict()}
    for rank, other in enumerate(ranks.gather_objects(about)):
        for what in about:
            if other[what] != about[what]:
                raise UserError(f"processes {ranks.rank} and {rank} have different {what}: give all the same data")
    if len(val_set) < ranks.world_size:
        raise UserError(
            f"the validation set has {len(val_set)} examples, fewer than the {ranks.world_size} processes; "
            "give more data, or raise data.val_fraction"
        )
    return train_set, val_set


def map_tensors(change: Callable[[str, Tensor], Any], state: Any, name="") -> Any:
    """Nested dicts and lists with `change(name, tensor)` instead of each tensor. `name` is its key in the last dict."""
    if isinstance(state, Tensor):
        return change(name, state)
    if isinstance(state, dict):
        return {key: map_tensors(change, value, key) for key, value in state.items()}
    if isinstance(state, list):
        return [map_tensors(change, value, name) for value in state]
    return state


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def share_buffers(modules: list[nn.Module]):
    """In training, copies buffers from rank 0 to the others, as DDP does before each forward pass."""
    for module in modules:
        if module.training:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def whole(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a model that each rank may call on its own: `model`, or with FSDP a whole copy. All ranks must enter."""
    if not isinstance(model, FSDPModule):
        yield model
        return
    (twin,) = model.twin
    for parameter, part in zip(twin.parameters(), model.parameters()):
        parameter.data = part.detach().full_tensor()
    for buffer, current in zip(twin.buffers(), model.buffers()):
        buffer.copy_(current)
    yield twin
    free_parameters(twin)


def free_parameters(model: nn.Module):
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt, from malloc.h


def find_device(name: str) -> torch.device:
    """The device of this process; `name` is auto, cuda or cpu. Raises UserError if a GPU is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no CUDA GPU; use device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
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


def keep_freed_memory():
    """Makes malloc keep freed memory for new arrays, as PyTorch's allocator does on a GPU.

    By default, glibc gives large arrays back to the system. Each new one then costs page faults, and the system fills
    it with zeros. Without them, training steps take 0.85 to 1.0 of the time (docs/performance.md). Environment
    variables for malloc have precedence.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


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


@cache
def shared_store() -> dist.Store:
    """The store of keys and values that torchrun gives to all processes of this start."""
    return next(dist.rendezvous("env://"))[0]


def init_ranks(device_name: str) -> Ranks:
    """Joins the processes that torchrun started. Raises UserError like `find_device`."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(device_name)
    if world_size == 1:
        return Ranks(rank, world_size, device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=shared_store(), rank=rank, world_size=world_size)
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    return Ranks(rank, world_size, device, int(os.environ.get("LOCAL_RANK", 0)), patient)


@contextmanager
def joined(device_name: str) -> Iterator[Ranks]:
    """`init_ranks` for the block. If the block fails because another rank reported an error and left, exits quietly."""
    ranks = init_ranks(device_name)
    try:
        yield ranks
    except RuntimeError:
        if another_failed():
            raise SystemExit(2) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def report_once(line: str):
    """Prints an error to stderr, unless another rank has done so."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        print_error(line)
    elif shared_store().add("errors", 1) == 1:
        print_error(line)
        time.sleep(2)  # the store may end with this process: let the others read it first


def another_failed() -> bool:
    """Whether a rank has reported an error. Then its end is the reason why an exchange with it fails."""
    if not dist.is_initialized():
        return False
    with suppress(RuntimeError):
        shared_store().wait(["errors"], timedelta(seconds=1))
        return True
    return False


def sync_gradients(model: nn.Module, enabled: bool):
    """Turns the exchange of gradients between ranks on or off for the next forward and backward pass.

    FSDP always exchanges them. Otherwise each rank would hold the whole gradient until the last micro-batch.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled


def add(totals: dict[str, Tensor], sums: dict[str, Tensor]):
    """Adds `sums` to `totals` by name, in float64."""
    for name, value in sums.items():
        totals[name] = totals.get(name, 0) + value.detach().double()


def to_floats(sums: dict[str, Tensor]) -> dict[str, float]:
    """Copies scalars from the device to the host in one transfer."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist()))
