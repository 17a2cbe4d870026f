"""train.py, run from the command line in processes of its own."""
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from conftest import ROOT, TINY, read_metrics, run_script, run_train
from perceiver import checkpoint, speed
from perceiver.config import load_config
from perceiver.distributed import Ranks, uses_bf16
from perceiver.speed import peak_flops, training_flops
from perceiver.tasks import TASKS


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def weights(run, name="last.pt"):
    return checkpoint.load(run / "checkpoints" / name)["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


DROPOUT = ["model.cross_attention_dropout=0.5", "model.residual_dropout=0.1", "model.post_attention_dropout=0.1"]


def test_a_dry_run_prints_the_config_and_the_number_of_parameters():
    result = run_script("train.py", "configs/clm_wikitext103.yaml", "train.dry_run=true")
    assert result.returncode == 0, result.stderr
    assert "parameters: 30,563,078\n" in result.stdout
    assert "max_seq_len: 4096" in result.stdout and "out_dir: runs/clm_wikitext103" in result.stdout


def test_a_run_leaves_what_it_should(tmp_path, corpus):
    result = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=20",
                       "train.eval_every=10", "optim.lr=0.01", "optim.warmup_steps=1")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    train, val = read_metrics(run), read_metrics(run, "val")
    assert [line["step"] for line in train] == list(range(1, 21)) and [line["step"] for line in val] == [10, 20]
    for line in train:
        assert line.keys() >= {"loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_s"}
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
    assert train[-1]["loss"] < 4 < train[0]["loss"]  # it learns quickly, because the text has few characters
    assert re.search(r"validation: \d\.\d+ bits per byte; .*gzip -9 needs .* xz -9", result.stdout)
    assert "----- sample" in result.stdout
    final = f"{val[-1]['bits_per_byte']:.3f}"
    assert result.stdout.count(final) == 1, "the final result is printed once"
    assert f"best.pt has the lowest validation loss, {min(line['loss'] for line in val):.4f}" in result.stdout
    assert f"{corpus}: " in result.stdout  # the note about the data
    assert (run / "config.yaml").exists() and list(run.glob("events.out.tfevents.*"))
    saved = checkpoint.load(run / "checkpoints" / "last.pt")
    assert saved["step"] == 20 and saved["config"]["optim"]["lr"] == 0.01
    best = checkpoint.load(run / "checkpoints" / "best.pt")
    assert saved["best_loss"] == best["best_loss"] == min(line["loss"] for line in val)

    again = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=20")
    assert again.returncode == 0 and "the run is complete" in again.stdout, again.stderr
    assert "nothing to train: the run is at step 20, and train.max_steps=20" in again.stdout
    assert losses(run) == [line["loss"] for line in train]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted(tmp_path, corpus, workers):
    common = [f"data.path={corpus}", "optim.decay_steps=20", "train.eval_every=7", f"data.num_workers={workers}",
              *DROPOUT]
    assert run_train(*common, f"train.out_dir={tmp_path}/a", "train.max_steps=20").returncode == 0
    assert run_train(*common, f"train.out_dir={tmp_path}/b", "train.max_steps=10").returncode == 0
    result = run_train(*common, f"train.out_dir={tmp_path}/b", "train.max_steps=20")
    assert "resumed at step 10\n" in result.stdout, result.stderr
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 20
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("processes, accumulate", [(2, 1), (2, 2), (1, 2)])
def test_ranks_and_micro_batches_change_nothing(tmp_path, corpus, processes, accumulate):
    common = [f"data.path={corpus}", "train.max_steps=10", "model.cross_attention_dropout=0.5"]
    assert run_train(*common, f"train.out_dir={tmp_path}/one").returncode == 0
    result = run_train(*common, f"train.out_dir={tmp_path}/many", f"train.gradient_accumulation_steps={accumulate}",
                       processes=processes)
    assert result.returncode == 0, result.stderr
    for split in ("train", "val"):
        one, many = read_metrics(tmp_path / "one", split), read_metrics(tmp_path / "many", split)
        assert [line["step"] for line in one] == [line["step"] for line in many]
        for name in ("loss", "grad_norm")[: 1 if split == "val" else 2]:
            assert [line[name] for line in one] == pytest.approx([line[name] for line in many], abs=1e-5)


def start(*args):
    command = [sys.executable, "train.py", "configs/clm.yaml", *TINY, *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def wait_for(condition, process, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_can_be_resumed(tmp_path, corpus, number):
    common = [f"data.path={corpus}", "optim.decay_steps=300", "train.save_every=1000", "train.eval_every=1000",
              *DROPOUT]
    run = tmp_path / "run"
    process = start(*common, f"train.out_dir={run}", "train.max_steps=300", "data.num_workers=2")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run)) >= 5, process)
    os.killpg(process.pid, number)  # like torchrun and a terminal: data workers get the signal, too
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert f"stopped by {number.name} after step" in output and "Traceback" not in output
    step = checkpoint.load(run / "checkpoints" / "last.pt")["step"]
    assert 5 <= step < 300
    assert run_train(*common, f"train.out_dir={run}", f"train.max_steps={step + 5}").returncode == 0
    assert run_train(*common, f"train.out_dir={tmp_path}/whole", f"train.max_steps={step + 5}").returncode == 0
    assert losses(run) == losses(tmp_path / "whole")


def test_kill_9_at_any_moment_loses_nothing(tmp_path, corpus):
    """Kills the run 20 times. It writes a checkpoint after every step."""
    run, rng = tmp_path / "run", random.Random(0)
    common = [f"data.path={corpus}", f"train.out_dir={run}", "train.save_every=1", "train.eval_every=3",
              "train.max_steps=100000", "optim.decay_steps=50"]
    last, step = run / "checkpoints" / "last.pt", 0
    for _ in range(20):
        process = start(*common)
        before = last.stat().st_mtime_ns if last.exists() else 0
        wait_for(lambda: last.exists() and last.stat().st_mtime_ns > before, process)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        now = checkpoint.load(last)["step"]
        assert now > step
        step = now
    assert run_train(*common[:2], f"train.max_steps={step + 2}", "optim.decay_steps=50").returncode == 0
    assert [line["step"] for line in read_metrics(run)] == list(range(1, step + 3))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, corpus):
    result = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=200", "optim.lr=1e30",
                       "optim.warmup_steps=4", "train.save_every=1", "optim.max_grad_norm=null")
    assert result.returncode == 1 and "error: at step" in result.stderr and "Traceback" not in result.stderr
    saved = tmp_path / "run" / "checkpoints" / "last.pt"
    if saved.exists():
        assert all(torch.isfinite(w).all() for w in checkpoint.load(saved)["model"].values())


def test_nothing_saved_is_lost(tmp_path, corpus):
    common = [f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=2"]
    assert run_train(*common).returncode == 0
    first = weights(tmp_path / "run")
    other = run_train(*common, "model.num_channels=32")
    assert other.returncode == 2 and "model.num_channels was 16, is 32" in other.stderr
    assert other.stderr.count("\n") == 1 and same_weights(first, weights(tmp_path / "run"))
    for change, message in (("model.num_heads=1", "model.num_heads was 2, is 1"),
                            ("optim.name=lamb", "optim.name was muon, is lamb"),
                            ("data.path=null", f"data.path was {corpus}, is None"),
                            ("train.resume=/nowhere.pt", "/nowhere.pt does not exist")):
        other = run_train(*common, change)
        assert other.returncode == 2 and message in other.stderr and other.stderr.count("\n") == 1
    assert same_weights(first, weights(tmp_path / "run")) and not (tmp_path / "run.1").exists()
    fresh = run_train(*common, "model.num_channels=32", "train.resume=never")
    assert fresh.returncode == 0 and f"is now in {tmp_path}/run.1" in fresh.stderr
    assert same_weights(first, weights(tmp_path / "run.1"))
    elsewhere = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/other", "train.max_steps=3",
                          f"train.resume={tmp_path}/run.1/checkpoints/best.pt")
    assert elsewhere.returncode == 0 and "resumed at step 2" in elsewhere.stdout


def test_a_run_that_cannot_start_leaves_the_earlier_one_where_it_is(tmp_path, corpus):
    common = [f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=2"]
    assert run_train(*common).returncode == 0
    result = run_train(*common, "train.resume=never", "model.init_from=/nonexistent.pt")
    assert result.returncode == 2 and "model.init_from=/nonexistent.pt" in result.stderr, result.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") and not (tmp_path / "run.1").exists()
    started = run_train(*common, "train.resume=never", f"model.init_from={tmp_path}/run/checkpoints/last.pt",
                        "optim.warmup_steps=1000000")
    assert started.returncode == 0 and f"is now in {tmp_path}/run.1" in started.stderr, started.stderr
    before, after = weights(tmp_path / "run.1"), weights(tmp_path / "run")
    assert all((after[name] - before[name]).abs().max() < 1e-6 for name in before)


def test_a_run_with_more_steps_reports_the_new_learning_rate(tmp_path, corpus):
    common = [f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "optim.warmup_steps=1"]
    assert run_train(*common, "train.max_steps=2").returncode == 0
    result = run_train(*common, "train.max_steps=4")
    assert "resumed at step 2; the learning rate is now 0.00225 instead of 0" in result.stdout, result.stderr
    assert [line["lr"] for line in read_metrics(tmp_path / "run")][2:] == pytest.approx([0.00225, 0.00075])


def test_eval_only_writes_nothing(tmp_path, corpus):
    run, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    for name in ("train.txt", "valid.txt"):
        (data / name).write_text(corpus.read_text())
    (data / "test.txt").write_text("0 1 2 3 4 5 6 7 8 9 " * 20)
    common = [f"data.path={data}", f"train.out_dir={run}"]
    result = run_train(*common, "train.eval_only=true")
    assert result.returncode == 2 and f"train.eval_only=true: {run} has no checkpoint" in result.stderr
    assert run_train(*common, "train.max_steps=3", "train.eval_every=2", "optim.lr=0.01").returncode == 0
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    val = read_metrics(run, "val")

    again = run_train(*common, "train.eval_only=true", "train.max_steps=100")
    assert again.returncode == 0 and f"validation: {val[-1]['bits_per_byte']:.3f} bits per byte" in again.stdout
    (run / "checkpoints/best.pt").replace(tmp_path / "step2.pt")  # an earlier checkpoint, elsewhere
    older = run_train(*common, "train.eval_only=true", f"train.resume={tmp_path}/step2.pt")
    (tmp_path / "step2.pt").replace(run / "checkpoints/best.pt")
    assert older.returncode == 0 and "validation: " in older.stdout, older.stderr
    test = run_train(*common, "train.eval_only=true", "data.eval_split=test")
    assert re.search(r"^test: \d.*for the same 199 bytes", test.stdout, re.M), test.stdout
    for result in again, older, test:
        assert "is complete" not in result.stdout
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}.items() <= before.items()


@pytest.mark.parametrize("args, message", [
    (["model.num_latents=999"], "model.num_latents=999 exceeds"),
    (["model.num_heads=3"], "num_heads=3"),
    (["train.gradient_accumulation_steps=3"],
     "data.batch_size=4 is not divisible by train.gradient_accumulation_steps=3 x 1 processes"),
    (["data.path=/nowhere"], "data.path=/nowhere does not exist"),
    (["train.device=cuda"] if not torch.cuda.is_available() else ["train.device=x"], "device"),
    (["train.resume=/nowhere.pt"], "checkpoint /nowhere.pt does not exist"),
    (["model.vocab_size=200"], "model.vocab_size=200"),
    (["modle.vocab_size=200"], "did you mean model?"),
])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, args, message):
    result = run_train(f"train.out_dir={tmp_path}/run", *args)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_a_newer_option_can_be_resumed(tmp_path, corpus):
    run = tmp_path / "run"
    common = [f"data.path={corpus}", f"train.out_dir={run}"]
    assert run_train(*common, "train.max_steps=2").returncode == 0
    last = run / "checkpoints" / "last.pt"
    saved = checkpoint.load(last)
    del saved["config"]["model"]["output_bias"], saved["config"]["data"]["tokenizer"]
    checkpoint.save(saved, last)
    result = run_train(*common, "train.max_steps=3")
    assert result.returncode == 0 and "resumed at step 2" in result.stdout, result.stderr
    result = run_train(*common, "train.max_steps=4", "model.output_bias=false")
    assert result.returncode == 2 and "model.output_bias was True, is False" in result.stderr


def test_a_resumed_run_uses_new_options_of_the_optimizer(tmp_path, corpus):
    common = [f"data.path={corpus}", f"train.out_dir={tmp_path}/run"]
    assert run_train(*common, "train.max_steps=2").returncode == 0
    assert run_train(*common, "train.max_steps=3", "optim.weight_decay=0.5").returncode == 0
    muon, adamw = checkpoint.load(tmp_path / "run/checkpoints/last.pt")["optimizer"]
    groups = muon["param_groups"] + adamw["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5, 0.0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, corpus):
    (tmp_path / "file").write_text("")
    result = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/file/run", "train.max_steps=1")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    result = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/file", "train.max_steps=1")
    assert result.returncode == 2
    assert result.stderr == f"error: cannot write to the folder train.out_dir={tmp_path}/file: Not a directory\n"


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["configs/clm.yaml", "--help"],
                                  ["configs/clm.yaml", "train.seed=1", "-h"]])
def test_help(args):
    result = run_script("train.py", *args)
    assert result.returncode == 0 and "torchrun train.py CONFIG [section.key=value ...]" in result.stdout


def test_no_config_is_a_mistake():
    result = run_script("train.py")
    assert result.returncode == 2 and "error: " in result.stderr and "train.py CONFIG" in result.stderr


def test_samples_are_made_in_evaluation_mode_after_the_checkpoint_is_saved(tmp_path, corpus, monkeypatch):
    config = load_config(ROOT / "configs/clm.yaml", [*TINY, f"data.path={corpus}", f"train.out_dir={tmp_path}/run",
                                                     "train.max_steps=2", "train.eval_every=1"], TASKS)
    seen, saves = [], []

    class Probe(TASKS["causal_lm"]):
        def loss(self, model, batch):
            seen.append(("loss", model.training, torch.is_inference_mode_enabled()))
            return super().loss(model, batch)

        def visualize(self, model):
            seen.append(("visualize", model.training, torch.is_inference_mode_enabled()))
            saves[-1].wait()
            last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
            assert last["task"] == self.state_dict()
            seen.append(last["step"])
            return {}

    class Saver(checkpoint.Saver):
        def save(self, *args):
            saves.append(self)
            super().save(*args)

    monkeypatch.setattr(checkpoint, "Saver", Saver)
    monkeypatch.setitem(TASKS, "causal_lm", Probe)
    monkeypatch.setattr(train, "StopSignal", lambda hours: SimpleNamespace(received=0))
    assert train.train(config, Ranks(0, 1, torch.device("cpu"))) == 0
    step = [("loss", True, False), ("loss", False, True), ("visualize", False, True)]
    seen = [thing for number, thing in enumerate(seen) if thing not in seen[number - 1 : number]]  # drops repeats
    assert seen == [*step, 1, *step, 2]


@pytest.mark.parametrize("capabilities, bf16", [
    ({"avx512_bf16": True, "amx_bf16": False}, True),
    ({"avx512_bf16": False, "amx_bf16": True}, True),
    ({"avx512_bf16": True, "amx_bf16": True, "avx512_fp16": True}, True),
    ({"avx512_bf16": True, "amx_bf16": False, "avx512_fp16": True}, False),  # a virtual machine without AMX
    ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
    ({"neon": True, "bf16": True}, False),
])
def test_automatic_precision_of_a_cpu(monkeypatch, capabilities, bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu = torch.device("cpu")
    assert uses_bf16("auto", cpu) is bf16
    assert uses_bf16("bf16", cpu) and not uses_bf16("float32", cpu)


@pytest.mark.parametrize("amx", [True, False])
def test_automatic_precision_of_a_cpu_in_older_versions_of_torch(monkeypatch, amx):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert uses_bf16("auto", torch.device("cpu")) is amx


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no mallopt")
@pytest.mark.parametrize("variables, kept", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_for_new_arrays(variables, kept):
    """An array of 64 MiB has 16,384 pages, or 32 huge ones. A new one takes those of earlier ones."""
    script = """if True:
        import resource, torch
        from perceiver.distributed import find_device
        find_device("cpu")
        for _ in range(3):
            torch.ones(2**24)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    out = subprocess.run([sys.executable, "-c", script], env=others | variables, capture_output=True, text=True)
    assert (int(out.stdout) < 20) is kept


@pytest.mark.parametrize("bf16", [True, False])
def test_automatic_precision_of_a_gpu(monkeypatch, bf16):
    """What the CPU can do does not matter then."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not bf16}, raising=False)
    gpu = torch.device("cuda")
    assert uses_bf16("auto", gpu) is bf16
    assert uses_bf16("bf16", gpu) and not uses_bf16("float32", gpu)


@pytest.mark.parametrize("name, bf16, peak", [
    ("NVIDIA H100 80GB HBM3", True, 989e12),
    ("NVIDIA A100-SXM4-40GB", False, 156e12),
    ("NVIDIA L4", True, 121e12),
    ("NVIDIA L40S", True, 362e12),
    ("NVIDIA L40", True, 0),  # it is no L4, and not in the table
    ("NVIDIA GeForce RTX 4090", True, 165e12),
    ("Tesla T4", True, 0),
])
def test_peaks_belong_to_whole_names(name, bf16, peak):
    assert peak_flops(name, bf16) == peak


def test_speed_is_measured_without_pauses(monkeypatch):
    """The clock shows 10 s of training, 100 s of evaluation, 10 s of training. An H100 gets 3 batches of two shapes."""
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    counted = []

    def count(task, batch):
        counted.append(batch["x"].shape)
        return 1e15 * len(batch["x"])

    monkeypatch.setattr(speed, "training_flops", count)
    meter = speed.SpeedMeter(SimpleNamespace(rate="tokens_per_s"), torch.device("cpu"), bf16=True)
    meter.peak = speed.peak_flops("NVIDIA H100 80GB HBM3", bf16=True)
    for size in (1, 2, 1):
        meter.count({"x": torch.zeros(size)})
    clock[0] = 10
    with meter.paused():
        clock[0] = 110
    clock[0] = 120
    meter.end_step()
    assert meter.report(samples=5, tokens=500) == {"tokens_per_s": 25, "mfu": pytest.approx(4e15 / 20 / 989e12)}
    assert [len(shape) for shape in counted] == [1, 1]
    clock[0] = 130
    meter.end_step()
    assert meter.report(samples=5, tokens=500) == {"tokens_per_s": 50, "mfu": 0}
    meter = speed.SpeedMeter(SimpleNamespace(rate="samples_per_s"), torch.device("cpu"), bf16=True)
    clock[0] = 135
    meter.end_step()
    assert meter.report(samples=5, tokens=500) == {"samples_per_s": 1}


def test_floating_point_operations_are_counted():
    """A linear map takes 2 per weight and token, attention 4 per query, key and channel. Training triples them."""
    config = load_config(ROOT / "configs/clm.yaml", [*TINY, "data.batch_size=1"], TASKS)
    c, task = config.model, TASKS[config.task](config)
    batch = {"input_ids": torch.zeros(3, 32, dtype=torch.long), "labels": torch.zeros(3, 8, dtype=torch.long)}
    width, n, m = c.num_channels, 8, 32
    # q, output and MLP of every layer; k and v of the latents in self-attention, of all inputs in cross-attention
    layers = (20 * n * (1 + c.num_self_attention_layers) + 4 * n * c.num_self_attention_layers + 4 * m) * width**2
    attention = 4 * (n * m + c.num_self_attention_layers * n * n) * width
    assert training_flops(task, batch) == 3 * 3 * (layers + attention + 2 * n * width * c.vocab_size)


def test_own_token_ids_end_to_end(tmp_path):
    np.save(tmp_path / "ids.npy", np.tile(np.arange(50, dtype=np.uint16), 100))
    args = [f"data.path={tmp_path}/ids.npy", f"train.out_dir={tmp_path}/run", "train.max_steps=3"]
    result = run_train(*args, "model.vocab_size=50")
    assert result.returncode == 0, result.stderr
    assert "bits_per_token" in read_metrics(tmp_path / "run", "val")[0]
    sample = run_script("generate.py", "--ckpt", tmp_path / "run/checkpoints/last.pt", "--prompt", "3 4 5",
                        "--max-new-tokens", "4")
    assert sample.returncode == 0 and len(sample.stdout.split()) == 7, sample.stderr
    too_few = run_train(*args[:1], f"train.out_dir={tmp_path}/other", "model.vocab_size=40")
    assert too_few.returncode == 2 and "token 49" in too_few.stderr
    (tmp_path / "ids.npy").unlink()  # sampling needs only the checkpoint
    again = run_script("generate.py", "--ckpt", tmp_path / "run/checkpoints/last.pt", "--prompt", "3 4 5",
                       "--max-new-tokens", "4")
    assert again.stdout == sample.stdout


@pytest.mark.gpu
def test_training_on_a_gpu_with_compile_and_bf16(tmp_path, corpus):
    result = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=30", "optim.lr=0.01",
                       "train.compile=true", "train.device=cuda", "train.precision=bf16",
                       "model.cross_attention_dropout=0.5")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run")[-1] < 4.5
