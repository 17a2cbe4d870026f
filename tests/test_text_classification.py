"""Classification of text: labeled texts from folders, tables, IMDb, and the standard library."""
import json
import tarfile
from pathlib import Path

import pytest
import torch

from perceiver.data import ByteTokenizer, Shuffled, TrainKeys, train_loader
from perceiver.distributed import Ranks
from perceiver.errors import UserError
from perceiver.tasks.text_classification import (LabelledText, TextClassificationDataConfig, load_labelled_text,
                                                 read_pieces)

ONE = Ranks(0, 1, torch.device("cpu"))
decode = ByteTokenizer().decode


def load(config: TextClassificationDataConfig, max_seq_len: int) -> tuple[LabelledText, LabelledText]:
    train, val, _ = load_labelled_text(config, max_seq_len)
    return LabelledText(train, max_seq_len), LabelledText(val, max_seq_len)


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
    train, val = load(config, max_seq_len=20)
    assert train.class_names == val.class_names == ["neg", "pos"]
    for examples, split in ((train, "train"), (val, "test")):
        assert texts_of(examples) == [(kind, f"{split} {kind} {n}") for kind in ("neg", "pos") for n in range(3)]


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_own_texts_with_a_split(tmp_path, held_out):
    write(tmp_path, {"train/b/1.txt": "é!", "train/a/1.txt": b"\xff\0long text", f"{held_out}/a/1.txt": "x",
                     f"{held_out}/b/2.txt": "y", "train/b/2.txt": ""})
    train, val = load(TextClassificationDataConfig(path=str(tmp_path)), max_seq_len=6)
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
    train, val = load(TextClassificationDataConfig(path=str(tmp_path), val_fraction=0.1), max_seq_len=6)
    assert texts_of(val) == [("a", "a15"), ("a", "a25"), ("b", "b11")]
    assert len(train) == 19 and not set(texts_of(train)) & set(texts_of(val))


def test_packages_of_the_standard_library():
    train, val = load(TextClassificationDataConfig(), max_seq_len=512)
    names = train.class_names
    assert names == val.class_names and 5 <= len(names) <= 10 and "asyncio" in names
    assert len(train) > 2000 and len(val) > 100 and set(val.labels) == set(train.labels)
    seen = set(train.texts)  # no file is in both sets, but some tables of encodings are equal
    shared = {names[label] for text, label in zip(val.texts, val.labels) if len(text) > 400 and text in seen}
    assert shared <= {"encodings"}
    assert all(len(text) <= 512 for text in train.texts)
    assert sum(len(text) == 512 for text in train.texts) > 0.8 * len(train)


def test_files_are_cut_into_pieces_without_a_short_rest(tmp_path):
    write(tmp_path, {"1": "abcdefgh", "2": "abcdefghij", "3": "ab"})
    files = {"a": [tmp_path / name for name in "123"]}
    assert read_pieces(files, 6) == {"a": [b"abcdef", b"abcdef", b"ghij", b"ab"]}


@pytest.mark.parametrize("texts, message", [
    ({}, "does not exist"),
    ({"a.txt": "x"}, "has 1 classes"),
    ({"a/1.txt": "x", "a/2.txt": "x"}, "has 1 classes"),
    ({"a/1.txt": "x", "b/1.md": "x"}, "class b has no texts"),
    ({"a/1.txt": "x", "b/1.txt": "x"}, "class a of .* has one example"),
    ({"train/a/1.txt": "x", "train/b/1.txt": "x", "val/a/1.txt": "x", "val/c/1.txt": "x"}, "the same classes"),
])
def test_mistakes_in_folders_are_named(tmp_path, texts, message):
    write(tmp_path / "texts", texts)
    with pytest.raises(UserError, match=message) as error:
        load(TextClassificationDataConfig(path=str(tmp_path / "texts")), 8)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_archive_or_download_says_what_to_do(tmp_path, monkeypatch):
    config = TextClassificationDataConfig(dataset="imdb", cache_dir=str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda url, file, hash_prefix: Path(file).write_bytes(b"not this"))
    with pytest.raises(UserError, match="wrong checksum.*aclImdb_v1.tar.gz"):
        load(config, 8)
    assert not (tmp_path / "aclImdb_v1.tar.gz").exists()
    acl_imdb(tmp_path / "whole")
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "whole" / "aclImdb", "aclImdb")
    whole = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="aclImdb_v1.tar.gz") as error:
        load(config, 8)
    assert "\n" not in str(error.value)


REVIEWS = [(f"line {n}, so good" if n % 3 else f"bad line {n}", "pos" if n % 3 else "neg") for n in range(60)]


def texts_by_class(examples: LabelledText) -> list[tuple[str, str]]:
    return sorted((examples.class_names[label], text.decode()) for text, label in zip(examples.texts, examples.labels))


@pytest.mark.parametrize("names", [("neg.txt", "pos.txt"), ("rt.neg", "rt.pos")])
def test_one_file_per_class_with_one_example_per_line(tmp_path, names):
    for name, label in zip(names, ("neg", "pos")):
        (tmp_path / name).write_text("\n".join(text for text, other in REVIEWS if other == label) + "\n\n")
    train, val = load(TextClassificationDataConfig(path=str(tmp_path)), 100)
    assert train.class_names == (["neg", "pos"] if names[0].endswith("txt") else list(names))
    assert len(train) == 54 and len(val) == 6
    texts = texts_by_class(train) + texts_by_class(val)
    assert sorted(text for _, text in texts) == sorted(text for text, _ in REVIEWS)


def write_table(file: Path, rows: list[tuple[str, str]], columns: tuple[str, str]) -> None:
    if file.suffix == ".jsonl":
        lines = [json.dumps({"id": 1, columns[0]: text, columns[1]: label}) for text, label in rows]
        file.write_text("".join(f"{line}\n" for line in lines))
        return
    separator = "," if file.suffix == ".csv" else "\t"
    lines = [f'"{text}"{separator}{label}' for text, label in rows]
    file.write_text("\n".join([separator.join(columns), *lines]))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_table_with_a_column_of_texts_and_one_of_labels(tmp_path, ending):
    file = tmp_path / f"reviews.{ending}"
    write_table(file, REVIEWS, ("review", "stars"))
    columns = dict(text_column="review", label_column="stars")
    train, val = load(TextClassificationDataConfig(path=str(file), **columns), 100)
    assert len(train) == 54 and len(val) == 6 and train.class_names == ["neg", "pos"]
    expected = sorted((label, text) for text, label in REVIEWS)
    assert sorted(texts_by_class(train) + texts_by_class(val)) == expected
    with pytest.raises(UserError, match="no text, only .*review, stars; set data.text_column"):
        load(TextClassificationDataConfig(path=str(file)), 100)

    folder = tmp_path / "parts"
    folder.mkdir()
    for part, rows in (("train", REVIEWS[:40]), ("valid", REVIEWS[40:50]), ("test", REVIEWS[50:])):
        write_table(folder / f"{part}.{ending}", rows, ("review", "stars"))
    train, val = load(TextClassificationDataConfig(path=str(folder), **columns), 100)
    assert len(train) == 40 and len(val) == 10
    assert texts_by_class(val) == sorted((label, text) for text, label in REVIEWS[40:50])


def test_broken_tables_are_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\none,x\ntwo,x\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"\n')
    (tmp_path / "c.xlsx").write_bytes(b"PK")
    for name, message in (("a.csv", "1 classes in column label"), ("b.jsonl", "cannot read .*b.jsonl"),
                          ("c.xlsx", "end in .csv, .tsv or .jsonl")):
        with pytest.raises(UserError, match=message) as error:
            load(TextClassificationDataConfig(path=str(tmp_path / name)), 100)
        assert "\n" not in str(error.value)


def test_the_note_describes_the_split(tmp_path):
    write(tmp_path, {f"{part}/{kind}/{n}.txt": "x" for part in ("train", "test") for kind in "ab" for n in range(3)})
    _, _, note = load_labelled_text(TextClassificationDataConfig(path=str(tmp_path)), 6)
    assert "6 examples for training, 6 for validation (train and test)" in note


def test_a_folder_with_only_a_part_train_is_split(tmp_path):
    write(tmp_path, {f"train/{kind}/{n}.txt": f"{kind}{n}" for kind in "ab" for n in range(10)})
    train, val = load(TextClassificationDataConfig(path=str(tmp_path)), 6)
    assert train.class_names == ["a", "b"] and len(train) == 18 and len(val) == 2
