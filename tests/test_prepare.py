"""python -m perceiver.prepare: large texts become one file of tokens or bytes."""
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import ROOT
from perceiver import prepare
from perceiver.data import CorpusConfig, JsonTokenizer, load_corpus
from perceiver.errors import UserError


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer.json whose tokens are words and line ends."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<end>", "\n", *(f"w{n}" for n in range(100))]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split("\n", "isolated"), tokenizers.pre_tokenizers.Split(" ", "removed")])
    words.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def write_inputs(folder):
    """Three files with 6 documents. Returns the texts of the documents."""
    folder.mkdir()
    documents = [" ".join(f"w{(7 * n + k) % 100}" for k in range(20 + n)) + "\n" for n in range(6)]
    lines = [json.dumps({"text": text}) for text in documents]
    (folder / "a.jsonl").write_text("\n".join(lines[:3]) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[3:5]))
    (folder / "c.txt").write_text(documents[5])
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    return documents


def run(*args):
    sys_argv, sys.argv = sys.argv, ["prepare", *map(str, args)]
    try:
        prepare.prepare(prepare.parse_args())
    finally:
        sys.argv = sys_argv


def test_bytes(tmp_path, capsys):
    documents = write_inputs(tmp_path / "in")
    run(tmp_path / "in", "--out", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "".join(text + "\n\n" for text in documents)
    assert os.listdir(tmp_path / "in") and sorted(os.listdir(tmp_path)) == ["in", "out.txt"]
    captured = capsys.readouterr()
    assert "picture.png is not text" in captured.err and "bytes of 4 files" in captured.out


def test_tokens_and_training_on_them(tmp_path, tokenizer):
    documents = write_inputs(tmp_path / "in")
    out = tmp_path / "corpus" / "train.npy"
    run(tmp_path / "in", "--out", out, "--tokenizer", tokenizer, "--end-of-text", "<end>")
    encode = JsonTokenizer.read(tokenizer).encode
    expected = [token for text in documents for token in [*encode(text), 1]]
    found = np.load(out, mmap_mode="r")
    assert found.dtype == np.uint16 and found.tolist() == expected
    corpus = load_corpus(CorpusConfig(path=str(out)))
    assert corpus.holds_ids and len(corpus.train) + len(corpus.val) == len(expected)


def test_a_killed_job_continues(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text("".join(f"w{n % 100} w{n % 7}\n" for n in range(150_000)))
    command = [sys.executable, "-m", "perceiver.prepare", tmp_path / "in", "--tokenizer", tokenizer, "--out"]
    slow = "from perceiver import prepare; prepare.SAVE_SECONDS = 0; prepare.BATCH = 2**18; import time\n" \
        "encode = prepare.Encoder.__call__\n" \
        "prepare.Encoder.__call__ = lambda self, batch: (time.sleep(0.1), encode(self, batch))[1]\n" \
        "prepare.prepare(prepare.parse_args())"
    process = subprocess.Popen([sys.executable, "-c", slow, *command[3:], tmp_path / "out.npy"], cwd=ROOT,
                               stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.npy.state").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = json.loads((tmp_path / "out.npy.state").read_text())
    assert not (tmp_path / "out.npy").exists() and (state["file"], state["batch"]) > (0, 0)
    with open(tmp_path / "out.npy.partial", "ab") as partial:
        partial.write(b"half a batch")
    monkeypatch.setattr(prepare, "BATCH", 2**18)
    run(*command[3:], tmp_path / "out.npy")
    run(*command[3:], tmp_path / "whole.npy")
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not list(tmp_path.glob("*.state")) and not list(tmp_path.glob("*.partial"))


def test_broken_lines_are_left_out_up_to_a_limit(tmp_path, capsys):
    good = [json.dumps({"text": f"text {n}"}) for n in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, "{", '{"other": 1}', "[1]"]) + "\n")
    run(tmp_path / "a.jsonl", "--out", tmp_path / "a.txt")
    assert capsys.readouterr().err.count("left out") == 3
    assert (tmp_path / "a.txt").read_text() == "".join(f"text {n}\n\n" for n in range(2000))
    (tmp_path / "a.jsonl").write_text("\n".join(["{"] * 30 + good))
    with pytest.raises(UserError, match="line 11 holds no text .* unreadable"):
        run(tmp_path / "a.jsonl", "--out", tmp_path / "a.txt")


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one\ntwo\n" * 100_000))
    run(tmp_path / "a.txt.zst", "--out", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"one\ntwo\n" * 100_000 + b"\n\n"


@pytest.mark.parametrize("args, message", [
    (["nowhere", "--out", "a.txt"], "nowhere does not exist"), (["empty", "--out", "a.txt"], "holds no files"),
    (["b.txt", "--out", "a.npy"], "must end in .txt without --tokenizer"),
    (["b.txt", "--out", "a.txt"], "holds no text"),
    (["broken.gz", "--out", "a.txt"], "cannot read broken.gz")])
def test_mistakes_are_one_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.txt").touch()
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(UserError, match=message):
        run(*args)
    assert not (tmp_path / args[2]).exists()
