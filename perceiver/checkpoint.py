"""Checkpoints of train.py: a file is either complete or absent, even if the process dies while it writes.

Each entry of the file, a zip archive, has a checksum, so `load` finds damaged bytes. The previous checkpoint is kept.
"""

import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import nn

from perceiver.config import Config, TrainConfig, from_dict, to_dict
from perceiver.distributed import Ranks
from perceiver.errors import UserError, reading, reason
from perceiver.io import load_tensors, replacing, tell
from perceiver.optim import learning_rate

BEST, LAST = "checkpoints/best.pt", "checkpoints/last.pt"  # in a run folder
PREVIOUS = "previous.pt"  # beside last.pt: the file that last.pt was before
DAMAGED = "damaged.pt"  # beside last.pt: the file that last.pt was when `read` found it damaged

# Keys of the model config that may change when a run is resumed, because the saved weights do not depend on them.
FREE = {
    "cross_attention_dropout",
    "post_attention_dropout",
    "residual_dropout",
    "dropout",
    "activation_checkpointing",
    "init_scale",
    "init_from",
    "z_loss",
}
# Keys of the data config that change no validation example
TRAINING_ONLY = {
    "batch_size",
    "num_workers",
    "max_unreadable",
    "cache_dir",
    "min_seq_len",
    "random_lengths",
    "curriculum_steps",
    "random_crop",
    "random_resized_crop",
    "flip",
    "rand_augment_layers",
    "rand_augment_magnitude",
    "mixup_alpha",
    "cutmix_alpha",
    "transpose",
    "stretch",
}
CHANGE_EXAMPLES = ["seed", "gradient_accumulation_steps"]  # keys of the train config
ADVICE = "choose another train.out_dir, or train.resume=never"


def save(checkpoint: dict, path: Path):
    """Writes a checkpoint. If that fails, raises UserError and leaves an older file at `path` as it is."""
    with saving(path) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)


def link(source: Path, path: Path):
    """Makes `path` a hard link to `source`, or a copy if the file system has no links."""
    with saving(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


class Saver:
    """Saves the checkpoints of a run in a thread, while training goes on. Only the main rank writes."""

    def __init__(self, folder: Path, is_main: bool):
        self.best = folder / BEST
        self.last = folder / LAST
        self.is_main = is_main
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.job = None

    def save(self, checkpoint: dict, improved: bool):
        """Starts to write last.pt, and best.pt if the model has improved. Raises UserError if the last save failed."""
        self.wait()
        if self.is_main:
            self.job = self.pool.submit(self.write, checkpoint, improved)

    def write(self, checkpoint: dict, improved: bool):
        save(checkpoint, self.best if improved else self.last)
        if improved:
            link(self.best, self.last)

    def wait(self):
        """Waits until the newest checkpoint is on the disk. Raises UserError if that failed."""
        if self.job is not None:
            self.job.result()


@contextmanager
def saving(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write. Then flushes it to the disk and renames it to `path`; keeps an older last.pt.

    Raises UserError if that fails. Then it leaves no half-written file on a disk that is perhaps full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_last = path.name == Path(LAST).name
        with replacing(path, partial(keep, path, path.with_name(PREVIOUS)) if is_last else None) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            path.with_name(f"{path.name}.tmp").unlink()
        raise UserError(f"cannot save {path}: {reason(error)}") from None


def keep(path: Path, other: Path):
    """Gives the file at `path`, if there is one, the name `other` too. It loses its own if links are impossible."""
    temporary = other.with_name(f"{other.name}.tmp")
    temporary.unlink(missing_ok=True)
    if not path.exists():
        return
    try:
        os.link(path, temporary)
    except OSError:  # no links: until the new file takes the name, `read` finds the other one
        path.replace(other)
    else:
        temporary.replace(other)


def load(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """A checkpoint: model, optimizer, step, best_loss, config, task. Raises UserError if it is missing or damaged."""
    if not Path(path).exists():
        raise UserError(f"checkpoint {path} does not exist")
    with reading(f"checkpoint {path}"):
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is damaged, or not a checkpoint of train.py")
        checkpoint = load_tensors(path, device)
    if not isinstance(checkpoint, dict) or not {"model", "optimizer", "step", "config"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks model, optimizer, step or config")
    return checkpoint


def read(source: Path, move_damaged: bool) -> tuple[Path, dict]:
    """The checkpoint `source` and its path. If last.pt is damaged or missing, the previous one, or else the best one.

    Prints a line then, and with `move_damaged` renames the damaged file: it must not become the previous one.
    """
    try:
        return source, load(source)
    except UserError as error:
        problem = error
    if source.name != Path(LAST).name:
        raise problem
    for other in (source.with_name(PREVIOUS), source.with_name(Path(BEST).name)):
        with suppress(UserError):
            checkpoint = load(other)
            tell(f"{problem}; using {other}, from step {checkpoint['step']}, instead")
            if move_damaged and source.exists():
                source.replace(source.with_name(DAMAGED))
            return other, checkpoint
    raise problem


def resume_source(config: TrainConfig) -> Path | None:
    """The checkpoint from which a run continues, as train.resume says. None if it starts anew."""
    last = Path(config.out_dir, LAST)
    if config.resume == "auto":
        return last if last.exists() or last.with_name(PREVIOUS).exists() else None
    return None if config.resume == "never" else Path(config.resume)


def resume(
    source: Path,
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    tasks: dict[str, type],
    owner: int = 0,
) -> tuple[int, float, bool, str]:
    """Loads `model` and `optimizer`. Returns what is known of the run, and a note for the user.

    This is the step, the best validation loss, and whether a stop signal cut off the evaluation at this step.

    The rank `owner` reads its `source` and sends it to the other ranks: they need no file.

    The optimizer keeps its options (lr, weight decay) from `config`. Raises UserError if the checkpoint is from another
    task, model or optimizer, or, with train.resume=auto, from other data. A checkpoint holds no state of random
    generators, because train.py seeds them at every step.
    """
    saved = {}
    if ranks.rank == owner:
        source, saved = read(source, move_damaged=not config.train.eval_only)
    about = {name: saved.get(name) for name in ("step", "best_loss", "must_evaluate", "config")}
    source, about = ranks.share([str(source), about], owner)
    old = from_dict(about["config"], tasks)
    check_resumable(to_dict(old), to_dict(config), source)
    options = [dict(group) for group in optimizer.param_groups]
    try:
        ranks.load(model, optimizer, saved, owner)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{source} does not fit the model ({reason(error)}); {ADVICE}") from None
    for group, values in zip(optimizer.param_groups, options):
        for name in values.keys() - {"params", "step", "lr"}:  # train.py sets `lr` at each step
            group[name] = values[name]
    step, best_loss = about["step"], about["best_loss"]
    if validation_changes(old, config):  # losses on other data do not compare
        best_loss = math.inf
    must_evaluate = bool(about["must_evaluate"]) and not config.train.eval_only
    return step, best_loss, must_evaluate, resume_note(step, old, config)


def resume_note(step: int, old: Config, new: Config) -> str:
    """The note of `resume`. It tells what changed in the config, and if the learning rate jumps because of that."""
    if new.train.eval_only:
        return f"the checkpoint is from step {step}"
    if step >= new.train.max_steps:
        return f"nothing to train: the run is at step {step}, and train.max_steps={new.train.max_steps}"
    before, now = (learning_rate(step, config.train.max_steps, config.optim) for config in (old, new))
    note = f"resumed at step {step}"
    if now != before:
        note += f"; the learning rate is now {now:.3g} instead of {before:.3g}: train.max_steps or optim changed"
    changed = differences(to_dict(old)["data"], to_dict(new)["data"], "data")
    changed += differences(to_dict(old)["train"], to_dict(new)["train"], "train", CHANGE_EXAMPLES)
    if changed:
        note += f"; {', '.join(changed)}"
    if validation_changes(old, new):
        note += "; validation losses do not compare with the earlier ones, so best.pt starts anew"
    return note


def validation_changes(old: Config, new: Config) -> bool:
    """Whether the config now describes other validation data."""
    names = [name for name in to_dict(new)["data"] if name not in TRAINING_ONLY]
    return bool(differences(to_dict(old)["data"], to_dict(new)["data"], "data", names))


def check_resumable(old: dict, new: dict, source: str | Path):
    """Raises UserError if a run with config `new` cannot continue from a checkpoint with config `old`."""
    if old["task"] != new["task"]:
        raise UserError(f"{source} is a checkpoint of task {old['task']}, not {new['task']}; {ADVICE}")
    changed = differences(old["model"], new["model"], "model")
    changed += differences(old["optim"], new["optim"], "optim", ["name"])
    if changed:
        raise UserError(f"{source} does not fit: {', '.join(changed)}; {ADVICE}")
    changed = differences(old["data"], new["data"], "data", ["dataset", "path", "tokenizer"])
    if changed and new["train"]["resume"] == "auto":
        raise UserError(
            f"{source} does not fit: {', '.join(changed)}; {ADVICE}, or train.resume={source} to continue "
            "with the new data"
        )


def differences(old: dict, new: dict, section: str, names: Iterable[str] = ()) -> list[str]:
    """The differences of two nested dicts, as "section.key was A, is B". Compares `names`; by default all but FREE."""
    changed = []
    for name in names or [name for name in new if name not in FREE]:
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            changed += differences(before, now, f"{section}.{name}")
        elif before != now:
            changed.append(f"{section}.{name} was {before}, is {now}")
    return changed


def move_aside(folder: Path, source: Path | None):
    """Renames the folder of an earlier run, so that its files are not lost, unless the new run continues it.

    `source` is the checkpoint from which the new run continues, or None.
    """
    last = folder / LAST
    goes_on = source is not None and source.resolve().parent == last.parent.resolve()
    if goes_on or not last.exists():
        return
    candidates = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
    free = next(path for path in candidates if not path.exists())
    folder.rename(free)
    tell(f"the earlier run in {folder} is now in {free}")
