"""Kills training at random moments, fills its disk, damages its checkpoints, and compares the weights in the end.

    PYTHONPATH=. python benchmarks/faults.py [--faults 300] [--seed 0]

Each run trains a tiny Perceiver AR for 24 steps, with dropout, two micro-batches a step, a checkpoint every second step
and an evaluation every sixth. It meets up to 6 faults, is started again after each, and ends like the run without
faults: weights, optimizer, best.pt and all losses in metrics.jsonl, bit for bit. After each fault, last.pt or the
checkpoint before it must load. The runs are forked from a process that has imported everything.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import train
from perceiver import checkpoint
from perceiver.errors import UserError, run_script

ROOT = Path(__file__).parents[1]
MAX_STEPS = 24
CONFIG = [
    "model.max_seq_len=32",
    "model.num_latents=8",
    "model.num_channels=16",
    "model.num_heads=2",
    "model.num_ngram_buckets=100",
    "model.num_self_attention_layers=1",
    "model.cross_attention_dropout=0.5",
    "model.residual_dropout=0.1",
    "data.val_size=1000",
    "data.batch_size=8",
    "train.gradient_accumulation_steps=2",
    "train.precision=float32",
    "train.device=cpu",
    f"train.max_steps={MAX_STEPS}",
    "train.log_every=1",
    "train.save_every=2",
    "train.eval_every=6",
]
KILLS = ["kill -9", "SIGTERM"]
MOMENTS = ["at any moment", "at any moment", "while saving"]
DAMAGES = ["a bit of last.pt flipped", "last.pt cut off", "4096 bytes of last.pt zeroed"]
OTHERS = ["disk full", *DAMAGES]
STOPPED = 128 + signal.SIGTERM


class Faults:
    """Runs in one folder, faults in them, and what they did."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.rng = random.Random(seed)
        self.counts = Counter()
        self.text = folder / "corpus.txt"
        self.text.write_text("".join(f"{n} green bottles, standing on the wall\n" for n in range(250)))
        start = time.perf_counter()
        self.whole = folder / "whole"
        assert finish(self.start(self.whole)) == 0, self.output(self.whole)
        self.seconds = time.perf_counter() - start

    def start(self, run: Path, max_bytes: int | None = None) -> multiprocessing.Process:
        """Starts or continues a run. With `max_bytes`, it cannot write larger files, as on a full disk."""
        run.mkdir(exist_ok=True)
        arguments = [*CONFIG, f"data.path={self.text}", f"train.out_dir={run / 'run'}"]
        return start(arguments, run / "output.txt", max_bytes)

    def output(self, run: Path) -> str:
        return (run / "output.txt").read_text(errors="replace")

    def run_with_faults(self, run: Path, num_faults: int) -> bool:
        """Trains to the end through `num_faults` faults, or fewer if it ends before. Returns whether it ends right."""
        for _ in range(num_faults):
            if self.rng.random() < 0.7:
                ended = self.kill(run, self.rng.choice(KILLS), self.rng.choice(MOMENTS))
            else:
                ended = self.other(run, self.rng.choice(OTHERS))
            if ended:
                break
        code = finish(self.start(run))
        if code != 0:
            print(f"{run}: exit code {code}\n{self.output(run)}")
            return False
        wrong = list(differences(run / "run", self.whole / "run"))
        if wrong:
            print(f"{run}: other {', '.join(wrong)}")
        return not wrong

    def kill(self, run: Path, kind: str, moment: str, save: int = 0) -> bool:
        """Kills the run; "while saving": at checkpoint `save`, or at one of the first 4. Returns whether it ended."""
        process = self.start(run)
        if moment == "while saving":
            wait_for_save(run / "run/checkpoints", process, save or self.rng.randint(1, 4))
            time.sleep(self.rng.random() * 0.003)
        else:
            time.sleep(self.rng.random() * self.seconds)
        if kind == "kill -9":
            process.kill()
        else:
            process.terminate()  # SIGTERM
        code = finish(process)
        if code == 0:
            return True
        # A signal before the loop starts, or after it, ends the process at once: nothing was to be saved
        assert code in (-signal.SIGKILL, -signal.SIGTERM, STOPPED), self.output(run)
        self.check(run / "run")
        self.counts[f"{kind} {moment}"] += 1
        return False

    def other(self, run: Path, kind: str) -> bool:
        """Fills the disk for the next start, or damages the newest checkpoint. Returns whether the run has ended."""
        last = run / "run" / checkpoint.LAST
        previous = last.with_name(checkpoint.PREVIOUS)
        # A kill between two renames leaves one file with both names. To damage it would be two faults at once.
        if not last.exists() or not previous.exists() or previous.samefile(last):
            return False
        if kind == "disk full":
            step = self.check(run / "run")
            size = (self.whole / "run" / checkpoint.LAST).stat().st_size
            code = finish(self.start(run, self.rng.randrange(10_000, size)))
            if code == 0:
                return True
            error = self.output(run).rpartition("error: ")[2]
            assert code == 2 and error.count("\n") == 1 and "Traceback" not in self.output(run), self.output(run)
            assert self.check(run / "run") >= step
        else:
            damage(last, kind, self.rng)
        self.check(run / "run")
        self.counts[kind] += 1
        return False

    def check(self, run: Path) -> int:
        """The step from which a run would continue. Raises UserError if its checkpoints cannot be read."""
        last = run / checkpoint.LAST
        previous = last.with_name(checkpoint.PREVIOUS)
        if not previous.exists():
            return checkpoint.load(last)["step"] if last.exists() else 0
        try:
            return checkpoint.load(last)["step"]
        except UserError:
            return checkpoint.load(previous)["step"]


def start(arguments: list[str], output: Path, max_bytes: int | None = None) -> multiprocessing.Process:
    """Forks a process that runs train.py on clm.yaml with overrides. Its stdout and stderr go to the file `output`."""
    process = multiprocessing.get_context("fork").Process(target=run_train, args=(arguments, output, max_bytes))
    process.start()
    return process


def run_train(arguments: list[str], output: Path, max_bytes: int | None):
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    if max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    torch.set_num_threads(1)
    sys.argv = ["train.py", str(ROOT / "configs/clm.yaml"), *arguments]
    run_script(train.main)


def finish(process: multiprocessing.Process) -> int:
    process.join(300)
    return process.exitcode


def wait_for_save(folder: Path, process: multiprocessing.Process, number: int):
    """Waits until the process writes its checkpoint `number` (1, 2, ...), or until it ends."""
    saving = False
    while number and process.is_alive():
        was_saving = saving
        saving = any((folder / f"{name}.pt.tmp").exists() for name in ("last", "best", "previous"))
        number -= saving and not was_saving


def damage(path: Path, kind: str, rng: random.Random):
    """Changes the bytes of a file as `kind` says. They change in best.pt too, if it is a hard link to the file."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if kind == DAMAGES[0]:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == DAMAGES[1]:
        del data[place:]
    else:
        data[place : place + 4096] = bytes(len(data[place : place + 4096]))
    path.write_bytes(data)


def differences(run: Path, whole: Path) -> Iterator[str]:
    """What differs between two runs that ended."""
    for name in (checkpoint.LAST, checkpoint.BEST):
        ours, theirs = (checkpoint.load(folder / name) for folder in (run, whole))
        for key in ("model", "optimizer", "step", "best_loss"):
            if not same(ours[key], theirs[key]):
                yield f"{key} in {name}"
    if losses(run) != losses(whole):
        yield "losses in metrics.jsonl"


def same(a, b) -> bool:
    """Whether two nested dicts and lists hold the same numbers and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["loss"]) for line in lines]


def flips(path: Path, count: int, rng: random.Random) -> tuple[int, int]:
    """Flips one bit in each of `count` copies of a checkpoint: how many are refused, and how many load unchanged.

    Raises AssertionError if one loads with other values.
    """
    whole, copy = checkpoint.load(path), path.with_name("flipped.pt")
    refused = 0
    for _ in range(count):
        copy.write_bytes(path.read_bytes())
        damage(copy, DAMAGES[0], rng)
        try:
            assert same(checkpoint.load(copy), whole)
        except UserError:
            refused += 1
    return refused, count - refused


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=300, help="number of faults (300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (0)")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), args.seed)
        runs = right = 0
        while faults.counts.total() < args.faults:
            missing = args.faults - faults.counts.total()
            right += faults.run_with_faults(Path(folder, str(runs)), min(6, missing))
            runs += 1
        refused, harmless = flips(faults.whole / "run" / checkpoint.LAST, 10 * args.faults, faults.rng)
    print("| fault | times |\n|---|---|")
    for kind, times in sorted(faults.counts.items()):
        print(f"| {kind} | {times} |")
    print(f"| together | {faults.counts.total()} |")
    print(f"\n{right} of {runs} runs ended like the run without faults, bit for bit.")
    print(f"Of {refused + harmless} copies of a checkpoint with one flipped bit, {refused} were refused; the others")
    print("loaded with the same values: their bit is in a part of the file that holds none.")
    print(f"{time.perf_counter() - start:.0f} seconds")
    return 0 if right == runs else 1


if __name__ == "__main__":
    sys.exit(main())
