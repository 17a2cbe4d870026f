"""Corpora of text and of token ids, and their split into training and validation."""
import hashlib
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver import data
from perceiver.config import build
from perceiver.data import Corpus, CorpusConfig, load_corpus, split_part
from perceiver.errors import UserError


def load(path: Path, **config) -> Corpus:
    return load_corpus(CorpusConfig(path=str(path), **config))


def texts(corpus: Corpus) -> tuple[str, str]:
    return corpus.train.values.tobytes().decode(), corpus.val.values.tobytes().decode()


def write(root: Path, *names: str) -> Path:
    """Writes files. The text of each is its name, three times."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"<{name}>" * 3)
    return root


def text_of(*names: str) -> str:
    return "".join(f"<{name}>" * 3 for name in names)


def test_the_default_corpus_is_this_pythons_library():
    corpus = load_corpus(CorpusConfig(val_fraction=0.02))
    text = corpus.val.values.tobytes().decode("utf-8", "replace")
    assert len(corpus.train) > 5_000_000 and len(corpus.val) > 50_000
    assert text.count("\ndef ") > 50 and corpus.train.offset == 6 and not corpus.holds_ids
    assert f"{len(corpus.val):,} of " in corpus.note and "lib-dynload" in corpus.note


def test_own_text_as_file_and_folder(tmp_path):
    (tmp_path / "a").mkdir()
    for n in range(40):
        (tmp_path / "a" / f"{n:02}.txt").write_text(f"<{n}>")
    (tmp_path / "a" / ".hidden").write_text("no")
    (tmp_path / "a" / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0no")
    corpus = load(tmp_path, val_fraction=0.1)
    assert corpus.val.values.tobytes() == b"<5><15><25><35>"
    assert corpus.train.values.tobytes() == b"".join(b"<%d>" % n for n in range(40) if n % 10 != 5)
    assert corpus.note == (f"{tmp_path}: 135 bytes of 00.txt, 01.txt, 02.txt, ... (36 in all) for training, 15 of "
                           "05.txt, 15.txt, 25.txt, ... (4 in all) for validation; not used: picture.png")

    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(100)))
    corpus = load(file, val_fraction=0.1, val_size=7)
    assert corpus.train.values.tobytes() == bytes(range(90)) and corpus.val.values.tobytes() == bytes(range(90, 97))
    assert corpus.train[:3].tolist() == [6, 7, 8]
    assert corpus.note == f"{file}: 90 bytes of one.txt for training, 7 of the rest for validation"


@pytest.mark.parametrize("name, dtype", [("ids.npy", np.int32), ("ids.bin", np.uint16), ("bytes.bin", np.uint8),
                                         ("wide.bin", np.uint32)])
def test_own_token_ids(tmp_path, name, dtype):
    ids = np.arange(200).astype(dtype)
    if dtype is np.uint32:
        ids += 2**17
    np.save(tmp_path / name, ids) if name.endswith("npy") else ids.tofile(tmp_path / name)
    config = {"path": str(tmp_path / name)}
    if name.endswith("bin"):
        config["bin_dtype"] = np.dtype(dtype).name
    corpus = load_corpus(build(CorpusConfig, config))
    assert corpus.holds_ids and np.concatenate([corpus.train[:], corpus.val[:]]).tolist() == ids.tolist()
    assert "190 token ids of " in corpus.note


def test_a_config_is_parsed_without_its_data():
    config = build(CorpusConfig, {"path": "/nowhere/ids.bin"})
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(UserError, match="data.path=/nowhere/ids.bin does not exist"):
        load_corpus(config)


@pytest.mark.parametrize("names", [
    ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"), ("wiki.train.tokens", "wiki.valid.tokens"),
    ("train.txt", "val.txt"), ("train.txt", "valid.txt", "test.txt"), ("train.txt", "dev.txt"),
    ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"), ("my-train.txt", "my-validation.txt"),
    ("TRAIN.txt", "VALID.txt"),
    ("train/a/b", "valid/c", "test/d"), ("train/a", "dev/b"), ("train-00000-of-00001.txt", "valid-00000-of-00001.txt"),
    ("train.txt", "val.txt", "train.json", "README", "more/test.txt"),  # other files are not used
    ("train.txt", "val.txt", "train.py", "test.py"),
])
def test_folders_with_a_split_of_their_own(tmp_path, names):
    train, val = (next(name for name in names if split_part(Path(name).parts[0]) == part) for part in ("train", "val"))
    corpus = load(write(tmp_path, *names))
    assert texts(corpus) == (text_of(train), text_of(val))
    for name in names:
        assert (Path(name).parts[0] in corpus.note.partition("not used")[2]) == (name not in (train, val))


def test_a_split_may_have_several_files(tmp_path):
    names = [f"train-{n:05}-of-00003.txt" for n in range(3)]
    corpus = load(write(tmp_path, *names, "validation-00000-of-00001.txt", "test-00000-of-00001.txt"))
    assert texts(corpus) == (text_of(*names), text_of("validation-00000-of-00001.txt"))
    assert corpus.note.endswith("for validation; not used: test-00000-of-00001.txt")


def test_a_split_of_token_ids(tmp_path):
    for n in range(3):
        np.arange(10 * n, 10 * n + 10, dtype=np.uint16).tofile(tmp_path / f"{['train', 'train', 'val'][n]}_{n}.bin")
    write(tmp_path, "input.txt", "prepare.py")  # like the folders of nanoGPT
    corpus = load(tmp_path)
    assert corpus.holds_ids
    assert corpus.train[:].tolist() == list(range(20)) and corpus.val[:].tolist() == list(range(20, 30))
    assert corpus.note == (f"{tmp_path}: 20 token ids of train_0.bin, train_1.bin for training, 10 of val_2.bin for "
                           "validation; not used: input.txt, prepare.py")


@pytest.mark.parametrize("names", [("train.txt", "test.txt"), ("train/a", "test/b")])
def test_test_parts_are_never_used(tmp_path, names):
    """Without a validation part, some of the training part is held out."""
    corpus = load(write(tmp_path, *names), val_fraction=0.5)
    assert "".join(texts(corpus)) == text_of(names[0])
    assert corpus.note.endswith(f"not used: {Path(names[1]).parts[0]}")
    # The same holds if the other words of the names differ, or if the folder is inside another folder.
    other = write(tmp_path / "other", "train.txt", "test.md", "more.txt")
    assert "".join(texts(load(other, val_fraction=0.5))) == text_of("more.txt", "train.txt")
    write(tmp_path / "outer" / "inner", *names)
    assert "".join(texts(load(tmp_path / "outer", val_fraction=0.5))) == text_of(names[0])


def test_evaluation_on_the_test_files(tmp_path):
    write(tmp_path, "train.txt", "valid.txt", "test.txt")
    assert texts(load(tmp_path)) == (text_of("train.txt"), text_of("valid.txt"))
    corpus = load(tmp_path, eval_split="test")
    assert texts(corpus) == (text_of("train.txt"), text_of("test.txt"))
    assert "of test.txt for test;" in corpus.note
    (tmp_path / "test.txt").unlink()
    with pytest.raises(UserError, match="data.eval_split=test.*has no test files"):
        load(tmp_path, eval_split="test")
    with pytest.raises(UserError, match="data.eval_split=test.*has no test files"):
        load(tmp_path / "train.txt", eval_split="test")


def test_other_names_do_not_mark_a_split(tmp_path):
    names = ["bus.txt", "latest.txt", "train.txt", "values.txt"]
    assert "".join(texts(load(write(tmp_path / "vehicles", *names)))) == text_of(*names)
    assert "".join(texts(load(write(tmp_path / "tests", "test.txt", "unit.txt")))) == text_of("test.txt", "unit.txt")
    assert split_part("contrain.txt") is None and split_part("train.test") is None and split_part("test1") == "test"


def test_two_corpora_in_one_folder(tmp_path):
    write(tmp_path, *(f"ptb.{kind}{part}.txt" for kind in ("", "char.") for part in ("train", "valid", "test")))
    with pytest.raises(UserError, match="several corpora, with ptb.char.train.txt and ptb.train.txt"):
        load(tmp_path)


def test_wikitext_is_unpacked_from_a_zip_that_is_there(tmp_path):
    with zipfile.ZipFile(tmp_path / "wikitext-103-raw-v1.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-103-raw/wiki.{part}.raw", f"text to {part}")
    corpus = load_corpus(CorpusConfig(dataset="wikitext103", cache_dir=str(tmp_path)))
    assert texts(corpus) == ("text to train", "text to valid")
    assert corpus.note.endswith("not used: wiki.test.raw")


def test_enwik8_is_split_as_customary(tmp_path, monkeypatch):
    content = np.arange(100_000_000, dtype=np.uint32).astype(np.uint8).tobytes()

    def pack() -> None:
        with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("enwik8", content)

    config = CorpusConfig(dataset="enwik8", cache_dir=str(tmp_path), val_size=10**9)
    pack()
    with pytest.raises(UserError, match="checksum"):
        load_corpus(config)
    monkeypatch.setattr(data.DOWNLOADS["enwik8"], "unpacked_md5", hashlib.md5(content).hexdigest())
    pack()
    corpus = load_corpus(config)
    assert (len(corpus.train), len(corpus.val)) == (90_000_000, 5_000_000)
    assert corpus.val[:1] == 90_000_000 % 256 + 6


@pytest.mark.parametrize("packed", [False, True])
def test_imdb_validates_on_held_out_reviews_and_leaves_the_test_set_alone(tmp_path, packed, monkeypatch):
    root = tmp_path / "aclImdb"
    for part in "train", "test":
        for kind, rating in (("neg", 1), ("pos", 9)):
            for n in range(3):
                file = root / part / kind / f"{n}_{rating}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(f"{part} {kind} {n}")
    write(root, "train/labeledBow.feat", "README", "train/urls_pos.txt")
    (root / "train/unsup").mkdir()
    (root / "train/unsup/7_0.txt").write_text("train unsup 7")
    if packed:
        archive = tmp_path / "aclImdb_v1.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(root, "aclImdb")
        root.rename(tmp_path / "elsewhere")
        monkeypatch.setattr(data.DOWNLOADS["imdb"], "md5", hashlib.md5(archive.read_bytes()).hexdigest())
    corpus = load_corpus(CorpusConfig(dataset="imdb", cache_dir=str(tmp_path), val_fraction=0.25))
    train, val = ([review for review in text.split("\n\n") if review] for text in texts(corpus))
    assert train == ["train neg 0", "train pos 0", "train pos 1", "train neg 2", "train pos 2"]
    assert val == ["train neg 1", "train unsup 7"]  # every fourth review, in an order that mixes the classes
    assert corpus.note.endswith("not used: README, test")


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match="no network.*wikitext-103-raw-v1.zip.*data.path="):
        load_corpus(CorpusConfig(dataset="wikitext103", cache_dir=str(tmp_path)))
    floats = tmp_path / "floats.npy"
    np.save(floats, np.zeros(3))
    for path, content, message in (("none.txt", None, "does not exist"), ("void.txt", b"", "empty"),
                                   ("bad.npy", b"junk", "cannot read"), ("one.txt", b"a", "1 for validation"),
                                   ("odd.bin", b"abc", "cannot read .*odd.bin"),
                                   ("floats.npy", floats.read_bytes(), "token ids must be integers")):
        if content is not None:
            (tmp_path / path).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(tmp_path / path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no text files"):
        load(tmp_path / "folder")
    write(tmp_path / "split", "train.txt", "valid.txt")
    (tmp_path / "split" / "valid.txt").write_text("")
    with pytest.raises(UserError, match="cannot read .*valid.txt: .*empty"):
        load(tmp_path / "split")


def test_mistakes_in_the_config_are_named():
    for key, value in (("dataset", "c4"), ("bin_dtype", "float32"), ("val_fraction", 0.6), ("val_size", 1)):
        with pytest.raises(UserError, match=f"data.{key}="):
            build(CorpusConfig, {key: value}, "data.")
