"""Draws the losses of a run: `python docs/plot_loss.py RUN OUT.png`. Needs matplotlib, which the project does not."""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

run, out = map(Path, sys.argv[1:])
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for split, style in (("train", dict(linewidth=1)), ("val", dict(marker="o"))):
    points = [(line["step"], line["bits_per_byte"]) for line in lines if line["split"] == split]
    axes.plot(*zip(*points), label=split, **style)
axes.set(xlabel="step", ylabel="bits per byte", title=f"runs/{run.name}")
axes.grid(alpha=0.3)
axes.legend()
figure.savefig(out, dpi=110)
