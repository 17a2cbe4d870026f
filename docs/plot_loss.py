"""Plot a metric of a run over its steps: `python docs/plot_loss.py RUN OUT.png [METRIC]`.

Needs matplotlib (requirements-dev.txt).
"""
import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", type=Path, help="a run folder, for example runs/clm")
parser.add_argument("out", type=Path, help="the picture to write")
parser.add_argument("metric", nargs="?", default="loss", help="a metric in metrics.jsonl; default: %(default)s")
args = parser.parse_args()

lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
lines = [line for line in lines if args.metric in line]
if not lines:
    parser.error(f"{args.run}/metrics.jsonl has no metric {args.metric}")
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for split, style in (("train", {"linewidth": 1}), ("val", {"marker": "o"})):
    points = [(line["step"], line[args.metric]) for line in lines if line["split"] == split]
    if points:
        axes.plot(*zip(*points), label=split, **style)
axes.set(xlabel="step", ylabel=args.metric.replace("_", " "), title=f"runs/{args.run.name}")
axes.grid(alpha=0.3)
axes.legend()
figure.savefig(args.out, dpi=110)
