"""Measures the cost of a training step as the context grows, with a fixed number of latents.

    python benchmarks/long_context.py [CONFIG] [section.key=value ...] [--lengths 2048 4096 ...] [--repeats 5]

CONFIG is a recipe of the copy task. By default, it is copy_4k.yaml on a CPU, and copy_131k.yaml (the paper's model) on
a GPU. The lengths replace its max_seq_len. A step is a training step of train.py on one full window: loss, backward,
optimizer. Each length runs in a process of its own.

The time is the minimum over several steps. On a GPU, it is wall-clock time. On a CPU, it is the process time of one
thread, which other load on the machine disturbs least. The memory is the peak minus the memory before the first step:
allocated memory on a GPU, resident memory on a CPU.

If a cost grows as T^e, then e is the slope of log(cost) over log(T). A part of the whole cost does not depend on T: the
layers on the latents. So the slope of the whole cost is less than e. In the difference between the costs of 2T and T,
this part cancels, and the slope is e.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from compare import machine  # noqa: E402
from perceiver.config import load_config  # noqa: E402
from perceiver.data import collate_padded  # noqa: E402
from perceiver.optim import build_optimizer  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402


def measure(config_file: str, overrides: list[str], length: int, repeats: int) -> dict[str, float]:
    """Seconds and peak memory in MiB of a training step on `length` tokens."""
    overrides = [*overrides, f"model.max_seq_len={length}", f"data.min_seq_len={length - 1}", "data.curriculum_steps=0"]
    config = load_config(config_file, overrides, TASKS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    task = TASKS[config.task](config)
    model = task.build_model().to(device).train()
    optimizer = build_optimizer(model, config.optim)
    example = task.load_data()[0][0, 0]
    batch = {name: values.to(device) for name, values in collate_padded([example]).items()}
    clock = time.perf_counter if cuda else time.process_time
    before = torch.cuda.memory_allocated() if cuda else resident()
    times = []
    for _ in range(1 + repeats):
        start = clock()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = task.loss(model, batch)["loss"]
        loss.backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        times.append(clock() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(times[1:]), "mib": (peak - before) / 2**20}


def resident() -> int:
    """Bytes of resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def slope(lengths: list[int], costs: list[float]) -> float:
    """The slope of log(cost) over log(length): a least-squares fit."""
    return np.polyfit(np.log(lengths), np.log(costs), 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "copy_131k" if torch.cuda.is_available() else "copy_4k"
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs" / f"{default}.yaml"))
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(11, 18)])
    parser.add_argument("--repeats", type=int, default=5, help="number of timed steps per length")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.worker:
        print(json.dumps(measure(args.config, args.overrides, args.lengths[0], args.repeats)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    print(f"{date.today()}, {machine(device)}, torch {torch.__version__}, {' '.join(sys.argv)}\n")
    print("| T | step, ms | us per token | memory, MiB | KiB per token |\n|---|---|---|---|---|")
    # glibc gives each large array a memory map of its own, and unmaps it when the array is freed. But each free also
    # raises the size that counts as large. With a fixed size, all large arrays leave memory: the peak is live memory.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    costs = []
    for length in args.lengths:
        command = [sys.executable, __file__, args.config, *args.overrides, "--worker", "--lengths", str(length),
                   "--repeats", str(args.repeats)]
        result = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
        cost = json.loads(result.stdout)
        costs.append((cost["seconds"], cost["mib"]))
        print(f"| {length:,} | {1e3 * costs[-1][0]:,.1f} | {1e6 * costs[-1][0] / length:.2f} | {costs[-1][1]:,.0f} | "
              f"{1024 * costs[-1][1] / length:.2f} |", flush=True)
    print("\n| cost as T^e | e of the whole cost | e of the difference from T to 2T |\n|---|---|---|")
    for name, values in zip(("time", "memory"), zip(*costs)):
        added = slope(args.lengths[:-1], np.diff(values))
        print(f"| {name} | {slope(args.lengths, values):.3f} | {added:.3f} |")


if __name__ == "__main__":
    main()
