"""Reading and writing files: caches, downloads, names of output files."""
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver import io
from perceiver.errors import UserError, reading, reason


def test_numbers_in_names_are_ordered_by_value():
    assert sorted(["10.png", "9.png", "b2", "b10"], key=io.natural_key) == ["9.png", "10.png", "b2", "b10"]


def test_hidden_files_are_not_visible(tmp_path):
    for name in ("b/x", "a", ".hidden", ".folder/y", "b/.z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [str(file.relative_to(tmp_path)) for file in io.visible_files(tmp_path)] == ["a", "b/x"]


def test_a_cache_is_made_once_and_whole(tmp_path):
    file = tmp_path / "cache" / "array.npy"
    calls = []

    def make():
        calls.append(1)
        yield np.arange(3)
        yield np.arange(3, 5)

    for _ in range(2):
        array = io.cached_array(file, make)
        assert array.tolist() == [0, 1, 2, 3, 4] and isinstance(array, np.memmap)
    assert calls == [1] and [path.name for path in file.parent.iterdir()] == ["array.npy"]

    def fail():
        yield np.arange(3)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        io.cached_array(tmp_path / "other.npy", fail)
    assert not (tmp_path / "other.npy").exists()
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read .*array.npy"):
        io.cached_array(file, make)


def test_digests_change_with_their_parts():
    parts = [("a",), ("b",), ("a", "b"), (np.arange(3),), (np.arange(4),)]
    assert len({io.digest(*part) for part in parts}) == len(parts)
    assert io.digest("a", np.arange(3)) == io.digest("a", np.arange(3))


@pytest.fixture
def download(tmp_path):
    """A dataset to download. tmp_path/served.zip is the archive that its URL would serve."""
    with zipfile.ZipFile(tmp_path / "served.zip", "w") as archive:
        archive.writestr("corpus", "text")
    return io.Download(url="http://nowhere/corpus.zip", unpacked="corpus")


def serve(monkeypatch, content: bytes) -> list[str]:
    """Replaces downloads: each writes `content`. Returns the list of requested URLs, which grows."""
    asked = []

    def download(url, file, hash_prefix):
        asked.append(url)
        Path(file).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


def test_a_data_set_is_downloaded_once(tmp_path, monkeypatch, download):
    asked = serve(monkeypatch, (tmp_path / "served.zip").read_bytes())
    for _ in range(2):
        assert io.fetch("corpus", download, tmp_path / "data").read_text() == "text"
    assert asked == ["http://nowhere/corpus.zip"]
    (tmp_path / "data" / "corpus").unlink()
    assert io.fetch("corpus", download, tmp_path / "data").read_text() == "text"  # from the archive in data/
    assert len(asked) == 1


def test_a_truncated_download_does_not_stay(tmp_path, monkeypatch, download):
    whole = (tmp_path / "served.zip").read_bytes()
    serve(monkeypatch, whole[: len(whole) // 2])
    with pytest.raises(UserError, match="data.dataset=corpus .*put corpus.zip or its content corpus into"):
        io.fetch("corpus", download, tmp_path / "data")
    assert list((tmp_path / "data").glob("*.zip")) == []
    download.unpacked_md5 = "0" * 32
    serve(monkeypatch, whole)
    with pytest.raises(UserError, match="wrong checksum"):
        io.fetch("corpus", download, tmp_path / "data")
    assert list((tmp_path / "data").glob("*.zip")) == [] and not (tmp_path / "data" / "corpus").exists()
    download.unpacked_md5 = None
    assert io.fetch("corpus", download, tmp_path / "data").read_text() == "text"


def test_an_archive_of_the_user_is_never_deleted(tmp_path, monkeypatch, download):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.zip").write_bytes(b"broken")
    with pytest.raises(UserError, match="corpus.zip"):
        io.fetch("corpus", download, tmp_path / "data")
    assert (tmp_path / "data" / "corpus.zip").read_bytes() == b"broken"


def test_output_names(tmp_path):
    files = io.output_files(str(tmp_path / "new" / "a.mid"), 2, (".mid", ".midi"))
    assert [file.name for file in files] == ["a-1.mid", "a-2.mid"] and (tmp_path / "new").is_dir()
    assert io.output_files(str(tmp_path / "a.MID"), 1, (".mid",)) == [tmp_path / "a.MID"]
    for name in ("a.txt", ""):
        with pytest.raises(UserError, match="must end in .mid or .midi"):
            io.output_files(str(tmp_path / name), 1, (".mid", ".midi"))
    (tmp_path / "one.png").write_text("")
    inputs = [str(tmp_path / "one.png"), str(tmp_path / "one.png"), "some text"]
    assert [name for _, name in io.progress(inputs)] == ["one", "one-2", "text"]


def test_options_that_a_task_does_not_take(capsys):
    task = Namespace(name="copy", options=("tokenizer",))
    io.check_options(task, Namespace(tokenizer="t.json", piano_roll=None), ("tokenizer", "piano_roll"))
    with pytest.raises(UserError, match="--piano-roll is not for task copy"):
        io.check_options(task, Namespace(tokenizer=None, piano_roll="x.png"), ("tokenizer", "piano_roll"))


def test_packages_that_are_missing_are_named():
    with pytest.raises(UserError, match="MIDI files needs the package no_such_package: pip install no_such_package"):
        io.import_optional("no_such_package", "reading MIDI files")


def test_reasons_are_one_line():
    assert reason(ValueError("a\n b")) == "a b"
    assert reason(EOFError()) == "it ends too early"
    assert reason(KeyError()) == "KeyError"
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    with pytest.raises(UserError, match="^cannot read x: broken$"), reading("x"):
        raise RuntimeError("broken")
    with pytest.raises(UserError, match="^mine$"), reading("x"):
        raise UserError("mine")
