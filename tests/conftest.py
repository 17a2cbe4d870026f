import io
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from perceiver import checkpoint
from perceiver.config import from_dict, to_dict
from perceiver.tasks import TASKS

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

# Tests train in float32 on every machine, because bf16 has other losses. By default, the hardware would decide.
FLOAT32 = "train.precision=float32"
# Overrides of clm.yaml for a run of seconds: a tiny model and small batches
TINY = ["model.max_seq_len=32", "model.num_latents=8", "model.num_channels=16", "model.num_heads=2",
        "model.num_ngram_buckets=100",
        "model.num_self_attention_layers=1", "data.val_size=200", "data.batch_size=4", "train.log_every=1", FLOAT32]

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if item.get_closest_marker("network") and not online():
            item.add_marker(pytest.mark.skip(reason="no network"))


@cache
def online() -> bool:
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError:
        return False
    return True


def run_script(*args: str, processes: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """Runs a script of the project in a new process, or with torchrun in several. Each process has one thread.

    If `args` are train.py and a config, the run is in float32, unless an override names another precision.
    """
    if args[0] == "train.py" and len(args) > 1:
        args = (*args[:2], FLOAT32, *args[2:])
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900,
                          **kwargs)


def run_train(*args: str, processes: int = 1) -> subprocess.CompletedProcess:
    return run_script("train.py", "configs/clm.yaml", *TINY, *args, processes=processes)


def read_metrics(run: Path, split: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def average_rate(video: Path | str):
    """Frames per second of a video file."""
    import av  # here, not at the top: most tests run without this optional package

    with av.open(str(video)) as container:
        return container.streams.video[0].average_rate


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text file of 10 kB."""
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"{n} green bottles, standing on the wall\n" for n in range(250)))
    return file


# ----------------------------------------------------------------------------------------------------------------------
# predict.py

ENCODER = {"num_cross_attention_heads": 1, "num_self_attention_heads": 2, "num_self_attention_layers_per_block": 1}
MODEL = {"num_latents": 6, "num_latent_channels": 16, "encoder": ENCODER, "decoder": {"num_cross_attention_heads": 1}}
TEXT_INPUT = {"max_seq_len": 48, "num_input_channels": 16}


def new_checkpoint(path: Path, task_name: str, class_names: list[str] | None = None, model: dict = {}, data: dict = {},
                   ) -> tuple[Path, nn.Module]:
    """Saves a checkpoint of an untrained model with random weights. Returns its path and the model."""
    torch.manual_seed(0)
    config = from_dict({"task": task_name, "model": MODEL | model, "data": data}, TASKS)
    task = TASKS[task_name](config)
    task.class_names = class_names
    net = task.build_model().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoint.save({"model": net.state_dict(), "optimizer": {}, "step": 1, "best_loss": 1.0, "config": to_dict(config),
                     "task": task.state_dict()}, path)
    return path, net


@pytest.fixture
def predict(monkeypatch, capsys, tmp_path):
    """A function that runs predict.py in this process, because starting a new process takes longer than predicting."""
    monkeypatch.chdir(tmp_path)

    def run(ckpt, *args, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--ckpt", str(ckpt), "--device", "cpu", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "predict.py"), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)
    return run


def fails(result, *words) -> bool:
    """Asserts that predict.py ended with exit code 2 and one line that holds `words`."""
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert all(str(word) in result.err for word in words), result.err
    return True


def ranking(lines: list[str]) -> tuple[list[str], list[float]]:
    """The names and the probabilities in lines like `  12.34%  name`."""
    found = [re.fullmatch(r" +(\d+\.\d\d)%  (.+)", line) for line in lines]
    return [match[2] for match in found], [float(match[1]) / 100 for match in found]
