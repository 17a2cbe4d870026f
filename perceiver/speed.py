"""The speed of a run: its rate, and model FLOPs utilization (MFU) as in PaLM (arXiv 2204.02311, appendix B)."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perceiver.tasks.base import Task

# Peak FLOP/s of dense matrix products in bf16 and in TF32 (for float32), from the vendor's datasheets.
PEAKS = {
    "H200": (989e12, 495e12),
    "H100": (989e12, 495e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "A10G": (70e12, 35e12),
    "RTX 4090": (165e12, 83e12),
    "RTX 3090": (71e12, 36e12),
}


class SpeedMeter:
    """Measures the speed and the health of training on this rank, from one report to the next.

    `health` is that of the last report: `data_wait`, the fraction of the time in which the loop waited for data; the
    median and the 95th percentile of the steps' seconds; and the peak of memory. The host does not wait for the GPU:
    the GPU itself notes when a step ends.
    """

    def __init__(self, task: Task, device: torch.device, bf16: bool):
        self.task = task
        self.peak = 0.0  # FLOP/s; 0 if it is unknown
        if device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(device), bf16)
        self.flops_by_shape = {}
        self.flops = 0
        self.device = device
        self.waited = 0.0  # seconds
        self.steps = []  # the marks of their start and end
        self.health = {}
        self.last_mark = self.mark()
        self.start = time.perf_counter()

    def fetch(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The next batch. Adds the time of waiting for it, and the FLOPs of training on it."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        self.count(batch)
        return batch

    def end_step(self):
        mark = self.mark()
        self.steps.append((self.last_mark, mark))
        self.last_mark = mark

    def mark(self) -> float | torch.cuda.Event:
        """A point in time of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_seconds(self) -> list[float]:
        """The duration of each step since the last report. The GPU must have finished them."""
        if self.device.type != "cuda":
            return [end - start for start, end in self.steps]
        return [start.elapsed_time(end) / 1000 for start, end in self.steps]

    def count(self, batch: dict[str, Tensor]):
        """Adds the FLOPs of training on `batch`."""
        if self.peak:
            shapes = tuple(values.shape for values in batch.values())
            if shapes not in self.flops_by_shape:
                self.flops_by_shape[shapes] = training_flops(self.task, batch)
            self.flops += self.flops_by_shape[shapes]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside the block does not count."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start
        self.last_mark = self.mark()

    def report(self, samples: int, tokens: float) -> dict[str, float]:
        """Samples or tokens per second, as `task.rate` says, and `mfu` if the peak is known. Then starts anew.

        Call it when the host has waited for the GPU.
        """
        seconds = time.perf_counter() - self.start
        count = tokens if self.task.rate == "tokens_per_s" else samples
        rates = {self.task.rate: count / seconds}
        if self.peak:
            rates["mfu"] = self.flops / seconds / self.peak
        median, slow = np.quantile(self.step_seconds(), (0.5, 0.95)).tolist()
        self.health = {
            "data_wait": self.waited / seconds,
            "step_s_median": median,
            "step_s_p95": slow,
            "peak_memory_gb": peak_memory(self.device) / 1e9,
        }
        self.flops, self.waited, self.steps = 0, 0.0, []
        self.start = time.perf_counter()
        return rates


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: that tensors took on a GPU, or that this process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device_name: str, bf16: bool) -> float:
    """The peak of one device in FLOP/s, in bf16 or otherwise in TF32; 0 if it is unknown."""
    for name, (bf16_peak, tf32_peak) in PEAKS.items():
        if re.search(rf"\b{name}\b", device_name):
            return bf16_peak if bf16 else tf32_peak
    return 0.0


@lru_cache(maxsize=1)
def meta_model(task: Task) -> nn.Module:
    """The task's model on the meta device."""
    return task.meta_model().requires_grad_(False)  # the counter fails on views of tensors with gradients


def training_flops(task: Task, batch: dict[str, Tensor]) -> int:
    """FLOPs of a forward and a backward pass. The backward pass takes twice the FLOPs of the forward pass.

    Recomputed activations do not count. The model runs on the meta device, which computes nothing. There, attention
    consists of plain matrix products, so the counter needs no formulas for fused kernels.
    """
    model = meta_model(task)
    batch = {name: values.to("meta") for name, values in batch.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task.loss(model, batch)
    return 3 * counter.get_total_flops()
