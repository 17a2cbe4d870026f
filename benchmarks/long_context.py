"""Measures the cost of a training step and of decoding as the context grows, with a fixed number of latents.

    python benchmarks/long_context.py [CONFIG] [section.key=value ...] [--lengths 8192 16384 ...] [--repeats 3]
    python benchmarks/long_context.py --paper [--lengths 1048576]

CONFIG is a recipe of the copy task. By default, it is copy_4k.yaml on a CPU, and copy_131k.yaml (the paper's model) on
a GPU. The lengths replace its max_seq_len; the default is 8,192 to 1,048,576. A step is a training step of train.py on
one full window: loss, backward, optimizer. Decoding is a prefill of the cache with a prompt that almost fills the
context, then tokens that read the cache. Training and decoding of each length run in processes of their own.

The time is the minimum over several steps or tokens; there is one prefill. On a GPU, it is wall-clock time. On a CPU,
it is the process time of one thread, which other load on the machine disturbs least. The memory is the peak minus the
memory before the first step, or before the prefill: allocated memory on a GPU, resident memory on a CPU.

If a cost grows as T^e, then e is the slope of log(cost) over log(T). A part of the whole cost does not depend on T: the
layers on the latents. So the slope of the whole cost is less than e. In the difference between the costs of 2T and T,
this part cancels, and the slope is e.

With --paper, the script runs nothing. It computes what copy_131k.yaml's model would need at such a context.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from compare import machine  # noqa: E402
from perceiver.config import Config, load_config  # noqa: E402
from perceiver.data import collate_padded  # noqa: E402
from perceiver.decoding import Decoder, KVCache  # noqa: E402
from perceiver.optim import build_optimizer  # noqa: E402
from perceiver.speed import PEAKS, training_flops  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402
from perceiver.tasks.copy import mirrored_sequence  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MIB, GIB = 2**20, 2**30


def load(config_file: str, overrides: list[str], length: int) -> Config:
    """The config for windows of length - 1 tokens, the longest that have a label for each latent."""
    sizes = [f"model.max_seq_len={length}", f"data.min_seq_len={length - 1}", "data.curriculum_steps=0"]
    return load_config(config_file, [*overrides, *sizes], TASKS)


def training(config: Config, repeats: int) -> dict[str, float]:
    """Seconds and peak memory in MiB of a training step."""
    task = TASKS[config.task](config)
    model = task.build_model().to(DEVICE).train()
    optimizer = build_optimizer(model, config.optim)
    example = task.load_data()[0][0, 0]
    batch = {name: values.to(DEVICE) for name, values in collate_padded([example]).items()}

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            loss = task.loss(model, batch)["loss"]
        loss.backward()
        optimizer.step()

    before = reset_memory()
    times = [seconds(step) for _ in range(1 + repeats)]
    return {"step": min(times[1:]), "mib": (peak() - before) / MIB}


def decoding(config: Config, repeats: int) -> dict[str, float]:
    """Seconds of the prefill and of a token that reads the cache, and the peak memory in MiB of both."""
    task = TASKS[config.task](config)
    model = task.build_model().to(DEVICE).eval()
    stride = min(config.model.num_latents, repeats + 1)
    # With this length, the prefill moves the window. The next tokens read the cache, until the context is full.
    length = config.model.max_seq_len - stride + 1
    prompt = mirrored_sequence(config.model.max_seq_len, np.random.default_rng(0))[:length].tolist()
    newest = torch.tensor([prompt[0]], device=DEVICE)
    before = reset_memory()
    decoder = Decoder(model, [prompt], stride)
    prefill = seconds(decoder.logits)
    times = []
    for _ in range(stride - 1):
        decoder.append(newest)
        times.append(seconds(decoder.logits))
    return {"prefill": prefill, "token": min(times), "mib": (peak() - before) / MIB}


def seconds(work: Callable) -> float:
    clock = time.perf_counter if CUDA else time.process_time
    start = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def reset_memory() -> int:
    """Starts a new peak. Returns the bytes in use."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak() -> int:
    """The largest number of bytes in use since `reset_memory`."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def resident() -> int:
    """Bytes of resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def slope(lengths: list[int], costs: list[float]) -> float:
    """The slope of log(cost) over log(length): a least-squares fit."""
    return np.polyfit(np.log(lengths), np.log(costs), 1)[0]


def saved_bytes(config: Config, batch: dict[str, Tensor], bf16: bool) -> int:
    """Bytes that the forward pass of a training step saves for the backward pass, besides the parameters.

    Fake tensors have shapes but no memory. They take the kernels of a CPU. The causal mask does not count, because CUDA
    kernels need none.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        task = TASKS[config.task](config)
        model = task.build_model().train()
        batch = {name: mode.from_tensor(values) for name, values in batch.items()}
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        masks = (config.model.num_latents, batch["input_ids"].shape[1])
        saved = {}

        def save(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if x.shape[-2:] != masks and storage._cdata not in parameters:
                saved[storage._cdata] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = task.loss(model, batch)["loss"]  # while it lives, no storage takes the place of another
        del loss
    return sum(saved.values())


def cache_bytes(config: Config) -> int:
    """Bytes of the keys and values of one sequence, in float32."""
    with torch.device("meta"):
        cache = KVCache(TASKS[config.task](config).build_model(), batch_size=1)
    return sum(buffer.nbytes for buffers in (cache.cross_attention, *cache.self_attention) for buffer in buffers)


def print_paper(lengths: list[int], overrides: list[str]) -> None:
    """Prints what the model of copy_131k.yaml would need at each length."""
    rate = PEAKS["H100"][0]
    rows = []
    for length in lengths:
        config = load(ROOT / "configs/copy_131k.yaml", overrides, length)
        task = TASKS[config.task](config)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in task.build_model().parameters())
        batch = collate_padded([task.load_data()[0][0, 0]])
        flops = training_flops(task, batch)
        float32, bf16 = (saved_bytes(config, batch, bf16) for bf16 in (False, True))
        steps = config.data.batch_size * config.train.max_steps
        rows.append({
            "T": f"{length:,}",
            "parameters": f"{parameters:,}",
            "parameters, gradients, Adam's two averages, GiB": f"{16 * parameters / GIB:.2f}",
            "activations of one window, float32, GiB": f"{float32 / GIB:.1f}",
            "activations of one window, bf16, GiB": f"{bf16 / GIB:.1f}",
            "the same per token, KiB": f"{bf16 / length / 1024:.1f}",
            "key/value cache of one sequence, float32, GiB": f"{cache_bytes(config) / GIB:.2f}",
            "training FLOPs of one window": f"{flops:.3e}",
            f"seconds at {rate:.3g} FLOP/s": f"{flops / rate:.3f}",
            f"training FLOPs of a step, {config.data.batch_size:,} windows": f"{config.data.batch_size * flops:.3e}",
            f"GPU days of {config.train.max_steps:,} steps at that rate": f"{steps * flops / rate / 86_400:,.0f}",
        })
    print(f"{date.today()}, torch {torch.__version__}, {' '.join(sys.argv)}\n")
    for name in rows[0]:
        print(f"| {name} | {' | '.join(row[name] for row in rows)} |")
        if name == "T":
            print("|---|" + "---|" * len(rows))


def run(part: str, length: int, args: argparse.Namespace) -> dict[str, float]:
    """The costs of training or decoding, measured in a new process."""
    # glibc gives each large array a memory map of its own, and unmaps it when the array is freed. But each free also
    # raises the size that counts as large. With a fixed size, all large arrays leave memory: the peak is live memory.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    command = [sys.executable, __file__, args.config, *args.overrides, "--worker", part, "--lengths", str(length),
               "--repeats", str(args.repeats)]
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "copy_131k" if CUDA else "copy_4k"
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / f"{default}.yaml"))
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 8192 to 1048576; with --paper: two of them")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed steps and tokens per length")
    parser.add_argument("--paper", action="store_true", help="compute what the model of copy_131k.yaml would need")
    parser.add_argument("--worker", choices=("training", "decoding"), help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    torch.manual_seed(0)
    if args.worker:
        measure = {"training": training, "decoding": decoding}[args.worker]
        print(json.dumps(measure(load(args.config, args.overrides, args.lengths[0]), args.repeats)))
        return
    if args.paper:
        print_paper(args.lengths or [2**17, 2**20], args.overrides)
        return
    lengths = args.lengths or [2**n for n in range(13, 21)]
    torch.set_num_threads(1)
    print(f"{date.today()}, {machine(DEVICE.type)}, torch {torch.__version__}, {' '.join(sys.argv)}\n")
    print("| T | training step, ms | memory, MiB | prefill, ms | cached token, ms | memory of both, MiB |")
    print("|---|---|---|---|---|---|")
    rows = []
    for length in lengths:
        trained, decoded = run("training", length, args), run("decoding", length, args)
        rows.append((trained["step"], trained["mib"], decoded["prefill"], decoded["token"], decoded["mib"]))
        step, step_mib, prefill, token, mib = rows[-1]
        print(f"| {length:,} | {1e3 * step:,.1f} | {step_mib:,.0f} | {1e3 * prefill:,.1f} | {1e3 * token:,.2f} | "
              f"{mib:,.0f} |", flush=True)
    if len(lengths) < 3:
        return
    print("\n| cost as T^e | e of the whole cost | e of the difference from T to 2T |\n|---|---|---|")
    names = "time of a training step", "memory of it", "time of the prefill", "time of a cached token", "memory of both"
    for name, costs in zip(names, zip(*rows)):
        added = np.diff(costs)
        added_slope = f"{slope(lengths[:-1], added):.3f}" if added.min() > 0 else "not measurable"
        print(f"| {name} | {slope(lengths, costs):.3f} | {added_slope} |")


if __name__ == "__main__":
    main()
