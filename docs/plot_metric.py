"""Plot a metric of runs: `python docs/plot_metric.py OUT.png METRIC RUN... [--against all]`.

A RUN is a run folder or a file like its metrics.jsonl, such as those in results/. Each gets a color: a thin line for
training, a line with dots for validation. `--against all` compares runs against their steps, their training data and
their training time, which a run folder's config.yaml tells together with the logged speed. Needs matplotlib
(requirements-dev.txt).
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import yaml

AXES = {"step": "step", "data": "training examples", "time": "minutes of training, without evaluation"}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", type=Path, help="the picture to write")
parser.add_argument("metric", help="a metric in metrics.jsonl, for example loss")
parser.add_argument("runs", type=Path, nargs="+", help="run folders, for example runs/clm, or .jsonl files")
parser.add_argument("--against", choices=(*AXES, "all"), default="step", help="the horizontal axis; default: step")
args = parser.parse_args()
shown = list(AXES) if args.against == "all" else [args.against]


def read_run(run):
    """The lines of metrics.jsonl. If a plot needs them, each has `data` and `time` too."""
    file = run / "metrics.jsonl" if run.is_dir() else run
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if not any(args.metric in line for line in lines):
        parser.error(f"{file} has no metric {args.metric}")
    if shown != ["step"]:
        add_data_and_time(lines, file.with_name("config.yaml"))
    return lines


def add_data_and_time(lines, config_file):
    if not config_file.exists():
        parser.error(f"--against {args.against} needs a run folder: {config_file} does not exist")
    config = yaml.safe_load(config_file.read_text())
    batch_size = config["data"]["batch_size"]
    per_step = {"samples_per_s": batch_size}
    if "num_heads" in config["model"]:  # a Perceiver AR, which predicts a token at each latent
        per_step["tokens_per_s"] = batch_size * config["model"]["num_latents"]
        AXES["data"] = "predicted tokens"
    step = minutes = 0
    for line in lines:
        for rate in per_step.keys() & line.keys():
            minutes += (line["step"] - step) * per_step[rate] / line[rate] / 60
            step = line["step"]
        line["time"] = minutes
        line["data"] = line["step"] * max(per_step.values())


runs = {run: read_run(run) for run in args.runs}
figure, panels = plt.subplots(1, len(shown), figsize=(7 * len(shown), 3.5), layout="constrained", squeeze=False)
for axes, name in zip(panels[0], shown):
    for number, (run, lines) in enumerate(runs.items()):
        for split, style in (("train", {"linewidth": 1, "alpha": 0.5}), ("val", {"marker": "o"})):
            found = [line for line in lines if line["split"] == split and args.metric in line]
            points = [(line[name], line[args.metric]) for line in found]
            if points:
                axes.plot(*zip(*points), color=f"C{number}", label=f"{run.stem} {split}", **style)
    axes.set(xlabel=AXES[name], ylabel=args.metric.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
figure.savefig(args.out, dpi=110)
