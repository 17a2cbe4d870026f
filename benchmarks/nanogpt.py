"""Trains our Perceiver AR and nanoGPT's Transformer on the same text, one after the other, and prints two tables.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT && git -C /tmp/nanoGPT checkout 3adf61e
    python benchmarks/nanogpt.py --nanogpt /tmp/nanoGPT --data input.txt [--run "900" ...] [section.key=value ...]

The text is tinyshakespeare: the file that nanoGPT's data/shakespeare_char/prepare.py downloads. nanoGPT's side is the
CPU recipe of its README, run by its own train.py. Our side is train.py with configs/shakespeare.yaml, one run for each
--run: the number of steps, then overrides. By default, there are two:

    "350 model.max_seq_len=128"    T = N: no prefix. It learns from contexts of 1 to 128 characters
    "900"                          T = 256, N = 128. It learns from contexts of 129 to 256 characters

The schedule of the learning rate is as long as the run. Both sides compute in float32. Our vocabulary is all bytes and
six special tokens, 262 tokens; nanoGPT's is the 65 characters of the text.

The losses are in nats per character, over all characters of the last tenth of the text but its first. The script
measures them itself, on 10 checkpoints of each run, in two ways:

    blocks   consecutive blocks of 64 characters. Each character is predicted from those before it in its block, on
             average half a block. This is how nanoGPT measures: its own numbers are means over random blocks.
    context  each character is predicted from at least the last half of the context that the model takes: 33 to 64
             characters for nanoGPT, and T - n + 1 to T for ours, with n = min(N, T / 2).

Both sides get the same blocks. That is fair to nanoGPT and to our first run. It is hard on our second run, which never
saw so short a context in training. Only `context` shows what a longer context is worth.

Seconds are wall-clock time of training alone: without start-up, evaluation and checkpoints. Ours are the times of
metrics.jsonl. nanoGPT logs the time of each iteration. An iteration after an evaluation includes it, so it counts as
the median iteration. Losses between two checkpoints are interpolated.
"""

import argparse
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from compare import machine, raise_error  # noqa: E402
from perceiver.data import IGNORE, ByteTokenizer, TextBlocks, Tokens  # noqa: E402
from perceiver.errors import UserError, reading, run_script  # noqa: E402
from perceiver.pretrained import load_model  # noqa: E402

COMMIT = "3adf61e154c3fe3fca428ad6bc3818b27a3b8291"
RECIPE = (  # of nanoGPT's README, "I only have a macbook"
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
BLOCK = 64  # characters of nanoGPT's context
BATCH = 12  # its windows in an iteration
ITERATIONS = 2000
RUNS = ["350 model.max_seq_len=128", "900"]  # ours
CHECKPOINTS = 10  # of each run


@dataclass
class Point:
    """A checkpoint."""

    step: int
    seconds: float  # of training, until then
    losses: tuple[float, float]  # nats per character: blocks, context


@dataclass
class Run:
    name: str
    parameters: int
    characters: int  # predicted in training
    whole: float  # seconds of the whole process
    points: list[Point]


# ----------------------------------------------------------------------------------------------------------------------
# Losses

Predict = Callable[[Tensor, int], Tensor]  # ids (B, L) and n -> logits (B, n, V) of the tokens after the last n ids


@torch.inference_mode()
def mean_loss(predict: Predict, tokens: Tokens, context: int, num_predicted: int, batch_size=32) -> float:
    """The mean loss in nats of all tokens but the first.

    Each window has up to `context` ids, and predicts the tokens after its last `num_predicted` ids.
    """
    blocks = TextBlocks(tokens, context, num_predicted)
    windows = [without_padding(blocks[index]) for index in range(len(blocks))]
    batches = groupby(enumerate(windows), lambda item: (item[0] // batch_size, len(item[1][0]), len(item[1][1])))
    total = 0.0
    for _, batch in batches:
        ids, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*[window for _, window in batch]))
        logits = predict(ids, labels.shape[1])
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    return total / (len(tokens) - 1)


def without_padding(example) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the labels of an example of `TextBlocks`."""
    labels = example["labels"]
    return example["input_ids"][~example["pad_mask"]], labels[labels != IGNORE]


def losses(predict: Predict, tokens: Tokens, context: int, num_predicted: int) -> tuple[float, float]:
    """The two losses of a model: on blocks, and with its context."""
    return mean_loss(predict, tokens, BLOCK, BLOCK), mean_loss(predict, tokens, context, num_predicted)


def crossing(points: list[Point], which: int, target: float) -> float | None:
    """The seconds until loss number `which` is at most `target`. None if it never is."""
    for before, point in zip([None, *points], points):
        loss = point.losses[which]
        if loss > target:
            continue
        if before is None:
            return point.seconds
        last = before.losses[which]
        return before.seconds + (last - target) / (last - loss) * (point.seconds - before.seconds)
    return None


def loss_at(points: list[Point], which: int, seconds: float) -> float | None:
    """Loss number `which` after so many seconds. A run that has ended keeps its last loss. None before a checkpoint."""
    if seconds < points[0].seconds:
        return None
    return float(np.interp(seconds, [p.seconds for p in points], [p.losses[which] for p in points]))


# ----------------------------------------------------------------------------------------------------------------------
# The two sides


def run(command: list[str], cwd: Path, checkpoint: Path, folder: Path) -> float:
    """Runs a training and copies each version of its checkpoint to `folder`. Returns the seconds of the process.

    `folder`/log gets what the process prints.
    """
    folder.mkdir()
    start, copied = time.perf_counter(), None
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
        ended = False
        while not ended:
            time.sleep(0.1)
            ended = process.poll() is not None
            written = checkpoint.stat().st_mtime if checkpoint.exists() else None
            complete = written and (ended or time.time() - written > 0.5)  # nanoGPT writes in place
            if complete and written != copied:
                shutil.copyfile(checkpoint, folder / f"{written}.pt")
                copied = written
    seconds = time.perf_counter() - start
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed: {last_line((folder / 'log').read_text())}")
    return seconds


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def ours(name: str, config: str, overrides: list[str], text: Path, folder: Path) -> Run:
    """A run of train.py. `name` is the number of steps, and overrides."""
    steps, own_overrides = parse_run(name)
    overrides = overrides + own_overrides
    every = max(1, steps // CHECKPOINTS)
    out = folder / "run"
    command = [sys.executable, str(ROOT / "train.py"), config, f"data.path={text}", "data.val_fraction=0.1"]
    command += ["train.precision=float32", *overrides, f"train.out_dir={out}", f"train.max_steps={steps}"]
    command += [f"train.log_every={every}", f"train.save_every={every}", f"train.eval_every={steps}"]
    whole = run(command, ROOT, out / "checkpoints/last.pt", folder / "ours")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = encode(validation(text.read_bytes()))
    points = []
    for file in sorted((folder / "ours").glob("*.pt")):
        step = torch.load(file, weights_only=True)["step"]
        task, model = load_model(file)
        c = task.config.model
        if c.num_latents < BLOCK:
            raise UserError(f"model.num_latents={c.num_latents} must be at least {BLOCK}, the block of nanoGPT")
        per_step = task.config.data.batch_size * c.num_latents
        seconds = our_seconds(lines, per_step)[step]
        n = min(c.num_latents, c.max_seq_len // 2)
        points.append(Point(step, seconds, losses(model, tokens, c.max_seq_len, n)))
    parameters = sum(p.numel() for p in model.parameters())
    return Run(f"ours, {name}", parameters, steps * per_step, whole, points)


def parse_run(text: str) -> tuple[int, list[str]]:
    """The number of steps and the overrides of a --run, like "350 model.max_seq_len=128"."""
    steps, *overrides = text.split() or [""]
    if not steps.isdecimal() or int(steps) < 1:
        raise UserError(f'--run "{text}" must begin with a number of steps, like "350 model.max_seq_len=128"')
    return int(steps), overrides


def our_seconds(lines: list[dict], per_step: int) -> dict[int, float]:
    """The seconds of training until each step in metrics.jsonl. A step predicts `per_step` characters."""
    seconds, total, last = {}, 0.0, 0
    for line in lines:
        if line["split"] == "train":
            total += (line["step"] - last) * per_step / line["tokens_per_s"]
            last = line["step"]
            seconds[last] = total
    return seconds


def theirs(nanogpt: Path, iterations: int, text: Path, folder: Path) -> Run:
    """A run of nanoGPT's train.py with its CPU recipe."""
    every = max(1, iterations // CHECKPOINTS)
    characters = write_dataset(text, folder / "characters")
    command = [sys.executable, "-u", "train.py", *RECIPE.split(), f"--dataset={folder / 'characters'}"]
    command += [f"--out_dir={folder / 'out'}", f"--eval_interval={every}", "--always_save_checkpoint=True"]
    if iterations != ITERATIONS:
        command += [f"--max_iters={iterations}", f"--lr_decay_iters={iterations}"]
    whole = run(command, nanogpt, folder / "out/ckpt.pt", folder / "theirs")
    seconds = their_seconds((folder / "theirs/log").read_text(), every)
    model_file = import_model(nanogpt)
    tokens = encode(validation(text.read_bytes()), characters)
    points = []
    for file in sorted((folder / "theirs").glob("*.pt")):
        saved = torch.load(file)
        model = model_file.GPT(model_file.GPTConfig(**saved["model_args"])).eval()
        model.load_state_dict(saved["model"])
        step = saved["iter_num"]
        points.append(Point(step, seconds[step], losses(predict_with(model), tokens, BLOCK, BLOCK // 2)))
    parameters = sum(p.numel() for p in model.parameters())
    return Run(f"nanoGPT, {iterations} iterations", parameters, iterations * BATCH * BLOCK, whole, points)


def their_seconds(log: str, every: int) -> dict[int, float]:
    """The seconds of training until each iteration of nanoGPT's log. Each `every`-th iteration evaluates first."""
    times = [float(time) / 1e3 for time in re.findall(r"^iter \d+: .* time ([\d.]+)ms", log, re.M)]
    typical = median(times)
    alone = [typical if number % every == 0 else time for number, time in enumerate(times)]
    return dict(enumerate(np.cumsum([0.0, *alone]).tolist()))


def predict_with(gpt) -> Predict:
    """nanoGPT's model computes the logits of all positions only if it gets targets; here they are any numbers."""
    return lambda ids, n: gpt(ids, ids)[0][:, -n:]


def import_model(nanogpt: Path) -> ModuleType:
    """nanoGPT's model.py."""
    spec = spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    module = sys.modules["nanogpt_model"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_dataset(text: Path, folder: Path) -> bytes:
    """Writes the three files that nanoGPT's train.py reads. Returns the characters, in the order of their numbers."""
    data = text.read_bytes()
    characters = bytes(sorted(set(data)))
    ids = encode(data, characters).values
    folder.mkdir()
    split = len(data) - len(validation(data))
    ids[:split].tofile(folder / "train.bin")
    ids[split:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    return characters


def encode(data: bytes, characters: bytes | None = None) -> Tokens:
    """The ids of nanoGPT, places in `characters`; without them the ids of ours."""
    values = np.frombuffer(data, np.uint8)
    if characters is None:
        return Tokens(values, ByteTokenizer.OFFSET)
    numbers = np.zeros(256, np.uint16)
    numbers[list(characters)] = np.arange(len(characters))
    return Tokens(numbers[values])


def validation(data: bytes) -> bytes:
    """The last tenth: the split of nanoGPT, and of ours with data.val_fraction=0.1."""
    return data[int(len(data) * 0.9) :]


# ----------------------------------------------------------------------------------------------------------------------
# Tables, arguments


def table(runs: list[Run], target: float) -> str:
    lines = [
        f"| run | parameters | characters trained on | training, s | whole process, s | seconds to {target}: blocks | "
        "context | loss at the end: blocks | context |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        end = run.points[-1]
        reached = [number(crossing(run.points, which, target), 1) or "not reached" for which in (0, 1)]
        final = [number(loss, 3) for loss in end.losses]
        cells = [run.name, f"{run.parameters:,}", f"{run.characters:,}", number(end.seconds, 1), number(run.whole, 1)]
        lines.append(f"| {' | '.join(cells + reached + final)} |")
    return "\n".join(lines)


def curves(runs: list[Run]) -> str:
    """The losses of all runs after the same seconds: ten times, the last of them the end of nanoGPT's run."""
    names = [f"{run.name}: blocks | context" for run in runs]
    lines = [f"| seconds | {' | '.join(names)} |", "|---|" + 2 * len(runs) * "---|"]
    end = runs[-1].points[-1].seconds
    for seconds in np.linspace(end / 10, end, 10):
        cells = [number(loss_at(run.points, which, seconds), 3) for run in runs for which in (0, 1)]
        lines.append(f"| {seconds:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def check_nanogpt(folder: Path) -> None:
    """Raises UserError if `folder` is no checkout of nanoGPT."""
    if not (folder / "model.py").is_file() or not (folder / "config/train_shakespeare_char.py").is_file():
        raise UserError(
            f"--nanogpt {folder} is no checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT {folder} && "
            f"git -C {folder} checkout {COMMIT[:7]}"
        )


def check_text(file: Path) -> None:
    """Raises UserError if nanoGPT's characters would not be our bytes."""
    with reading(f"--data {file}"):
        data = file.read_bytes()
    if not data.isascii():
        raise UserError(f"--data {file} is not ASCII: a character would not be a byte")


def version(folder: Path) -> str:
    """The commit of a checkout, with -dirty if it is changed."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "of unknown version"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: run_script(lambda: raise_error(message))
    parser.add_argument("overrides", nargs="*", help="section.key=value, for our side")
    parser.add_argument("--config", default=str(ROOT / "configs/shakespeare.yaml"), help="of our side")
    parser.add_argument("--nanogpt", type=Path, default=Path("/tmp/nanoGPT"), help="a checkout; default: /tmp/nanoGPT")
    parser.add_argument("--data", type=Path, default=Path("input.txt"), help="the text; default: input.txt")
    parser.add_argument("--run", action="append", dest="runs", help="one of our runs: steps, then overrides")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of nanoGPT; fewer only to try this script")
    parser.add_argument("--target", type=float, default=1.88, help="loss in nats per character")
    args = parser.parse_intermixed_args()
    check_nanogpt(args.nanogpt)
    check_text(args.data)
    names = args.runs or RUNS
    for name in names:
        parse_run(name)
    text = args.data.resolve()
    print(f"{date.today()}, {machine('cpu')}, torch {torch.__version__}, nanoGPT {version(args.nanogpt)}")
    print(f"\n    python {shlex.join(sys.argv)}\n", flush=True)
    runs = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(ours(name, args.config, args.overrides, text, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        runs.append(theirs(args.nanogpt.resolve(), args.iterations, text, Path(folder)))
    print(f"{table(runs, args.target)}\n\n{curves(runs)}")


if __name__ == "__main__":
    run_script(main)
