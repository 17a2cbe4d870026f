"""train.py as it is used: in processes of its own, from the command line."""
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY, read_metrics, run_script, run_train
from perceiver import checkpoint
from perceiver.config import load_config
from perceiver.speed import training_flops
from perceiver.tasks import TASKS


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def weights(run, name="last.pt"):
    return checkpoint.load(run / "checkpoints" / name)["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


DROPOUT = ["model.cross_attention_dropout=0.5", "model.residual_dropout=0.1", "model.post_attention_dropout=0.1"]


def test_the_readme_recipe_has_its_parameters_without_data():
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
    assert train[-1]["loss"] < 4 < train[0]["loss"]  # it learns: the text has few characters
    assert re.search(r"validation: \d\.\d+ bits per byte; .*gzip -9 needs .* xz -9", result.stdout)
    assert "----- sample" in result.stdout
    assert (run / "config.yaml").exists() and list(run.glob("events.out.tfevents.*"))
    saved = checkpoint.load(run / "checkpoints" / "last.pt")
    assert saved["step"] == 20 and saved["config"]["optim"]["lr"] == 0.01 
    best = checkpoint.load(run / "checkpoints" / "best.pt")
    assert saved["best_loss"] == best["best_loss"] == min(line["loss"] for line in val)

    again = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=20")
    assert again.returncode == 0 and "the run is complete" in again.stdout, again.stderr
    assert losses(run) == [line["loss"] for line in train]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted(tmp_path, corpus, workers):
    common = [f"data.path={corpus}", "optim.decay_steps=20", "train.eval_every=7", f"data.num_workers={workers}",
              *DROPOUT]
    assert run_train(*common, f"train.out_dir={tmp_path}/a", "train.max_steps=20").returncode == 0
    assert run_train(*common, f"train.out_dir={tmp_path}/b", "train.max_steps=10").returncode == 0
    result = run_train(*common, f"train.out_dir={tmp_path}/b", "train.max_steps=20")
    assert "resumed at step 10" in result.stdout, result.stderr
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 20
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("processes, accumulate", [(2, 1), (2, 2), (1, 2)])
def test_ranks_and_micro_batches_change_nothing(tmp_path, corpus, processes, accumulate):
    common = [f"data.path={corpus}", "train.max_steps=10", "model.cross_attention_dropout=0.5"]
    assert run_train(*common, f"train.out_dir={tmp_path}/one").returncode == 0
    result = run_train(*common, f"train.out_dir={tmp_path}/many", f"train.accumulate={accumulate}", processes=processes)
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
def test_a_signal_saves_and_the_run_goes_on(tmp_path, corpus, number):
    common = [f"data.path={corpus}", "optim.decay_steps=300", "train.save_every=1000", "train.eval_every=1000",
              *DROPOUT]
    run = tmp_path / "run"
    process = start(*common, f"train.out_dir={run}", "train.max_steps=300", "data.num_workers=2")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run)) >= 5, process)
    os.killpg(process.pid, number)  # as torchrun and a terminal do: data workers get it too
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert f"stopped by {number.name} after step" in output and "Traceback" not in output
    step = checkpoint.load(run / "checkpoints" / "last.pt")["step"]
    assert 5 <= step < 300
    assert run_train(*common, f"train.out_dir={run}", f"train.max_steps={step + 5}").returncode == 0
    assert run_train(*common, f"train.out_dir={tmp_path}/whole", f"train.max_steps={step + 5}").returncode == 0
    assert losses(run) == losses(tmp_path / "whole")


def test_kill_9_at_any_moment_loses_nothing(tmp_path, corpus):
    """20 times, while a checkpoint is written after every step."""
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
                            ("optim.name=lamb", "optim.name was adamw, is lamb"),
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


@pytest.mark.parametrize("args, message", [
    (["model.num_latents=999"], "model.num_latents=999 exceeds"),
    (["model.num_heads=3"], "num_heads=3"),
    (["train.accumulate=3"], "data.batch_size=4 is not divisible by train.accumulate=3"),
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


def test_a_checkpoint_of_before_an_option_was_there_goes_on(tmp_path, corpus):
    run = tmp_path / "run"
    common = [f"data.path={corpus}", f"train.out_dir={run}"]
    assert run_train(*common, "train.max_steps=2").returncode == 0
    last = run / "checkpoints" / "last.pt"
    saved = checkpoint.load(last)
    del saved["config"]["model"]["rotary"], saved["config"]["data"]["tokenizer"]
    checkpoint.save(saved, last)
    result = run_train(*common, "train.max_steps=3")
    assert result.returncode == 0 and "resumed at step 2" in result.stdout, result.stderr
    result = run_train(*common, "train.max_steps=4", "model.activation=squared_relu")
    assert result.returncode == 2 and "model.activation was gelu, is squared_relu" in result.stderr


def test_options_of_the_optimizer_count_when_a_run_goes_on(tmp_path, corpus):
    common = [f"data.path={corpus}", f"train.out_dir={tmp_path}/run"]
    assert run_train(*common, "train.max_steps=2").returncode == 0
    assert run_train(*common, "train.max_steps=3", "optim.weight_decay=0.5").returncode == 0
    groups = checkpoint.load(tmp_path / "run/checkpoints/last.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, corpus):
    (tmp_path / "file").write_text("")
    result = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/file/run", "train.max_steps=1")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_floating_point_operations_are_counted():
    """Of linear maps 2 a weight and token, of attention 4 a query, key and channel; three times that to train."""
    config = load_config(ROOT / "configs/clm.yaml", [*TINY, "data.batch_size=1"], TASKS)
    c, task = config.model, TASKS[config.task](config)
    batch = {"input_ids": torch.zeros(3, 32, dtype=torch.long), "labels": torch.zeros(3, 8, dtype=torch.long)}
    width, n, m = c.num_channels, 8, 32
    # q, output and MLP of every layer; k and v of the latents in the others, of all inputs in the cross-attention
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
    (tmp_path / "ids.npy").unlink()  # a checkpoint is enough to sample from
    again = run_script("generate.py", "--ckpt", tmp_path / "run/checkpoints/last.pt", "--prompt", "3 4 5",
                       "--max-new-tokens", "4")
    assert again.stdout == sample.stdout


@pytest.mark.gpu
def test_training_on_a_gpu_with_compile_and_bf16(tmp_path, corpus):
    result = run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=30", "optim.lr=0.01",
                       "train.compile=true", "train.device=cuda", "model.cross_attention_dropout=0.5")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run")[-1] < 4.5
