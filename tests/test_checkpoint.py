import os
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import TINY
from perceiver import checkpoint
from perceiver.config import TrainConfig, load_config, to_dict
from perceiver.distributed import Ranks
from perceiver.errors import UserError
from perceiver.optim import build_optimizer
from perceiver.tasks import TASKS

CPU = Ranks(0, 1, torch.device("cpu"))


def clm(*overrides):
    return load_config("configs/clm.yaml", [*TINY, *overrides], TASKS)


def start(config):
    torch.manual_seed(0)
    task = TASKS[config.task](config)
    model = task.build_model()
    return task, model, build_optimizer(model, config.optim)


def save(config, path, step=3):
    task, model, optimizer = start(config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best_loss": 1.5,
                     "config": to_dict(config), "task": task.state_dict()}, path)
    return model, optimizer


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "last.pt"
    checkpoint.save({"step": 1}, path)

    def fail(value, file):
        file.write(b"half")
        raise RuntimeError("disk\nfull")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(UserError, match="cannot save .*last.pt: disk full"):
            checkpoint.save({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    checkpoint.save({"step": 3}, path)
    assert torch.load(path) == {"step": 3} and sorted(os.listdir(path.parent)) == ["last.pt", "previous.pt"]


def test_a_file_is_flushed_before_it_takes_its_name(tmp_path, monkeypatch):
    """The same holds for the copy that replaces a link on a file system without links."""
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    flushed = []

    def flush(path):
        flushed.append((path.name, last.exists() and last.read_bytes()))

    monkeypatch.setattr("perceiver.io.flush", flush)
    best.write_bytes(b"new")
    last.write_bytes(b"old")
    checkpoint.link(best, last)
    assert last.samefile(best)
    last.unlink()
    last.write_bytes(b"old")

    def no_links(source, path):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", no_links)
    checkpoint.link(best, last)
    assert last.read_bytes() == b"new" and not last.samefile(best)
    assert flushed == [("last.pt.tmp", b"old"), (tmp_path.name, b"new")] * 2
    assert (tmp_path / "previous.pt").read_bytes() == b"old"  # without links, last.pt is away for a moment


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(UserError, match="checkpoint /nowhere.pt does not exist"):
        checkpoint.load("/nowhere.pt")
    path = tmp_path / "last.pt"
    checkpoint.save({"model": torch.zeros(10_000)}, path)
    with pytest.raises(UserError, match="is not a checkpoint of train.py: it lacks"):
        checkpoint.load(path)
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="last.pt is damaged, or not a checkpoint of train.py"):
            checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    for other in (path, "README.md", tmp_path):
        with pytest.raises(UserError) as error:
            checkpoint.load(other)
        assert str(other) in str(error.value) and "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)


def test_the_checkpoint_from_which_a_run_resumes(tmp_path):
    def source(resume):
        return checkpoint.resume_source(TrainConfig(out_dir=str(tmp_path), resume=resume))

    last = tmp_path / "checkpoints" / "last.pt"
    assert source("auto") is None and source("never") is None and source("a/b.pt") == Path("a/b.pt")
    checkpoint.save({}, last)
    assert source("auto") == last and source("never") is None and source("a/b.pt") == Path("a/b.pt")


def test_resume_takes_weights_from_the_checkpoint_and_options_from_the_config(tmp_path):
    for name in ("adamw", "lamb"):
        old = clm(f"optim.name={name}", "optim.weight_decay=0.1", "train.max_steps=3")
        path = tmp_path / "last.pt"
        trained, state = save(old, path)
        new = clm(f"optim.name={name}", "optim.weight_decay=0.2", "optim.betas=[0.5, 0.6]", "train.max_steps=6")
        _, model, optimizer = start(new)
        step, best_loss, _, note = checkpoint.resume(path, new, model, optimizer, CPU, TASKS)
        assert step == 3 and best_loss == 1.5 and note.startswith("resumed at step 3")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters()))
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
        assert optimizer.param_groups[0].get("step") == (1 if name == "lamb" else None)
        for p, q in zip(model.parameters(), trained.parameters()):
            assert torch.equal(optimizer.state[p]["exp_avg"], state.state[q]["exp_avg"])


def test_another_task_is_one_message(tmp_path):
    path = tmp_path / "last.pt"
    save(clm(), path)
    other = load_config("configs/mlm.yaml", [], TASKS)
    with pytest.raises(UserError) as error:
        checkpoint.resume(path, other, None, None, CPU, TASKS)
    assert str(error.value) == (f"{path} is a checkpoint of task causal_lm, not masked_lm; choose another "
                                "train.out_dir, or train.resume=never")


@pytest.mark.parametrize("override, message", [
    ("model.num_heads=1", "model.num_heads was 2, is 1"),
    ("optim.name=sgd", "optim.name was muon, is sgd"),
    ("data.dataset=enwik8", "data.dataset was stdlib, is enwik8"),
    ("data.path=x.txt", "data.path was None, is x.txt"),
])
def test_changes_that_prevent_resuming(tmp_path, override, message):
    path = tmp_path / "last.pt"
    save(clm(), path)
    new = clm(override)
    with pytest.raises(UserError, match=message):
        checkpoint.resume(path, new, *start(new)[1:], CPU, TASKS)
    if override.startswith("data"):  # a user who names the checkpoint may change the data
        new.train.resume = str(path)
        assert checkpoint.resume(path, new, *start(new)[1:], CPU, TASKS)[0] == 3


def test_changes_that_allow_resuming(tmp_path):
    path = tmp_path / "last.pt"
    save(clm(), path)
    new = clm("model.residual_dropout=0.1", "model.z_loss=0.1", "optim.lr=1", "data.batch_size=8", "train.seed=3")
    assert checkpoint.resume(path, new, *start(new)[1:], CPU, TASKS)[0] == 3


def test_differences_go_into_sections():
    old = {"encoder": {"heads": 1, "dropout": 0.1}, "decoder": {"heads": 2}, "width": 3, "gone": 1}
    new = {"encoder": {"heads": 2, "dropout": 0.2}, "decoder": None, "width": 3, "added": 1}
    assert checkpoint.differences(old, new, "model") == [
        "model.encoder.heads was 1, is 2", "model.decoder was {'heads': 2}, is None", "model.added was None, is 1"]
    assert checkpoint.differences(old, new, "model", ["width", "gone"]) == ["model.gone was 1, is None"]
    assert checkpoint.differences(old, old, "model") == []


def test_notes_on_a_resumed_run():
    def note(step, *changes):
        old = ["optim.warmup_steps=10", "train.max_steps=100"]
        return checkpoint.resume_note(step, clm(*old), clm(*old, *changes))

    assert note(50) == "resumed at step 50"
    for step in (100, 260):
        assert note(step) == f"nothing to train: the run is at step {step}, and train.max_steps=100"
    more = "resumed at step 100; the learning rate is now 0.00234 instead of 0: train.max_steps or optim changed"
    assert note(100, "train.max_steps=300") == more
    assert "instead of" in note(50, "optim.lr=1")
    assert note(100, "train.max_steps=300", "optim.decay_steps=100") == "resumed at step 100"


def test_a_run_is_moved_aside_only_if_another_starts(tmp_path, capsys):
    run = tmp_path / "run"
    last, best = run / "checkpoints" / "last.pt", run / "checkpoints" / "best.pt"
    checkpoint.move_aside(run, None)
    run.mkdir()
    checkpoint.move_aside(run, None)  # the folder holds no checkpoint yet
    checkpoint.save({}, last)
    checkpoint.move_aside(run, last)
    checkpoint.move_aside(run, best)
    assert last.exists() and os.listdir(tmp_path) == ["run"]
    (tmp_path / "run.1").mkdir()
    checkpoint.move_aside(run, tmp_path / "other" / "checkpoints" / "last.pt")
    assert not run.exists() and (tmp_path / "run.2" / "checkpoints" / "last.pt").exists()
    assert capsys.readouterr().err == f"the earlier run in {run} is now in {tmp_path}/run.2\n"
