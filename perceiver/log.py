"""What a run leaves to read: metrics.jsonl and TensorBoard events."""
import json
import os
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Metrics and things to look at, by step, and the config. Lines that an interrupted run wrote after its last
    checkpoint, at `step`, are taken back, since it will write them again."""

    def __init__(self, folder: Path, step: int, config: str):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if written_by(line, step)]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self.path)
        self.file = open(self.path, "a", buffering=1)
        self.writer = SummaryWriter(folder, purge_step=step + 1)
        self.writer.add_text("config", as_code(config))

    def metrics(self, step: int, split: str, metrics: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def show(self, step: int, things: dict[str, str | Tensor | tuple[Tensor, int]]) -> None:
        """Texts, which are printed too, pictures (3, H, W) of uint8, and sounds (S, 1) with their sample rate."""
        for name, thing in things.items():
            if isinstance(thing, str):
                print(f"----- {name}", thing, "-----", sep="\n")
                self.writer.add_text(name, as_code(thing), step)
            elif isinstance(thing, tuple):
                self.writer.add_audio(name, thing[0].T, step, sample_rate=thing[1])
            else:
                self.writer.add_image(name, thing, step)
        self.writer.flush()

    def close(self) -> None:
        self.file.close()
        self.writer.close()


def written_by(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):  # cut off when the run was killed
        return False


def as_code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "    " + text.replace("\n", "\n    ")
