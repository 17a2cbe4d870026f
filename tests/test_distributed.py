"""Several processes on a CPU, with gloo: DDP, FSDP, several hosts, mistakes. many_runs.py saves starts of torchrun."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, TINY, read_metrics, run_script, run_train
from digits import write_digits
from perceiver import checkpoint
from perceiver.distributed import Ranks

CPU = torch.device("cpu")
LOG = ["train.log_every=1", "train.precision=float32", "train.resume=never"]
FSDP = "train.parallel=fsdp"
CLM = ["model.num_self_attention_layers=2", "model.cross_attention_dropout=0.5", "model.activation_checkpointing=true",
       "optim.decay_steps=20", "train.eval_every=20", "train.max_steps=20"]
OPTIMIZERS = ("adamw", "adam", "sgd", "lamb")
# Cross-attentions that share weights, blocks that share weights, and BatchNorm
IMAGES = {
    "shared": ["model.encoder.num_cross_attention_layers=3", "model.encoder.num_self_attention_blocks=3",
               "model.encoder.first_self_attention_block_shared=false", "model.encoder.activation_checkpointing=true"],
    "conv": ["model.input.features=conv", "model.input.num_feature_channels=8", "optim.name=sgd", "optim.lr=0.1"],
}


def train_many(runs: list[list], processes: int):
    args = [arg for run in runs for arg in (*run, "--")]
    result = run_script("tests/many_runs.py", *args, processes=processes)
    assert result.returncode == 0, result.stderr


def agent(folder: Path, port: int, is_host: bool, data: Path) -> subprocess.Popen:
    """torchrun as on one of two hosts, which share no folder for runs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", f"is_host={is_host}",
               "--local-addr", "127.0.0.1", "--max-restarts", "3",
               "train.py", "configs/clm.yaml", *TINY, *CLM, f"data.path={data}", "train.max_steps=60",
               "train.save_every=5", f"train.out_dir={folder}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs. `ddp`, `fsdp` and names that begin so differ in train.parallel only."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "corpus.txt"
    text.write_text("".join(f"{n} green bottles, standing on the wall\n" for n in range(250)))
    digits = write_digits(folder / "digits")

    def clm(name, *args):
        return ["clm.yaml", *TINY, f"data.path={text}", *LOG, *CLM, f"train.out_dir={folder}/{name}", *args]

    def two(name, make):
        return [make(f"ddp{name}"), [*make(f"fsdp{name}"), FSDP]]

    pairs = two("", clm) + two("_accumulate", lambda name: clm(name, "train.gradient_accumulation_steps=2"))
    for optimizer in OPTIMIZERS:
        options = [f"optim.name={optimizer}", "optim.weight_decay=0.1", "train.max_steps=3"]
        pairs += two(f"_{optimizer}", lambda name: clm(name, *options))
    for kind, options in IMAGES.items():
        pairs += two(f"_{kind}", lambda name: [
            "digits.yaml", f"data.path={digits}", *LOG, *options, "train.max_steps=4", "train.eval_every=2",
            f"train.out_dir={folder}/{name}"])
    train_many([clm("fsdp4", FSDP), clm("resumed", FSDP, "train.max_steps=10")], processes=4)
    resumed = clm("resumed", FSDP, "train.resume=auto")
    whole = clm("whole", "train.max_steps=60")
    train_many([resumed, *pairs, whole], processes=2)
    return folder


def compare(a: Path, b: Path, splits=("train", "val"), tolerance=1e-5):
    for split in splits:
        for key in ("loss", "grad_norm") if split == "train" else ("loss",):
            values = [[line[key] for line in read_metrics(run, split)] for run in (a, b)]
            assert values[0] == pytest.approx(values[1], abs=tolerance), (split, key)


def load(run: Path) -> dict:
    return checkpoint.load(run / "checkpoints/last.pt")


def check_same_state(a, b, where=""):
    """Two states have the same names, types, shapes and, nearly, values."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.device == b.device, where
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            check_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b)):
            check_same_state(*pair, f"{where}.{number}")
    elif not where.endswith("fused"):
        assert a == b, where


@pytest.mark.parametrize("name", ["fsdp", "fsdp4", "fsdp_accumulate"])
def test_fsdp_trains_like_ddp(runs, name):
    assert len(read_metrics(runs / name)) == 20
    compare(runs / name, runs / name.replace("fsdp", "ddp").rstrip("4"))


@pytest.mark.parametrize("name", [*OPTIMIZERS, *IMAGES])
def test_fsdp_with_other_optimizers_and_models(runs, name):
    compare(runs / f"fsdp_{name}", runs / f"ddp_{name}")


@pytest.mark.parametrize("name", ["", *(f"_{optimizer}" for optimizer in OPTIMIZERS)])
def test_checkpoints_of_fsdp_are_those_of_ddp(runs, name):
    fsdp, ddp = load(runs / f"fsdp{name}"), load(runs / f"ddp{name}")
    assert fsdp.keys() == ddp.keys()
    for key in ("model", "optimizer", "step", "task"):
        check_same_state(fsdp[key], ddp[key])


def test_saved_by_four_processes_and_resumed_by_two(runs):
    assert [line["step"] for line in read_metrics(runs / "resumed")] == list(range(1, 21))
    compare(runs / "resumed", runs / "fsdp", splits=["train"])  # it was evaluated once more, at step 10
    check_same_state(load(runs / "resumed")["optimizer"], load(runs / "fsdp")["optimizer"])


def test_one_process_resumes_a_run_of_four(runs):
    text = f"data.path={runs}/corpus.txt"
    result = run_train(text, *CLM, f"train.out_dir={runs}/fsdp4", "train.max_steps=22")
    assert result.returncode == 0 and "resumed at step 20" in result.stdout, result.stderr
    losses = [line["loss"] for line in read_metrics(runs / "fsdp4")]
    expected = [line["loss"] for line in read_metrics(runs / "whole")]  # its schedule ended at step 20, too
    assert losses == pytest.approx(expected[:22], abs=1e-5)


def test_a_host_dies_and_comes_back(runs):
    """The host that comes back has no checkpoint: it gets the state from the other one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = runs / "corpus.txt"
    host = agent(runs / "host", port, True, text)
    guest = agent(runs / "guest", port, False, text)
    agents = [host, guest]
    folders = runs / "host", runs / "guest"
    try:
        deadline = time.time() + 120
        while not any((folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= 12 for folder in folders):
            assert time.time() < deadline and host.poll() is None, host.stderr.read()
            time.sleep(0.02)
        for pid in (*children(guest), guest.pid):
            os.kill(pid, signal.SIGKILL)
        guest.wait()
        agents[1] = agent(runs / "guest", port, False, text)
        for process in agents:
            errors = process.communicate(timeout=180)[1]
            assert process.returncode == 0, errors
    finally:
        for process in agents:
            if process.poll() is None:
                for pid in (*children(process), process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
    (run,) = (folder for folder in folders if (folder / "checkpoints/last.pt").exists() and load(folder)["step"] == 60)
    ours, expected = load(run)["model"], load(runs / "whole")["model"]
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not (runs / "host.1").exists() and not (runs / "guest.1").exists()


def test_a_mistake_of_one_process_is_one_line(tmp_path, corpus):
    """Rank 0 alone reads the damaged checkpoint. The other rank ends quietly. torchrun adds its own report."""
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"hello")
    result = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/run", f"train.resume={damaged}", processes=2)
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: {damaged} is damaged, or not a checkpoint of train.py"]
    assert "[rank" not in result.stderr and "exitcode  : 2" in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank, local_rank, turn", [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_one_rank_of_each_host_goes_first(monkeypatch, rank, local_rank, turn):
    """Ranks 0 and 1 are on one host, 2 and 3 on another."""
    barriers = []
    monkeypatch.setattr(Ranks, "barrier", lambda self: barriers.append(rank))
    assert Ranks(rank, 4, CPU, local_rank).main_first(lambda: len(barriers)) == turn
    assert len(barriers) == 3


def test_the_newest_checkpoint_of_all_hosts_counts(tmp_path, monkeypatch):
    def newest(*ages):
        """The rank that `newest` names, if the file of each rank has this age in seconds; None: it has none."""
        times = []
        for rank, age in enumerate(ages):
            file = tmp_path / f"{rank}.pt"
            file.unlink(missing_ok=True)
            if age is not None:
                file.write_text("")
                os.utime(file, (1000 - age, 1000 - age))
            monkeypatch.setattr(Ranks, "gather_objects", lambda self, time: times.append(time) or [time])
            Ranks(rank, len(ages), CPU).newest(file if age is not None else None)
        monkeypatch.setattr(Ranks, "gather_objects", lambda self, time: times)
        return Ranks(0, len(ages), CPU).newest(None)

    assert newest(5, 5) == 0 and newest(5, 3) == 1 and newest(None, 3) == 1 and newest(3, None) == 0
    assert newest(None, None) is None
    monkeypatch.undo()
    assert Ranks(0, 1, CPU).newest(tmp_path / "missing.pt") == 0  # rank 0 then says that the file is missing
