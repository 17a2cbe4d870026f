"""Tokenizers of tokenizer.json: text as it streams, corpora in their tokens, a model that is trained on them."""
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import generate
import predict
from conftest import GOLDEN, ROOT, TINY, read_metrics, run_train
from perceiver.config import load_config
from perceiver.data import JsonTokenizer, Tokens, tokenize
from perceiver.data.tokenizer import lines
from perceiver.errors import UserError
from perceiver.pretrained import from_pretrained
from perceiver.tasks import TASKS

TEXT = "Zwölf grüne Flaschen 🍾🍾 standen\n  auf der Mauer, ☕ wohl dem, der 名前 hat.\n" * 20


def byte_bpe(text: str, vocab_size: int = 300) -> str:
    """The JSON of a byte-level BPE, as GPT-2's: its tokens may be parts of a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False))
    return tokenizer.to_str()


def unigram(text: str) -> str:
    """The JSON of a SentencePiece-like Unigram, as XLNet's: the space before a word is part of its token."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(text.splitlines(), trainers.UnigramTrainer(vocab_size=120, show_progress=False))
    return tokenizer.to_str()


def as_corpus(text: str) -> Tokens:
    return Tokens(np.frombuffer(text.encode(), np.uint8), 6)


@pytest.mark.parametrize("make", [byte_bpe, unigram])
@pytest.mark.parametrize("split", [1, 7, 60])
def test_a_stream_is_the_text_and_never_part_of_a_character(make, split):
    tokenizer = JsonTokenizer(make(TEXT), "here")
    tokens = tokenizer.encode(TEXT)
    text = tokenizer.decode(tokens)
    assert text == (TEXT if make is byte_bpe else " ".join(TEXT.split()) + " ").rstrip("\n") + "\n" * (make is byte_bpe)
    stream = tokenizer.new_stream()
    parts = [tokenizer.stream(tokens[:split], stream, final=True)]
    parts += [tokenizer.stream([token], stream) for token in tokens[split:]]
    assert tokenizer.stream([], stream, final=True) == ""
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts[1:])
    if make is byte_bpe:
        assert "" in parts  # it did wait


def test_bytes_that_are_no_character():
    tokenizer = JsonTokenizer(byte_bpe(TEXT), "here")
    stream, first = tokenizer.new_stream(), tokenizer.encode("🦊")[0]  # not in TEXT
    assert tokenizer.stream([first], stream) == "" and tokenizer.stream([], stream, final=True) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"  # as generate.py reads a prompt
    assert tokenizer.decode([0]) == "" and tokenizer.tokenizer.id_to_token(0) == "<end>"


@pytest.mark.parametrize("size", [1, 5, 64, 10_000])
def test_lines_are_the_text(size):
    parts = list(lines(as_corpus(TEXT).values, size))
    assert "".join(parts) == TEXT
    if size == 64:
        assert len(parts) > 20 and sum(part.endswith("\n") for part in parts) == 40
    assert "".join(lines(np.frombuffer(b"ab\xff\n\xc3", np.uint8))) == "ab\ufffd\n\ufffd"


def test_a_corpus_is_encoded_once(tmp_path, monkeypatch):
    tokenizer = JsonTokenizer(byte_bpe(TEXT), "here")
    tokens = tokenize(as_corpus(TEXT), tokenizer, tmp_path / "new")
    assert tokens[:].tolist() == tokenizer.encode(TEXT) and tokens.values.dtype == np.uint16
    assert len(tokens) < len(TEXT.encode()) / 2
    other = JsonTokenizer(byte_bpe(TEXT, 280), "here")
    assert len(tokenize(as_corpus(TEXT), other, tmp_path / "new")) > len(tokens)
    assert len(tokenize(as_corpus(TEXT[:-9]), tokenizer, tmp_path / "new")) < len(tokens)
    assert len(list((tmp_path / "new").iterdir())) == 3
    monkeypatch.setattr("perceiver.data.tokenizer.lines", None)  # there is no second time
    assert np.array_equal(tokenize(as_corpus(TEXT), tokenizer, tmp_path / "new").values, tokens.values)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A run on one sentence in the tokens of a BPE, which is gone when it ends."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "the quick brown fox 🦊🦊 jumps over the lazy dog. " * 300
    (folder / "text.txt").write_text(text)
    (folder / "tokenizer.json").write_text(byte_bpe(text, 280))
    result = run_train(*tokenized(folder), f"train.out_dir={folder}/run", "train.max_steps=200", "optim.lr=0.003",
                       "optim.warmup_steps=10", "model.num_channels=32", "model.output_norm=true", "data.num_workers=1",
                       "train.log_every=50")
    assert result.returncode == 0, result.stderr
    assert "forked" not in result.stderr
    (folder / "tokenizer.json").rename(folder / "moved.json")
    return folder, result.stdout


def tokenized(folder: Path) -> list[str]:
    return [f"data.path={folder}/text.txt", f"data.tokenizer={folder}/tokenizer.json", f"data.cache_dir={folder}/cache",
            "model.vocab_size=280"]


def test_bits_are_those_of_the_same_text(run):
    folder, out = run
    val, text = read_metrics(folder / "run", "val")[-1], (folder / "text.txt").read_bytes()
    tokenizer = JsonTokenizer.read(folder / "moved.json")
    end = text[int(len(text) * 0.98) :][:200]  # clm.yaml's val_fraction, TINY's max_val_tokens
    tokens = tokenizer.encode(end.decode())
    first = len(tokenizer.decode(tokens[:1]).encode())
    assert val["bits_per_token"] == pytest.approx(val["loss"] / math.log(2))
    assert val["bits_per_byte"] == pytest.approx(val["bits_per_token"] * (len(tokens) - 1) / (len(end) - first))
    assert f"{val['bits_per_byte']:.3f} bits per byte; for the same {len(end) - first} bytes" in out
    assert {"bits_per_token", "bits_per_byte"} <= read_metrics(folder / "run")[-1].keys()


@pytest.fixture
def generated(monkeypatch, capfd):
    """What generate.py writes, without a process of its own."""
    def run(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["generate.py", "--temperature", "0", *map(str, args)])
        generate.main(generate.parse_args())
        return capfd.readouterr().out

    return run


def test_generation_needs_no_file(run, generated):
    args = ["--ckpt", run[0] / "run/checkpoints/last.pt", "--prompt", "the quick brown"]
    text = generated(*args, "--max-new-tokens", "30")
    assert text.startswith("the quick brown fox 🦊🦊 jumps over the lazy dog. the quick")
    several = generated(*args, "--max-new-tokens", "12", "--num-samples", "2", "--tokenizer", run[0] / "moved.json")
    first, second = several.split("\n-----\n")
    assert second == first + "\n" and text.startswith(first)


def test_published_weights_with_a_tokenizer(tmp_path, generated):
    folder = shutil.copytree(GOLDEN / "krasserm" / "hf-clm", tmp_path / "model")
    args = ["--ckpt", folder, "--max-new-tokens", "40", "--prompt", "abc"]
    with pytest.raises(UserError, match="without a tokenizer.json"):
        generated(*args)
    words = {letter: number for number, letter in enumerate("abcdefghijklmnopqrs")}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = generated(*args)
    prompt = torch.tensor([[0, 1, 2]])
    with torch.inference_mode():
        best = from_pretrained(folder)(prompt)[0, -1].argmax().item()
    assert text.startswith("abc" + "abcdefghijklmnopqrs"[best]) and len(text) == 3 + 40 + 1
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "perceiver-ar-symbolic-audio-model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model.vocab_size=19 must be 389"):  # it is taken for a model of music
        generated(*args)
    with pytest.raises(UserError, match="use generate.py"):
        predict.load(str(folder), "deepmind", torch.device("cpu"))
    with pytest.raises(UserError, match="is for predict.py"):
        generated("--ckpt", GOLDEN / "masked-lm", "--prompt", "a")


def test_mistakes_are_told(run, tmp_path, monkeypatch):
    def load(*args: str) -> str:
        config = load_config(ROOT / "configs/clm.yaml", [*TINY, *tokenized(run[0]),
                                                         f"data.tokenizer={run[0]}/moved.json", *args], TASKS)
        with pytest.raises(UserError) as error:
            TASKS["causal_lm"](config).load_data()
        return str(error.value)

    assert "model.vocab_size=279 is too small for data.tokenizer=" in load("model.vocab_size=279")
    assert "cannot read /nowhere.json" in load("data.tokenizer=/nowhere.json")
    (tmp_path / "no.json").write_text(json.dumps({"version": "1.0"}))
    assert "no.json holds no tokenizer: " in load(f"data.tokenizer={tmp_path}/no.json")
    with pytest.raises(UserError, match="data.tokenizer=x.json is for causal_lm"):
        load_config(ROOT / "configs/mlm.yaml", ["data.tokenizer=x.json"], TASKS)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load().endswith("needs the package tokenizers: pip install tokenizers")
