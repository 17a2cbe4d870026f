import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

# A run of seconds: the smallest model, a handful of steps.
TINY = ["model.max_seq_len=32", "model.num_latents=8", "model.num_channels=16", "model.num_heads=2",
        "model.num_self_attention_layers=1", "data.max_val_tokens=200", "data.batch_size=4", "train.log_every=1"]

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
    """A script of the project in a process of its own, with torchrun for several; one thread each."""
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
    import av  # optional: the tests that need no GPU have it

    with av.open(str(video)) as container:
        return container.streams.video[0].average_rate


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text of 10 kB."""
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"{n} green bottles, standing on the wall\n" for n in range(250)))
    return file
