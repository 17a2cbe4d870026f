"""Evaluate a trained model: `python -m perceiver.evaluate --ckpt runs/reviews data.path=other.csv`.

Prints all metrics of the validation set, or with data.eval_split=test of the test files. A classifier also gets a
picture of its confusion matrix. The keys data.* and train.* may change; the model is that of the checkpoint.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from perceiver import pictures
from perceiver.config import from_dict, set_value, to_dict
from perceiver.data import eval_loader
from perceiver.distributed import Ranks, add, find_device, to_floats, uses_bf16
from perceiver.errors import UserError, explaining_memory, run_script
from perceiver.io import check_counts, save_picture, say, shorten, tell
from perceiver.pretrained import VARIANTS, load_model
from perceiver.tasks import TASKS, Task
from perceiver.tasks.classification import Classification


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perceiver.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="a run folder or checkpoint of train.py, or published weights")
    parser.add_argument("overrides", nargs="*", metavar="data.KEY=VALUE", help="the data, if not that of the run")
    parser.add_argument("--limit", metavar="N", type=int, help="evaluate N examples, evenly spread; default: all")
    parser.add_argument("--out", help="folder for the confusion matrix of a classifier; default: the folder of the run")
    parser.add_argument("--json", action="store_true", help="print the metrics as one line of JSON")
    parser.add_argument("--variant", default=VARIANTS[0], choices=VARIANTS, help="as in predict.py")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    return parser.parse_args(arguments)


def changed_task(task: Task, overrides: list[str]) -> Task:
    """The task with `overrides` of its config, and with the state of its checkpoint."""
    values = to_dict(task.config)
    for override in overrides:
        if not override.startswith(("data.", "train.")):
            raise UserError(f"override {override!r}: evaluation can change only data.KEY=VALUE and train.KEY=VALUE")
        set_value(values, override)
    new = TASKS[task.name](from_dict(values, TASKS))
    new.load_state_dict(task.state_dict())
    return new


@torch.inference_mode()
def evaluate(task: Task, model: nn.Module, examples: Dataset, device: torch.device) -> dict[str, float]:
    """The metrics of a dataset."""
    config = task.config
    batch_size = max(1, config.data.batch_size // config.train.gradient_accumulation_steps)
    totals = {}
    loader = eval_loader(examples, batch_size, Ranks(0, 1, device), config.data.num_workers)
    bf16 = uses_bf16(config.train.precision, device)
    for batch in tqdm(loader, unit=" batches"):
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            add(totals, task.count_loss(model, batch))
    return task.all_metrics(to_floats(totals))


def main(args: argparse.Namespace):
    check_counts(args, "limit")
    device = find_device(args.device)
    trained, model = load_model(args.ckpt, device, args.variant)
    task = changed_task(trained, args.overrides)
    known = trained.class_names
    _, examples = task.load_data()
    if task.data_note:
        tell(task.data_note)
    if known and known != task.class_names:
        tell(f"the model knows the classes as {shorten(', '.join(known))}; they are matched by their order")
    is_classifier = isinstance(task, Classification)
    if is_classifier:
        num_classes = task.config.model.num_classes
        task.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
    part = examples
    if args.limit is not None and args.limit < len(examples):
        part = Subset(examples, [index * len(examples) // args.limit for index in range(args.limit)])
        tell(f"--limit {args.limit}: of {len(examples)} examples")
    with explaining_memory("A smaller data.batch_size needs less memory, and --device cpu none of the GPU"):
        metrics = evaluate(task, model, part, device)

    if args.json:
        confusion = {"confusion": task.confusion.tolist(), "classes": task.class_names} if is_classifier else {}
        say(json.dumps({"examples": len(part)} | metrics | confusion))
    else:
        say(f"{len(part)} examples", *(f"  {name:16} {value:.5g}" for name, value in metrics.items()))
        summary = task.summary(metrics) if part is examples else None
        if summary:
            say(summary)
    if is_classifier:
        run = Path(args.ckpt) if Path(args.ckpt).is_dir() else Path("predictions")
        names = task.class_names or [f"class {label}" for label in range(num_classes)]
        picture = pictures.confusion_matrix(task.confusion.cpu(), names)
        save_picture(picture, Path(args.out or run) / "confusion.png")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
