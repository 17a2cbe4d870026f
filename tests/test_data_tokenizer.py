"""Tokenizers, streaming, tokenized corpora, and a model that is trained on tokens."""
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
from perceiver.data import (ByteTokenizer, IdTokenizer, JsonTokenizer, StreamDecoder, Tokens, text_parts, tokenize,
                            tokenizer_from_state, tokenizer_state)
from perceiver.errors import UserError
from perceiver.pretrained import from_pretrained
from perceiver.tasks import TASKS

TEXT = "Zwölf grüne Flaschen 🍾🍾 standen\n  auf der Mauer, ☕ wohl dem, der 名前 hat.\n" * 20


def byte_bpe(text: str, vocab_size: int = 300) -> str:
    """The JSON of a byte-level BPE like GPT-2's. A token may be a part of a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False))
    return tokenizer.to_str()


def unigram(text: str) -> str:
    """The JSON of a SentencePiece Unigram like XLNet's. The space before a word is part of its token."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(text.splitlines(), trainers.UnigramTrainer(vocab_size=120, show_progress=False))
    return tokenizer.to_str()


def byte_fallback(text: str) -> str:
    """The JSON of a BPE like Llama's. The bytes of an unknown character become the tokens <0x00> to <0xFF>."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "b": 258}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer.to_str()


def as_corpus(text: str) -> Tokens:
    return Tokens(np.frombuffer(text.encode(), np.uint8), 6)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_bytes_are_tokens_as_in_deepminds_tokenizer():
    tokenizer = ByteTokenizer()
    # " missing." in DeepMind's colab of the masked language model
    assert tokenizer.encode(" missing.") == [38, 115, 111, 121, 121, 111, 116, 109, 52]
    text = "naïve 🙂 \0 \x7f"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, *tokenizer.encode("a"), 3, 0]) == "a"
    assert tokenizer.encode("\udcff") == [255 + 6]  # Python reads an invalid byte as such a surrogate


def test_ids_are_written_as_numbers():
    assert IdTokenizer().encode(" 3 4\n50 ") == [3, 4, 50]
    with pytest.raises(UserError, match="numbers"):
        IdTokenizer().encode("def")


def test_a_checkpoint_restores_the_tokenizer():
    for tokenizer in ByteTokenizer(), IdTokenizer(), JsonTokenizer(byte_bpe(TEXT), "here"):
        state = json.loads(json.dumps(tokenizer_state(tokenizer)))
        restored = tokenizer_from_state(state)
        assert type(restored) is type(tokenizer) and restored.encode("17 4") == tokenizer.encode("17 4")
    assert ByteTokenizer.unit == "byte" and IdTokenizer.unit == JsonTokenizer.unit == "token"


# ----------------------------------------------------------------------------------------------------------------------
# Streaming


def test_streaming_holds_unfinished_characters_back():
    tokenizer = ByteTokenizer()
    stream = StreamDecoder(tokenizer, [])
    assert [stream.push([token]) for token in tokenizer.encode("é🙂")] == ["", "é", "", "", "", "🙂"]
    assert stream.push(tokenizer.encode("é")[:1]) == "" and stream.finish() == "\ufffd"


@pytest.mark.parametrize("make", [byte_bpe, unigram, byte_fallback])
@pytest.mark.parametrize("split", [1, 7, 60])
def test_a_stream_is_the_text_and_never_part_of_a_character(make, split):
    tokenizer = JsonTokenizer(make(TEXT), "here")
    tokens = tokenizer.encode(TEXT)
    text = tokenizer.decode(tokens)
    if make is unigram:
        assert text == " ".join(TEXT.split()) + " "
    else:
        assert text == TEXT
    stream = StreamDecoder(tokenizer, tokens[:split])
    parts = [stream.push([token]) for token in tokens[split:]]
    assert stream.finish() == ""
    prompt = tokenizer.decode(tokens[:split])
    assert prompt + "".join(parts) == text or "\ufffd" in prompt  # unless the prompt ends within a character
    assert not any("\ufffd" in part for part in parts)
    if make is byte_fallback:
        assert "" in parts  # it waited for whole characters


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_of_any_bytes_is_their_text(seed):
    """The bytes include invalid characters. Then come 20 special tokens, more than the decoder looks back."""
    rng = np.random.default_rng(seed)
    pieces = [b"a", "é".encode(), "🙂".encode(), b"\xff", b"\xf0\x9f", b"\xe5", b"\x80", "\ufffd".encode()]
    data = b"".join(pieces[number] for number in rng.integers(len(pieces), size=300))
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(data)
    whole = tokenizer.decode(tokens)
    cut = next(cut for cut in rng.integers(1, 100, size=100) if whole.startswith(tokenizer.decode(tokens[:cut])))
    tokens += [ByteTokenizer.EOS] * 20 + tokenizer.encode("end")  # special tokens have no text
    whole = tokenizer.decode(tokens)
    stream = StreamDecoder(tokenizer, tokens[:cut])
    text = tokenizer.decode(tokens[:cut])
    while cut < len(tokens):
        size = int(rng.integers(1, 4))
        text += stream.push(tokens[cut : cut + size])
        cut += size
        assert 0 <= len(tokenizer.decode(tokens[:cut])) - len(text) <= 3
    assert text + stream.finish() == whole


def test_a_stream_returns_endless_invalid_bytes():
    tokenizer = ByteTokenizer()
    stream = StreamDecoder(tokenizer, tokenizer.encode("a"))
    parts = [stream.push([0xff + 6]) for _ in range(1000)]
    assert sum(map(len, parts)) >= 997 and "".join(parts) + stream.finish() == "\ufffd" * 1000
    assert len(stream.tokens) <= 20  # it forgets tokens whose text it returned, so a push takes constant time
    fallback = JsonTokenizer(byte_fallback(""), "here")
    stream = StreamDecoder(fallback, fallback.encode("a"))
    assert sum(len(stream.push([0xff])) for _ in range(100)) >= 97
    assert "b" in stream.push(fallback.encode("b"))


def test_bytes_that_are_no_character():
    tokenizer = JsonTokenizer(byte_bpe(TEXT), "here")
    stream, first = StreamDecoder(tokenizer, []), tokenizer.encode("🦊")[0]  # TEXT has no such character
    assert stream.push([first]) == "" and stream.finish() == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"  # generate.py reads invalid bytes as surrogates
    assert tokenizer.decode([0]) == "" and tokenizer.tokenizer.id_to_token(0) == "<end>"


# ----------------------------------------------------------------------------------------------------------------------
# Tokenized corpora


@pytest.mark.parametrize("size", [1, 5, 64, 10_000])
def test_parts_are_the_text(size):
    parts = list(text_parts(as_corpus(TEXT).values, size))
    assert "".join(parts) == TEXT
    if size == 64:
        assert len(parts) > 20 and sum(part.endswith("\n") for part in parts) == 40
    assert "".join(text_parts(np.frombuffer(b"ab\xff\n\xc3", np.uint8))) == "ab\ufffd\n\ufffd"


def test_a_corpus_is_encoded_once(tmp_path, monkeypatch):
    tokenizer = JsonTokenizer(byte_bpe(TEXT), "here")
    tokens = tokenize(as_corpus(TEXT), tokenizer, tmp_path / "new")
    assert tokens[:].tolist() == tokenizer.encode(TEXT) and tokens.values.dtype == np.uint16
    assert isinstance(tokens.values, np.memmap)
    assert len(tokens) < len(TEXT.encode()) / 2
    other = JsonTokenizer(byte_bpe(TEXT, 280), "here")
    assert len(tokenize(as_corpus(TEXT), other, tmp_path / "new")) > len(tokens)
    assert len(tokenize(as_corpus(TEXT[:-9]), tokenizer, tmp_path / "new")) < len(tokens)
    assert len(list((tmp_path / "new").iterdir())) == 3
    monkeypatch.setattr("perceiver.data.text_parts", None)  # a second encoding would fail
    assert np.array_equal(tokenize(as_corpus(TEXT), tokenizer, tmp_path / "new").values, tokens.values)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A run on one sentence in the tokens of a BPE. Afterwards, its tokenizer.json has another name."""
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
    end = text[int(len(text) * 0.98) :][:200]  # clm.yaml's val_fraction, TINY's val_size
    tokens = tokenizer.encode(end.decode())
    first = len(tokenizer.decode(tokens[:1]).encode())
    assert val["bits_per_token"] == pytest.approx(val["loss"] / math.log(2))
    assert val["bits_per_byte"] == pytest.approx(val["bits_per_token"] * (len(tokens) - 1) / (len(end) - first))
    assert f"{val['bits_per_byte']:.3f} bits per byte; for the same {len(end) - first} bytes" in out
    assert {"bits_per_token", "bits_per_byte"} <= read_metrics(folder / "run")[-1].keys()


@pytest.fixture
def generated(monkeypatch, capfd):
    """A function that runs generate.py in this process and returns its output."""
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


def test_published_weights_with_a_tokenizer(tmp_path, generated, monkeypatch):
    folder = shutil.copytree(GOLDEN / "krasserm" / "hf-clm", tmp_path / "model")
    args = ["--ckpt", folder, "--max-new-tokens", "40", "--prompt", "abc"]
    with pytest.raises(UserError, match="tokenizer.json"):
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
    monkeypatch.setattr(sys, "argv", ["predict.py", "--ckpt", str(folder), "a.txt"])
    with pytest.raises(UserError, match="use generate.py"):
        predict.main(predict.parse_args())
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "perceiver-ar-symbolic-audio-model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model.vocab_size=19 .*389"):  # now it counts as a model of music
        generated(*args)
    with pytest.raises(UserError, match="use predict.py"):
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
    assert "no.json: " in load(f"data.tokenizer={tmp_path}/no.json")
    with pytest.raises(UserError, match="tokenizer"):  # masked_lm works on bytes only
        load_config(ROOT / "configs/mlm.yaml", ["data.tokenizer=x.json"], TASKS)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load().endswith("needs the package tokenizers: pip install tokenizers")
