"""Checkpoints: a file is either whole or not there."""
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from perceiver.config import Config, from_dict, to_dict
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


def resume(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks,
           tasks: dict[str, type]) -> tuple[int, float]:
    """Continues as train.resume says: fills model and optimizer; returns the step and the best validation loss so far.

    A run that starts afresh where another one lies moves that one aside: nothing saved is lost. Random generators are
    no part of a checkpoint: train.py seeds them anew at every step, from the seed in the config, the step and the rank.
    Raises UserError if the checkpoint is of another task, model, optimizer or, with train.resume=auto, other data.
    """
    folder, choice = Path(config.train.out_dir), config.train.resume
    last = folder / "checkpoints" / "last.pt"
    source = {"auto": last if last.exists() else None, "never": None}.get(choice, Path(choice))
    saved = None if source is None else load(source, ranks.device)
    if saved is not None:
        check_resumable(to_dict(from_dict(saved["config"], tasks)), to_dict(config), source, choice)
        current, old = optimizer.state_dict(), saved["optimizer"]
        for new_group, old_group in zip(current["param_groups"], old["param_groups"]):  # the config's options count
            old_group.update({name: value for name, value in new_group.items() if name not in ("params", "step")})
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(old)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{source} does not fit the model ({str(error).splitlines()[0]}); {ELSEWHERE}") from None

    ranks.any(False)  # all have looked before anything is moved
    if last.exists() and (source is None or source.resolve().parent != last.resolve().parent) and ranks.is_main:
        aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(aside)
        print(f"the earlier run in {folder} is now in {aside}", file=sys.stderr)
    return (0, float("inf")) if saved is None else (saved["step"], saved["best_loss"])


# What of a model may change from one part of a run to the next: nothing that its weights depend on.
FREE = {"cross_attention_dropout", "post_attention_dropout", "residual_dropout", "dropout", "activation_checkpointing",
        "init_scale", "init_from", "z_loss"}
ELSEWHERE = "choose another train.out_dir, or train.resume=never"


def check_resumable(old: dict, new: dict, source: Path, choice: str) -> None:
    """Raises UserError for what a run cannot be continued with: plain configs, of the checkpoint and of now."""
    if old["task"] != new["task"]:
        raise UserError(f"{source} is a checkpoint of task {old['task']}, not {new['task']}; {ELSEWHERE}")
    changed = differences(old["model"], new["model"], "model")
    changed += differences({"name": old["optim"]["name"]}, {"name": new["optim"]["name"]}, "optim")
    if changed:
        raise UserError(f"{source} does not fit: {', '.join(changed)}; {ELSEWHERE}")
    where = [{name: config["data"].get(name) for name in ("dataset", "path", "tokenizer")} for config in (old, new)]
    if choice == "auto" and (changed := differences(*where, "data")):
        raise UserError(f"{source} does not fit: {', '.join(changed)}; {ELSEWHERE}, or train.resume={source} to go on "
                        "with this data")


def differences(old: dict, new: dict, prefix: str) -> list[str]:
    """What differs in nested dicts, but for FREE keys: "section.key was A, is B"."""
    found = []
    for name in new:
        a, b = old.get(name), new[name]
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}.{name}")
        elif a != b and name not in FREE:
            found.append(f"{prefix}.{name} was {a}, is {b}")
    return found
