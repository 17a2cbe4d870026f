"""Masked words and texts with labels."""
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver.data import (IGNORE, ByteTokenizer, LabelledText, MaskedBlocks, MaskedTextDataConfig, MaskedWindows,
                            Shuffled, TextClassificationDataConfig, TextDataConfig, Tokens, TrainKeys, eval_loader,
                            load_labelled_text, load_text, train_loader)
from perceiver.distributed import Ranks
from perceiver.errors import UserError

ONE = Ranks(0, 1, torch.device("cpu"))
decode = ByteTokenizer().decode


def words_of(length: int, seed: int = 0) -> Tokens:
    """Words of 1 to 9 bytes each, between whitespace of all kinds."""
    rng = np.random.default_rng(seed)
    text = b""
    while len(text) < length:
        text += bytes(rng.integers(97, 123, rng.integers(1, 10)).astype(np.uint8)) + rng.choice([b" ", b"\n", b"\t  "])
    return Tokens(np.frombuffer(text[:length], np.uint8), 6)


def spans(ids: np.ndarray) -> list[slice]:
    """The words, found by Python's own split."""
    text, found, start = bytes((ids - 6).astype(np.uint8)), [], 0
    for word in text.split():
        start = text.index(word, start)
        found.append(slice(start, start + len(word)))
        start += len(word)
    return found


def test_whole_words_are_masked_as_often_as_they_should():
    tokens = words_of(100_000)
    example = MaskedWindows(tokens, len(tokens), 0.15, seed=0)[0, 0]
    ids, inputs, labels = tokens[:], example["input_ids"], example["labels"]
    words = spans(ids)
    # Whole words are chosen, and nothing else.
    chosen = [word for word in words if (labels[word] != IGNORE).any()]
    assert all(np.array_equal(labels[word], ids[word]) for word in chosen)
    assert (labels != IGNORE).sum() == sum(word.stop - word.start for word in chosen)
    assert len(chosen) / len(words) == pytest.approx(0.15, abs=0.01)
    assert np.array_equal(inputs[labels == IGNORE], ids[labels == IGNORE])

    masked = [word for word in chosen if (inputs[word] == ByteTokenizer.MASK).any()]
    assert all((inputs[word] == ByteTokenizer.MASK).all() for word in masked)
    long = [word for word in chosen if word.stop - word.start > 3]  # four random bytes are hardly the same by chance
    kept = [word for word in long if np.array_equal(inputs[word], ids[word])]
    masked = [word for word in masked if word in long]
    assert len(masked) / len(long) == pytest.approx(0.8, abs=0.04)
    assert len(kept) / len(long) == pytest.approx(0.1, abs=0.03)
    replaced = np.concatenate([inputs[word] for word in long if word not in masked and word not in kept])
    assert replaced.min() >= 6 and replaced.max() < 262 and len(set(replaced)) > 240  # any bytes


def test_masks_are_a_function_of_seed_step_and_index():
    tokens = words_of(5000)
    windows = MaskedWindows(tokens, 64, 0.15, seed=0)
    assert all(np.array_equal(windows[3, 1][name], windows[3, 1][name]) for name in ("input_ids", "labels"))
    for other in (windows[3, 2], windows[4, 1], MaskedWindows(tokens, 64, 0.15, seed=1)[3, 1]):
        assert not np.array_equal(other["input_ids"], windows[3, 1]["input_ids"])
    batches = [list(train_loader(windows, TrainKeys(4, 2, ONE, 0, 2), workers)) for workers in (0, 2)]
    for a, b in zip(*batches, strict=True):
        assert set(a) == {"input_ids", "labels"} and a["input_ids"].dtype == torch.long
        assert all(torch.equal(a[name], b[name]) for name in a)
    whole = MaskedWindows(Tokens(words_of(66).values, 6), 64, 0.15, 0)  # every place it can have
    starts = {decode([t if l == IGNORE else l for t, l in zip(e["input_ids"], e["labels"])])
              for e in (whole[step, 0] for step in range(40))}
    assert len(starts) >= 3


def test_validation_blocks_cover_the_text_with_fixed_masks():
    tokens = words_of(150)
    blocks = MaskedBlocks(tokens, 64, 0.15)
    assert len(blocks) == 3
    text = []
    for index in range(3):
        block, again = blocks[index], MaskedBlocks(tokens, 64, 0.15)[index]
        assert all(np.array_equal(block[name], again[name]) for name in block)
        real = ~block["pad_mask"]
        chosen = block["labels"] != IGNORE
        assert chosen.any() and not (chosen & ~real).any() and (block["input_ids"][~real] == ByteTokenizer.PAD).all()
        assert chosen[block["input_ids"] == ByteTokenizer.MASK].all()
        if index != 2:
            assert real.all()
        text += [np.where(chosen, block["labels"], block["input_ids"])[real]]
    padded = blocks[2]["pad_mask"]
    assert padded.tolist() == [False] * 22 + [True] * 42
    batches = list(eval_loader(blocks, 2, ONE, 0))
    assert "pad_mask" not in batches[0] and torch.equal(batches[1]["pad_mask"][0], torch.from_numpy(padded))


def test_every_text_has_something_to_predict():
    for text in (b"a", b"ab cd", b" x "):
        labels = MaskedBlocks(Tokens(np.frombuffer(text, np.uint8), 6), 8, 0.01)[0]["labels"]
        assert (labels != IGNORE).any()
    assert (MaskedBlocks(Tokens(np.frombuffer(b" \n", np.uint8), 6), 8, 0.01)[0]["labels"] == IGNORE).all()
    assert MaskedBlocks(Tokens(np.frombuffer(b"a b", np.uint8), 6), 3, 1.0)[0]["labels"].tolist() == [103, IGNORE, 104]
    with pytest.raises(UserError, match="10 bytes.*max_seq_len=11"):
        MaskedWindows(words_of(10), 11, 0.15, 0)
    with pytest.raises(UserError, match="token ids"):
        MaskedWindows(Tokens(np.arange(100)), 11, 0.15, 0)
    with pytest.raises(ValueError, match="mask_prob=0"):
        MaskedTextDataConfig(mask_prob=0)


def write(root: Path, texts: dict[str, str | bytes]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def acl_imdb(root: Path) -> Path:
    texts = {f"aclImdb/{split}/{kind}/{n}_{rating}.txt": f"{split} {kind} {n}"
             for split in ("train", "test") for kind, rating in (("neg", 1), ("pos", 9)) for n in range(3)}
    texts |= {"aclImdb/train/unsup/7_0.txt": "train unsup 7", "aclImdb/train/labeledBow.feat": "9 0:9",
              "aclImdb/README": "no", "aclImdb/train/urls_pos.txt": "no"}
    return write(root, texts)


def texts_of(examples: LabelledText) -> list[tuple[str, str]]:
    return [(examples.class_names[example["label"]], decode(example["input_ids"]))
            for example in (examples[n] for n in range(len(examples)))]


@pytest.mark.parametrize("packed", [False, True])
def test_imdb(tmp_path, packed):
    acl_imdb(tmp_path)
    if packed:
        with tarfile.open(tmp_path / "aclImdb_v1.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "aclImdb", "aclImdb")
        (tmp_path / "aclImdb").rename(tmp_path / "elsewhere")
    config = TextClassificationDataConfig(dataset="imdb", cache_dir=str(tmp_path))
    train, val = load_labelled_text(config, max_seq_len=20)
    assert train.class_names == val.class_names == ["neg", "pos"]
    for examples, split in ((train, "train"), (val, "test")):
        assert texts_of(examples) == [(kind, f"{split} {kind} {n}") for kind in ("neg", "pos") for n in range(3)]
    train, val = load_text(TextDataConfig(dataset="imdb", cache_dir=str(tmp_path)))
    assert train.values.tobytes().decode().split("\n\n") == [
        "train neg 0", "train pos 0", "train neg 1", "train pos 1", "train neg 2", "train pos 2", "train unsup 7"]
    assert val.values.tobytes().decode().split("\n\n")[:2] == ["test neg 0", "test pos 0"]


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_own_texts_with_a_split(tmp_path, held_out):
    write(tmp_path, {"train/b/1.txt": "é!", "train/a/1.txt": b"\xff\0long text", f"{held_out}/a/1.txt": "x",
                     f"{held_out}/b/2.txt": "y", "train/b/2.txt": ""})
    train, val = load_labelled_text(TextClassificationDataConfig(path=str(tmp_path)), max_seq_len=6)
    assert [(train.class_names[label], text) for text, label in zip(train.texts, train.labels)] == [
        ("a", b"\xff\0long"), ("b", "é!".encode())]
    example = train[1]
    assert example["input_ids"].tolist() == [0xc3 + 6, 0xa9 + 6, 33 + 6, 0, 0, 0] and example["label"] == 1
    assert example["pad_mask"].tolist() == [False] * 3 + [True] * 3
    assert texts_of(val) == [("a", "x"), ("b", "y")]
    batch = next(iter(train_loader(Shuffled(train, 2, 0), TrainKeys(2, 1, ONE, 0, 1), 0)))
    assert batch["input_ids"].shape == batch["pad_mask"].shape == (2, 6) and sorted(batch["label"].tolist()) == [0, 1]


def test_own_texts_without_a_split(tmp_path):
    write(tmp_path, {f"{kind}/{n}.txt": f"{kind}{n}" for kind, end in (("a", 30), ("b", 12)) for n in range(10, end)})
    train, val = load_labelled_text(TextClassificationDataConfig(path=str(tmp_path), val_fraction=0.1), max_seq_len=6)
    assert texts_of(val) == [("a", "a15"), ("a", "a25"), ("b", "b11")]
    assert len(train) == 19 and not set(texts_of(train)) & set(texts_of(val))


def test_packages_of_the_standard_library():
    train, val = load_labelled_text(TextClassificationDataConfig(), max_seq_len=512)
    names = train.class_names
    assert names == val.class_names and 5 <= len(names) <= 10 and "asyncio" in names
    assert len(train) > 2000 and len(val) > 100 and set(val.labels) == set(train.labels)
    seen = set(train.texts)  # no file is in both, but tables of encodings are alike
    shared = {names[label] for text, label in zip(val.texts, val.labels) if len(text) > 400 and text in seen}
    assert shared <= {"encodings"}
    assert all(len(text) <= 512 for text in train.texts)
    assert sum(len(text) == 512 for text in train.texts) > 0.8 * len(train)


def test_pieces_are_all_of_a_file_but_a_short_rest(tmp_path):
    write(tmp_path, {"1": "abcdefgh", "2": "abcdefghij", "3": "ab", "4": ""})
    files = {"a": [tmp_path / name for name in "1234"]}
    assert LabelledText(files, 6, pieces=True).texts == [b"abcdef", b"abcdef", b"ghij", b"ab"]
    assert LabelledText(files, 6).texts == [b"abcdef", b"abcdef", b"ab"]


@pytest.mark.parametrize("texts, message", [
    ({}, "not a folder"),
    ({"a.txt": "x"}, "no class folders"),
    ({"a/1.txt": "x", "a/2.txt": "x"}, "no class folders"),
    ({"a/1.txt": "x", "b/1.md": "x"}, "b holds no .txt files"),
    ({"a/1.txt": "x", "b/1.txt": "x"}, "a holds one file"),
    ({"train/a/1.txt": "x", "train/b/1.txt": "x", "val/a/1.txt": "x", "val/c/1.txt": "x"}, "the same classes"),
])
def test_mistakes_in_folders_are_named(tmp_path, texts, message):
    write(tmp_path / "texts", texts)
    with pytest.raises(UserError, match=message) as error:
        load_labelled_text(TextClassificationDataConfig(path=str(tmp_path / "texts")), 8)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_archive_or_download_says_what_to_do(tmp_path, monkeypatch):
    config = TextClassificationDataConfig(dataset="imdb", cache_dir=str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file: Path(file).write_bytes(b"not this"))
    with pytest.raises(UserError, match="wrong checksum.*aclImdb_v1.tar.gz"):
        load_labelled_text(config, 8)
    assert not (tmp_path / "aclImdb_v1.tar.gz").exists()
    acl_imdb(tmp_path / "whole")
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "whole" / "aclImdb", "aclImdb")
    whole = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="aclImdb_v1.tar.gz") as error:
        load_labelled_text(config, 8)
    assert "\n" not in str(error.value)
