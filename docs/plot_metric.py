"""Plot a metric of runs over their steps: `python docs/plot_metric.py OUT.png METRIC RUN...`.

A RUN is a run folder or a file like its metrics.jsonl, such as those in results/. Each gets a color: a thin line for
training, a line with dots for validation. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", type=Path, help="the picture to write")
parser.add_argument("metric", help="a metric in metrics.jsonl, for example loss")
parser.add_argument("runs", type=Path, nargs="+", help="run folders, for example runs/clm, or .jsonl files")
args = parser.parse_args()

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for number, run in enumerate(args.runs):
    file = run / "metrics.jsonl" if run.is_dir() else run
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if args.metric in line]
    if not lines:
        parser.error(f"{file} has no metric {args.metric}")
    for split, style in (("train", {"linewidth": 1, "alpha": 0.5}), ("val", {"marker": "o"})):
        points = [(line["step"], line[args.metric]) for line in lines if line["split"] == split]
        if points:
            axes.plot(*zip(*points), color=f"C{number}", label=f"{run.stem} {split}", **style)
axes.set(xlabel="step", ylabel=args.metric.replace("_", " "))
axes.grid(alpha=0.3)
axes.legend()
figure.savefig(args.out, dpi=110)
