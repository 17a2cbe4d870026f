"""The records of a run: config.yaml, metrics.jsonl, and TensorBoard events."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from perceiver.errors import UserError, reason
from perceiver.io import replacing, say


class RunLog:
    """Writes the config at once, then metrics, texts, pictures and sounds by step.

    A run that resumes at `step` first deletes the records of later steps, because it will write them again.
    """

    def __init__(self, folder: Path, step: int, config: str):
        self.folder = folder
        threading.excepthook = ignore_full_disk
        path = folder / "metrics.jsonl"
        with self.writing():
            (folder / "config.yaml").write_text(config)
            if path.exists():
                lines = path.read_text().splitlines(keepends=True)
                with replacing(path) as temporary:
                    temporary.write_text("".join(line for line in lines if is_before(line, step)))
            self.file = open(path, "a", buffering=1)  # line by line
            self.writer = SummaryWriter(folder, purge_step=step + 1)
            self.writer.add_text("config", as_code(config))

    def metrics(self, step: int, split: str, metrics: dict[str, float]):
        with self.writing():
            self.file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
            for name, value in metrics.items():
                self.writer.add_scalar(f"{split}/{name}", value, step)

    def visuals(self, step: int, visuals: dict[str, str | Tensor | tuple[Tensor, int]]):
        """Logs texts and prints them, pictures (3, H, W) of uint8, and sounds (S, 1) with their sample rate."""
        with self.writing():
            for name, value in visuals.items():
                if isinstance(value, str):
                    say(f"----- {name}", value, "-----")
                    self.writer.add_text(name, as_code(value), step)
                elif isinstance(value, tuple):
                    sound, sample_rate = value
                    self.writer.add_audio(name, sound.T, step, sample_rate)
                else:
                    self.writer.add_image(name, value, step)
            self.writer.flush()

    def close(self):
        with self.writing():
            self.file.close()
            self.writer.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an error of the disk in the block into a UserError, which names the folder."""
        try:
            yield
        except BrokenPipeError:  # the reader of stdout closed it
            raise
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {reason(error)}; checkpoints are unchanged") from None


def ignore_full_disk(failure: threading.ExceptHookArgs):
    """Hides the traceback if TensorBoard's thread cannot write: `RunLog.writing` meets the same error."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def format_metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def is_before(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is complete and belongs to `step` or an earlier step."""
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # the line was cut off when the run was killed
        return False


def as_code(text: str) -> str:
    """Markdown that shows `text` unchanged, as a code block."""
    return "    " + text.replace("\n", "\n    ")
