import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, run_script, run_train


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """The checkpoint of a model that knows one sentence."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text("the quick brown fox. " * 500)
    result = run_train(f"data.path={folder}/text.txt", f"train.out_dir={folder}/run", "train.max_steps=300",
                       "optim.lr=0.003", "optim.warmup_steps=10", "model.num_channels=32", "model.output_norm=true")
    assert result.returncode == 0, result.stderr
    return folder / "run" / "checkpoints" / "last.pt"


def sample(ckpt, *args, **kwargs):
    return run_script("generate.py", "--ckpt", ckpt, *args, **kwargs)


def test_it_writes_what_it_learned(ckpt):
    result = sample(ckpt, "--prompt", "the quick", "--max-new-tokens", "75", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("the quick brown fox. " * 5)[:84] + "\n"
    assert "tokens/s" in result.stderr


def test_cache_stride_prompt_and_batch(ckpt, tmp_path):
    (tmp_path / "prompt.txt").write_text("the quick brown ")
    args = ["--max-new-tokens", "60", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.99", "--stride", "3"]
    expected = sample(ckpt, "--prompt", "the quick brown ", *args)
    for other in (["--prompt-file", tmp_path / "prompt.txt"], ["--prompt", "the quick brown ", "--no-kv-cache"]):
        assert sample(ckpt, *other, *args).stdout == expected.stdout
    piped = sample(ckpt, "--prompt", "-", *args, input="the quick brown ")
    assert piped.stdout == expected.stdout
    several = sample(ckpt, "--prompt", "the quick brown ", *args, "--num-samples", "2").stdout.split("\n-----\n")
    assert several[0] + "\n" == expected.stdout
    assert several[1] == sample(ckpt, "--prompt", "the quick brown ", *args, "--seed", "1").stdout


def test_samples_end_before_the_stop_text(ckpt):
    args = ["--prompt", "the quick", "--temperature", "0", "--max-new-tokens", "60"]
    result = sample(ckpt, *args, "--stop", "never", "--stop", "x. the")
    assert result.stdout == "the quick brown fo\n" and "15 tokens in" in result.stderr
    assert sample(ckpt, *args, "--stop", "x. the", "--no-prompt").stdout == " brown fo\n"
    several = sample(ckpt, *args, "--stop", "fox", "--num-samples", "2", "--no-prompt").stdout
    assert several == " brown \n-----\n brown \n"


def test_json_for_programs(ckpt):
    args = ["--prompt", "the quick", "--max-new-tokens", "60", "--seed", "7", "--num-samples", "2", "--json"]
    whole = [json.loads(line) for line in sample(ckpt, *args).stdout.splitlines()]
    assert [(line["prompt"], line["seed"], line["num_tokens"], line["ended_by"]) for line in whole] == [
        ("the quick", 7, 60, "length"), ("the quick", 8, 60, "length")]
    stop = whole[0]["text"][20:26]
    ended = [json.loads(line) for line in sample(ckpt, *args, "--stop", stop).stdout.splitlines()]
    for line, before in zip(ended, whole):
        expected, found, _ = before["text"].partition(stop)
        assert line["text"] == expected and line["ended_by"] == ("stop" if found else "length")
    assert ended[0]["num_tokens"] <= 26


def test_no_control_bytes_reach_a_terminal(ckpt):
    """The same command writes the bytes unchanged to a file, and escaped to a terminal. Remarks are not in the text."""
    args = [sys.executable, "generate.py", "--ckpt", ckpt, "--prompt", "\x1b]0;title\a the\tquick",
            "--temperature", "0", "--max-new-tokens", "9"]
    piped = subprocess.run(args, cwd=ROOT, capture_output=True)
    assert piped.stdout.startswith(b"\x1b]0;title\a the\tquick")
    reader, terminal = pty.openpty()
    process = subprocess.Popen(args, cwd=ROOT, stdout=terminal, stderr=subprocess.PIPE)
    remarks = process.communicate()[1]
    os.close(terminal)
    shown = os.read(reader, 10_000)
    assert b"\\x1b]0;title\\x07 the" in shown and b"\x1b" not in shown and b"\a" not in shown
    assert shown.endswith(b"\n") and b"tokens/s" in remarks and b"tokens/s" not in shown


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--compile", "--dtype", "int8"]])
def test_other_dtypes_write_the_same_text(ckpt, options):
    result = sample(ckpt, "--prompt", "the quick", "--max-new-tokens", "75", "--temperature", "0", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("the quick brown fox. " * 5)[:84] + "\n"


def test_a_long_prompt_is_not_cut_silently(ckpt):
    prompt = "the quick brown fox. " * 5
    result = sample(ckpt, "--prompt", prompt, "--max-new-tokens", "9", "--temperature", "0")
    assert result.stdout == prompt + "the quick\n"
    assert "the prompt has 105 tokens" in result.stderr


@pytest.mark.parametrize("args, message", [
    (["--prompt", ""], "prompt"),
    (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
    (["--prompt", "a", "--top-p", "2"], "top_p=2.0"),
    (["--prompt", "a", "--stride", "9"], "stride=9"),
    (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    (["--prompt", "a", "--stop", ""], "--stop"),
    (["--prompt-file", "/nowhere.txt"], "/nowhere.txt"),
    (["--prompt", "a", "--dtype", "int8"], "--compile"),
    (["--prompt", "a", "--compile", "--no-kv-cache"], "cache"),
])
def test_mistakes_are_one_line_and_exit_code_2(ckpt, args, message):
    result = sample(ckpt, *args)
    assert result.returncode == 2 and result.stdout == "" and message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_run_folder_stands_for_its_best_checkpoint(ckpt, tmp_path):
    args = ["--prompt", "the", "--max-new-tokens", "9", "--temperature", "0"]
    run = ckpt.parent.parent
    assert sample(run, *args).stdout == sample(run / "checkpoints/best.pt", *args).stdout != ""


def test_options_of_other_tasks_are_refused(ckpt):
    for option in (["--out", "x.mid"], ["--piano-roll", "x.png"]):
        result = sample(ckpt, "--prompt", "a", *option)
        assert result.returncode == 2 and f"{option[0]} is not for task causal_lm" in result.stderr


def test_help_shows_the_defaults(ckpt):
    text = " ".join(run_script("generate.py", "--help").stdout.split())
    assert "0 always takes the most likely token; default: 0.8" in text and "to generate; default: 512" in text


def test_a_bad_checkpoint_is_one_line_and_exit_code_2(ckpt, tmp_path):
    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "README.md").write_text("# hello")
    for name in ("nowhere.pt", "cut.pt", "text.pt", "README.md", "nowhere"):
        result = sample(tmp_path / name, "--prompt", "a")
        assert result.returncode == 2 and name in result.stderr and result.stderr.count("\n") == 1
        assert "weights_only" not in result.stderr
