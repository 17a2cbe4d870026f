"""Speed and memory of training, around the loop: torch.compile, a trace of some steps, advice when memory ends."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

from perceiver.config import Config, TrainConfig
from perceiver.distributed import Ranks, uses_bf16
from perceiver.io import tell

WARMUP_STEPS = 3  # steps before the trace: the first ones allocate memory and compile


def uses_compile(options: TrainConfig, ranks: Ranks) -> bool:
    """Whether to compile the model, as train.compile says. Tells if a faster way is off, and why."""
    tell_main = tell if ranks.is_main else lambda line: None
    on_gpu = ranks.device.type == "cuda"
    if options.device == "cpu" and torch.cuda.is_available():
        tell_main("train.device=cpu: there is a GPU, which is not used; train.device=auto uses it")
    if options.compile != "auto":
        return options.compile
    missing = missing_compiler()
    if on_gpu and missing:
        tell_main(f"train.compile=auto: torch.compile is off, because there is no {missing}; training is slower")
    return on_gpu and not missing


def missing_compiler() -> str | None:
    """What torch.compile lacks to compile for a GPU: Triton, or the C compiler that Triton calls."""
    if importlib.util.find_spec("triton") is None:
        return "package triton"
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if not any(shutil.which(name) for name in compilers if name):
        return "C compiler (install gcc)"
    return None


@contextmanager
def profiling(options: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """With train.profile=N, writes a trace of N optimizer steps in the block to the run folder, on the main rank.

    The first optimizer that steps counts the steps, so that the training loop need not know of the profiler.
    """
    if not options.profile or not ranks.is_main:
        yield
        return
    file = Path(options.out_dir, "profile.json")
    activities = [ProfilerActivity.CPU]
    sort_by = "self_cpu_time_total"
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        sort_by = "self_device_time_total"

    def write(profiler):
        profiler.export_chrome_trace(str(file))
        table = profiler.key_averages().table(sort_by, row_limit=30)
        file.with_suffix(".txt").write_text(table)
        tell(f"wrote {file}, for https://ui.perfetto.dev, and {file.with_suffix('.txt')}, the 30 slowest operators")

    steps = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=options.profile, repeat=1)
    profiler = profile(activities=activities, schedule=steps, on_trace_ready=write)
    counters = []  # the optimizer that counts steps; there may be others in a step

    def count_step(optimizer, args, kwargs):
        if not counters:
            counters.append(optimizer)
        if optimizer is counters[0]:
            profiler.step()

    hook = register_optimizer_step_post_hook(count_step)
    try:
        with profiler:
            yield
    finally:
        hook.remove()
    if profiler.step_num < WARMUP_STEPS + options.profile:
        tell(f"train.profile={options.profile}: the run has too few steps; the trace needs {WARMUP_STEPS} more")


def memory_advice(config: Config, ranks: Ranks) -> str:
    """Three changes that save memory, with their numbers."""
    train, model = config.train, config.model
    micro_batches, processes = train.gradient_accumulation_steps, ranks.world_size
    examples = config.data.batch_size // (micro_batches * processes)
    parts = {"model": model}
    parts |= {f"model.{name}": getattr(model, name, None) for name in ("encoder", "decoder")}
    without = [name for name, part in parts.items() if getattr(part, "activation_checkpointing", None) is False]

    advice = []
    if examples > 1:
        factor = next((factor for factor in range(2, 1000) if examples % factor == 0), examples)  # the smallest
        fewer, more = examples // factor, micro_batches * factor
        advice.append(f"train.gradient_accumulation_steps={more} ({fewer} examples at once instead of {examples})")
    if without:
        keys = " ".join(f"{name}.activation_checkpointing=true" for name in without)
        advice.append(f"{keys} (a third more compute)")
    if not uses_bf16(train.precision, ranks.device):
        advice.append("train.precision=bf16 (activations of half the size)")
    for name in ("max_seq_len", "num_latents"):
        size = getattr(model, name, None) or 1
        if size > 1:
            advice.append(f"model.{name}={size // 2} instead of {size} (another model)")
    advice.append(f"more processes (torchrun --nproc-per-node N, now {processes})")
    return f"Any of these helps: {'; '.join(advice[:3])}"
