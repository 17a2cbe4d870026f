"""Checkpoints: a file is either whole or not there."""
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from perceiver.config import Config, to_dict
from perceiver.distributed import Ranks
from perceiver.errors import UserError


def save(checkpoint: dict, path: Path) -> None:
    """Writes beside `path`, flushes to the disk, renames: whenever the process dies, `path` is the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot save {path} ({error}); what was saved before is still there") from None


def link(source: Path, path: Path) -> None:
    """Makes `path` a second name of `source`, in one step; a copy where the file system has no links."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """A checkpoint of train.py: model, optimizer, step, config. Raises UserError if there is none or it is broken."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read ({reason}); it is damaged or not a checkpoint") from None
    if not isinstance(checkpoint, dict) or not {"model", "optimizer", "step", "config"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks model, optimizer, step or config")
    return checkpoint


def resume(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> tuple[int, float]:
    """Continues as train.resume says: fills model and optimizer; returns the step and the best validation loss so far.

    A run that starts afresh where another one lies moves that one aside: nothing saved is lost. Random generators are
    no part of a checkpoint: train.py seeds them anew at every step, from the seed in the config, the step and the rank.
    Raises UserError if the checkpoint is of another task or model.
    """
    folder, choice = Path(config.train.out_dir), config.train.resume
    last = folder / "checkpoints" / "last.pt"
    source = last if choice == "auto" else None if choice == "never" else Path(choice)
    if source != last and last.exists() and (source is None or source.parent != last.parent):
        if ranks.is_main:
            aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
            folder.rename(aside)
            print(f"the earlier run in {folder} is now in {aside}", file=sys.stderr)
    ranks.any(False)  # nobody looks for a checkpoint that is just being moved
    if source is None or (choice == "auto" and not source.exists()):
        return 0, float("inf")
    checkpoint = load(source, ranks.device)
    old, new = checkpoint["config"], to_dict(config)
    if old["task"] != new["task"]:
        raise UserError(f"{source} is a checkpoint of task {old['task']}, not {new['task']}; "
                        "choose another train.out_dir")
    changed = [key for key in new["model"] if old["model"].get(key) != new["model"][key]]
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise UserError(f"{source} does not fit the model: " + ", ".join(
            f"model.{key} was {old['model'].get(key)}, is {new['model'][key]}" for key in changed) +
            "; choose another train.out_dir, or train.resume=never") from None
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"], checkpoint["best_loss"]
