"""Shorten a run's metrics.jsonl: `python docs/thin_metrics.py RUN OUT.jsonl`.

All lines of validation stay. Successive lines of training are averaged, so that about 50 remain.
"""

import argparse
import json
import math
from pathlib import Path

NUM_TRAIN_LINES = 50

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", type=Path, help="a run folder, for example runs/clm")
parser.add_argument("out", type=Path, help="the file to write, for example results/clm.jsonl")
args = parser.parse_args()


def average(lines):
    """One line with the last step, and the mean of each metric."""
    first, last = lines[0], lines[-1]
    names = [name for name in first if name not in ("step", "split")]
    means = {name: sum(line[name] for line in lines) / len(lines) for name in names}
    return {"step": last["step"], "split": last["split"]} | means


def rounded(line):
    return {name: float(f"{value:.5g}") if type(value) is float else value for name, value in line.items()}


lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
train = [line for line in lines if line["split"] == "train"]
size = math.ceil(len(train) / NUM_TRAIN_LINES)
thinned = [average(train[start : start + size]) for start in range(0, len(train), size)]
thinned += [line for line in lines if line["split"] == "val"]
thinned.sort(key=lambda line: line["step"])
args.out.parent.mkdir(parents=True, exist_ok=True)
args.out.write_text("".join(json.dumps(rounded(line)) + "\n" for line in thinned))
