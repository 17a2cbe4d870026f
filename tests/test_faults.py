"""Faults while training: a second process, damaged checkpoints, signals, time limits, full disks, dead workers."""
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, TINY, read_metrics
from perceiver import checkpoint
from perceiver.distributed import Ranks
from perceiver.errors import UserError
from perceiver.faults import STARTED, RunFolder, explaining_faults
from perceiver.log import RunLog
from perceiver.speed import SpeedMeter

sys.path += [str(ROOT), str(ROOT / "benchmarks")]
import faults as benchmark  # noqa: E402

CPU = Ranks(0, 1, torch.device("cpu"))


def start(folder, *args, max_bytes=None):
    """Starts train.py in a forked process: a new one would take seconds to import PyTorch."""
    return benchmark.start([*TINY, f"train.out_dir={folder / 'run'}", *args], folder / "output.txt", max_bytes)


def finish(folder, process):
    """Waits for the end of a process. Returns its exit code and its output."""
    return SimpleNamespace(code=benchmark.finish(process), output=(folder / "output.txt").read_text())


def run_train(folder, *args, **kwargs):
    folder.mkdir(exist_ok=True)
    return finish(folder, start(folder, *args, **kwargs))


def wait_for_steps(run, process, count):
    deadline = time.time() + 60
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < count:
        assert process.is_alive() and time.time() < deadline
        time.sleep(0.01)


def errors(result) -> str:
    """The only error line of a run that ended with exit code 2."""
    assert result.code == 2 and "Traceback" not in result.output, result.output
    lines = re.findall(r"error: .*", result.output)
    assert len(lines) == 1, result.output
    return lines[0]


def new_checkpoint(step, size=1000):
    return {"model": {"w": torch.arange(size) + step}, "optimizer": {}, "step": step, "config": {}}


# ----------------------------------------------------------------------------------------------------------------------
# The lock


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path, corpus):
    run, common = tmp_path / "run", [f"data.path={corpus}"]
    process = start(tmp_path, *common, "train.max_steps=100000", "data.num_workers=1")
    try:
        wait_for_steps(run, process, 2)
        for resume in ("auto", "never"):
            second = run_train(tmp_path / "b", *common, f"train.out_dir={run}", f"train.resume={resume}")
            line = errors(second)
            assert re.search(rf"train.out_dir={run} is in use by process {process.pid} on \S+;", line), line
        assert process.is_alive() and os.listdir(run) and not (tmp_path / "run.1").exists()
    finally:
        process.kill()  # its data worker lives on for some seconds
        process.join()
    result = run_train(tmp_path, *common, "train.max_steps=3")
    assert result.code == 0, result.output


def test_the_lock_of_a_run_folder(tmp_path):
    folder = tmp_path / "run"
    run = RunFolder(folder)
    assert not folder.exists()  # a run that cannot start leaves no folder
    run.open(None)
    run.open(None)  # it has the lock already
    for attempt in (lambda: RunFolder(folder), lambda: run.lock() or RunFolder(folder)):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
            attempt()
    checkpoint.save({}, folder / checkpoint.LAST)
    run.open(None)  # moves the folder aside, and locks the new one
    assert (tmp_path / "run.1" / checkpoint.LAST).exists() and not (folder / checkpoint.LAST).exists()
    with pytest.raises(UserError, match="is in use"):
        RunFolder(folder)
    run.release()
    RunFolder(folder).release()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the folder train.out_dir="):
        RunFolder(tmp_path / "file")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_one_flipped_bit_is_found(tmp_path):
    """torch.load reads it without an error. The file itself is as torch.save writes it."""
    path = tmp_path / "last.pt"
    checkpoint.save(new_checkpoint(3, size=10_000), path)
    whole = path.read_bytes()
    place = whole.index((1234).to_bytes(8, "little"))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.arange(10_000) + 3)
    with pytest.raises(UserError, match="cannot read checkpoint .*last.pt: its part .* has a wrong checksum"):
        checkpoint.load(path)
    torch.save(new_checkpoint(3), path)
    assert checkpoint.load(path)["step"] == 3


def test_the_previous_checkpoint_is_kept_and_used(tmp_path, capsys):
    last, best = tmp_path / checkpoint.LAST, tmp_path / checkpoint.BEST
    previous, damaged = last.with_name("previous.pt"), last.with_name("damaged.pt")
    for step in (1, 2):
        checkpoint.save(new_checkpoint(step), last)
    checkpoint.save(new_checkpoint(3), best)
    checkpoint.link(best, last)
    assert [checkpoint.load(path)["step"] for path in (previous, last, best)] == [2, 3, 3]
    assert checkpoint.read(last, True)[1]["step"] == 3 and capsys.readouterr().err == ""

    last.write_bytes(last.read_bytes()[:-1000])
    assert checkpoint.read(last, move_damaged=False)[0] == previous and last.exists()
    path, saved = checkpoint.read(last, move_damaged=True)
    assert path == previous and saved["step"] == 2 and damaged.exists() and not last.exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"{last} is damaged, or not a checkpoint of train.py; using {previous}, from step 2, instead"
    checkpoint.save(new_checkpoint(4), last)
    assert checkpoint.load(previous)["step"] == 2, "the damaged file must not replace the previous one"

    last.write_bytes(b"")
    previous.write_bytes(b"")
    checkpoint.save(new_checkpoint(1), best)
    assert checkpoint.read(last, True)[0] == best
    best.write_bytes(b"")
    with pytest.raises(UserError, match="last.pt"):
        checkpoint.read(last, True)
    with pytest.raises(UserError, match="best.pt"):  # a file that the user names is not replaced by another
        checkpoint.read(best, True)


def test_the_previous_checkpoint_on_a_disk_without_links(tmp_path, monkeypatch):
    def no_links(source, path):
        raise PermissionError("no links")

    monkeypatch.setattr(os, "link", no_links)
    last = tmp_path / checkpoint.LAST
    for step in (1, 2):
        checkpoint.save(new_checkpoint(step), last)
    assert checkpoint.load(last)["step"] == 2
    assert sorted(os.listdir(last.parent)) == ["last.pt", "previous.pt"]
    last.unlink()  # as after a kill between the two renames
    source = checkpoint.resume_source(checkpoint.TrainConfig(out_dir=str(tmp_path)))
    assert source == last and checkpoint.read(source, True)[1]["step"] == 1


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, corpus):
    common = [f"data.path={corpus}", "train.save_every=2", "optim.decay_steps=9", "train.eval_every=100"]
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_train(a, *common, "train.max_steps=6").code == 0
    last = a / "run" / checkpoint.LAST
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    result = run_train(a, *common, "train.max_steps=9")
    line = r"last.pt: its part .* has a wrong checksum; using .*previous.pt, from step 4, instead\n"
    assert re.search(line, result.output)
    assert "resumed at step 4" in result.output
    assert run_train(b, *common, "train.max_steps=9").code == 0
    lines = [[(line["step"], line["loss"]) for line in read_metrics(folder / "run")] for folder in (a, b)]
    assert lines[0] == lines[1] and len(lines[0]) == 9


# ----------------------------------------------------------------------------------------------------------------------
# Stopping


def test_a_time_limit_ends_in_a_checkpoint(tmp_path, corpus):
    common = [f"data.path={corpus}", "optim.decay_steps=9"]
    hours = (time.monotonic() - STARTED + 2) / 3600  # 2 seconds from now: the process is a fork of this one
    result = run_train(tmp_path, *common, "train.max_steps=100000", f"train.max_hours={hours}")
    assert result.code == 128 + signal.SIGALRM, result.output
    step = int(re.search(r"stopped by train.max_hours after step (\d+); the same command continues", result.output)[1])
    assert checkpoint.load(tmp_path / "run" / checkpoint.LAST)["step"] == step > 0
    assert f"resumed at step {step}" in run_train(tmp_path, *common, f"train.max_steps={step + 1}").output


def test_a_step_of_many_micro_batches_is_given_up(tmp_path, corpus):
    """A step has 4000 micro-batches and would take minutes. The checkpoint is of the last complete step."""
    run, common = tmp_path / "run", [f"data.path={corpus}"]
    assert run_train(tmp_path, *common, "train.max_steps=2").code == 0
    before = checkpoint.load(run / checkpoint.LAST)
    process = start(tmp_path, *common, "data.batch_size=4000", "train.gradient_accumulation_steps=4000",
                    "train.max_steps=4")
    time.sleep(3)
    os.kill(process.pid, signal.SIGTERM)
    sent = time.time()
    result = finish(tmp_path, process)
    assert result.code == 128 + signal.SIGTERM and time.time() - sent < 10, result.output
    assert "stopped by SIGTERM after step 2" in result.output
    after = checkpoint.load(run / checkpoint.LAST)
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())


def test_an_evaluation_that_is_cut_off_is_repeated(tmp_path, corpus):
    """The evaluation takes long, so the signal arrives while it runs."""
    common = [f"data.path={corpus}", "data.val_fraction=0.5", "data.val_size=2000", "data.batch_size=1",
              "train.max_steps=3", "train.eval_every=2"]
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    process = start(a, *common)
    wait_for_steps(a / "run", process, 2)
    os.kill(process.pid, signal.SIGTERM)
    assert "stopped by SIGTERM after step 2" in finish(a, process).output
    assert not read_metrics(a / "run", "val") and not (a / "run" / checkpoint.BEST).exists()
    assert run_train(a, *common).code == run_train(b, *common).code == 0
    vals = [[(line["step"], line["loss"]) for line in read_metrics(folder / "run", "val")] for folder in (a, b)]
    assert vals[0] == vals[1] and [step for step, _ in vals[0]] == [2, 3]
    ours, theirs = (checkpoint.load(folder / "run" / checkpoint.BEST)["model"] for folder in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_says_what_changed_and_keeps_only_comparable_losses(tmp_path, corpus):
    run, common = tmp_path / "run", [f"data.path={corpus}", "optim.decay_steps=9"]
    assert run_train(tmp_path, *common, "train.max_steps=2").code == 0
    saved = checkpoint.load(run / checkpoint.LAST)
    saved["best_loss"] = 0.0  # no evaluation improves on it
    checkpoint.save(saved, run / checkpoint.LAST)
    result = run_train(tmp_path, *common, "train.max_steps=3", "data.batch_size=2", "train.seed=1")
    assert "resumed at step 2; data.batch_size was 4, is 2, train.seed was 0, is 1\n" in result.output, result.output
    assert checkpoint.load(run / checkpoint.LAST)["best_loss"] == 0
    result = run_train(tmp_path, *common, "train.max_steps=4", "data.batch_size=2", "train.seed=1", "data.val_size=100")
    assert "; data.val_size was 200, is 100; validation losses do not compare" in result.output
    assert checkpoint.load(run / checkpoint.BEST)["step"] == 4


# ----------------------------------------------------------------------------------------------------------------------
# Disks, files, workers


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, corpus):
    run, common = tmp_path / "run", [f"data.path={corpus}"]
    assert run_train(tmp_path, *common, "train.max_steps=2").code == 0
    last = run / checkpoint.LAST
    before = last.read_bytes()
    for limit, message in ((100_000, f"cannot save {run}/checkpoints/"), (1000, f"cannot write to {run}: File too la")):
        line = errors(run_train(tmp_path, *common, "train.max_steps=4", max_bytes=limit))
        assert message in line and last.read_bytes() == before and not list(last.parent.glob("*.tmp")), line
    assert run_train(tmp_path, *common, "train.max_steps=4").code == 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["vanishes", "shrinks"])
def test_a_data_file_that_is_gone_is_one_line(tmp_path, corpus, fault, workers):
    process = start(tmp_path, f"data.path={corpus}", "train.max_steps=100000", "train.save_every=1",
                    f"data.num_workers={workers}")
    wait_for_steps(tmp_path / "run", process, 3)
    if fault == "vanishes":
        corpus.unlink()
    else:
        os.truncate(corpus, 100)
    line = errors(finish(tmp_path, process))
    assert str(corpus) in line, line
    assert checkpoint.load(tmp_path / "run" / checkpoint.LAST)["step"] >= 2


def test_errors_of_the_log_are_one_line(tmp_path, capfd):
    log = RunLog(tmp_path, 0, "task: x")
    log.file.close()
    log.file = open("/dev/full", "w", buffering=1)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: No space left on device"):
        log.metrics(1, "train", {"loss": 1.0})
    with pytest.raises(BrokenPipeError), log.writing():
        raise BrokenPipeError
    assert "Traceback" not in capfd.readouterr().err


def test_a_dead_data_worker_is_one_line(tmp_path, corpus):
    run = tmp_path / "run"
    process = start(tmp_path, f"data.path={corpus}", "train.max_steps=100000", "data.num_workers=2",
                    "train.save_every=1")
    wait_for_steps(run, process, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    line = errors(finish(tmp_path, process))
    assert line.startswith("error: a data worker ended (") and "continues from the last checkpoint" in line
    assert checkpoint.load(run / checkpoint.LAST)["step"] >= 2


@pytest.mark.parametrize("error, expected", [
    (RuntimeError("another"), RuntimeError), (BrokenPipeError(), BrokenPipeError), (UserError("x"), UserError),
    (RuntimeError("DataLoader worker (pid 3) is killed"), UserError), (ConnectionResetError(), UserError),
    (FloatingPointError("at step 3 loss is nan"), SystemExit)])
def test_which_errors_are_explained(error, expected):
    with pytest.raises(expected), explaining_faults(CPU):
        raise error


# ----------------------------------------------------------------------------------------------------------------------
# Health, and many faults


def test_health_of_a_run(monkeypatch):
    class Task:
        rate = "samples_per_s"

    meter = SpeedMeter(Task(), torch.device("cpu"), False)

    def batches(delay):
        while True:
            time.sleep(delay)
            yield {"x": torch.zeros(1)}

    for delay, low, high in ((0.05, 0.4, 0.6), (0.0, 0.0, 0.05)):
        source = batches(delay)
        for step in range(10):
            meter.fetch(source)
            time.sleep(0.05 if step < 9 else 0.2)
            meter.end_step()
            with meter.paused():
                time.sleep(0.02)
        meter.report(10, 10)
        health = meter.health
        assert low <= health["data_wait"] <= high, health
        assert 0.05 + delay <= health["step_s_median"] < 0.05 + delay + 0.02 < health["step_s_p95"], health
        assert 0.05 < health["peak_memory_gb"] < 100


def test_metrics_hold_the_health_of_a_run(tmp_path, corpus):
    assert run_train(tmp_path, f"data.path={corpus}", "train.max_steps=2").code == 0
    for line in read_metrics(tmp_path / "run"):
        assert 0 <= line["data_wait"] < 1 and 0 < line["step_s_median"] <= line["step_s_p95"] < 60
        assert line["peak_memory_gb"] > 0.01 and line["grad_norm"] > 0


def test_a_short_form_of_the_benchmark(tmp_path):
    """benchmarks/faults.py with 6 faults of different kinds: kills, and each kind of damage."""
    run = tmp_path / "run"
    faults = benchmark.Faults(tmp_path, seed=1)
    faults.kill(run, "kill -9", "while saving", save=3)
    for kind in benchmark.OTHERS:
        faults.other(run, kind)
        faults.kill(run, "kill -9", "while saving", save=1)
    faults.kill(run, "SIGTERM", "while saving", save=1)
    assert faults.run_with_faults(run, 0)
    # Which faults there are depends on the moment of a kill: it may come when a run has ended, or between two renames.
    assert faults.counts.total() >= 3, faults.counts
    refused, harmless = benchmark.flips(faults.whole / "run" / checkpoint.LAST, 20, random.Random(0))
    assert refused > harmless
