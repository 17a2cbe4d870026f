"""torch.compile by default, traces, and what to do when memory ends."""
import json

import pytest
import torch

from conftest import read_metrics, run_train
from perceiver import profile
from perceiver.config import TrainConfig, build, load_config
from perceiver.distributed import Ranks
from perceiver.errors import UserError, explaining_memory
from perceiver.tasks import TASKS

CPU, CUDA = Ranks(0, 1, torch.device("cpu")), Ranks(0, 1, torch.device("cuda"))


@pytest.mark.parametrize("setting, ranks, missing, expected", [
    ("auto", CPU, None, False), ("auto", CUDA, None, True), ("auto", CUDA, "C compiler", False),
    ("true", CPU, None, True), ("false", CUDA, None, False)])
def test_compile_auto(setting, ranks, missing, expected, monkeypatch, capsys):
    monkeypatch.setattr(profile, "missing_compiler", lambda: missing)
    options = build(TrainConfig, {"compile": setting})
    assert profile.uses_compile(options, ranks) is expected
    error = capsys.readouterr().err
    assert ("there is no C compiler" in error) if missing else error == ""


def test_a_missing_compiler_is_found(monkeypatch):
    monkeypatch.setattr(profile.shutil, "which", lambda name: "/usr/bin/cc" if name == "cc" else None)
    monkeypatch.setattr(profile.importlib.util, "find_spec", lambda name: True)
    assert profile.missing_compiler() is None
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert "gcc" in profile.missing_compiler()
    monkeypatch.setattr(profile.importlib.util, "find_spec", lambda name: None)
    assert "triton" in profile.missing_compiler()


def test_a_profiled_run_writes_a_trace_and_learns_the_same(corpus, tmp_path):
    """Muon steps two optimizers in a step; a step counts once."""
    args = [f"data.path={corpus}", "train.max_steps=7", "train.eval_every=7", "optim.name=muon"]
    result = run_train(*args, f"train.out_dir={tmp_path}/a", "train.profile=2")
    assert result.returncode == 0 and f"wrote {tmp_path}/a/profile.json" in result.stderr
    events = json.loads((tmp_path / "a/profile.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert any("backward" in event["name"].lower() for event in events)
    assert "Self CPU" in (tmp_path / "a/profile.txt").read_text()
    short = run_train(*args, f"train.out_dir={tmp_path}/b", "train.profile=5")
    assert "train.profile=5: the run has too few steps" in short.stderr
    losses = [[line["loss"] for line in read_metrics(tmp_path / run)] for run in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_out_of_memory_is_one_line_with_three_options():
    config = load_config("configs/clm.yaml", ["data.batch_size=24", "train.gradient_accumulation_steps=2",
                                              "train.precision=float32"], TASKS)
    advice = profile.memory_advice(config, Ranks(0, 2, torch.device("cpu")))
    assert advice == (
        "Any of these helps: train.gradient_accumulation_steps=4 (3 examples at once instead of 6); "
        "model.activation_checkpointing=true (a third more compute); "
        "train.precision=bf16 (activations of half the size)")
    with pytest.raises(UserError, match="^out of memory .*Any of these helps") as error, explaining_memory(advice):
        torch.empty(2**60)
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="another error"), explaining_memory(advice):
        raise RuntimeError("another error")


def test_advice_when_the_cheap_options_are_used_up():
    overrides = ["data.batch_size=1", "train.precision=bf16", "model.encoder.activation_checkpointing=true",
                 "model.decoder.activation_checkpointing=true"]
    advice = profile.memory_advice(load_config("configs/reviews.yaml", overrides, TASKS), CPU)
    assert "gradient_accumulation" not in advice and "model.num_latents=" in advice and "--nproc-per-node" in advice
