"""Files of strangers: they run no code, write nothing elsewhere, and take no memory without bound."""
import builtins
import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.torch_version import TorchVersion

from conftest import ROOT
from perceiver import checkpoint, data, pretrained
from perceiver import io as perceiver_io
from perceiver.config import from_dict, load_config, to_dict
from perceiver.data import CorpusConfig, Tokens, load_corpus, load_labelled_images, read_image
from perceiver.errors import UserError
from perceiver.tasks import TASKS
from perceiver.tasks.flow import read_png16
from perceiver.tasks.music import read_midi
from perceiver.tasks.video import video_frames


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Bomb:
    """A pickle of 60 bytes that takes 100 GB, and that weights_only allows."""

    def __reduce__(self):
        return bytearray, (100_000_000_000,)


class Code:

    def __reduce__(self):
        return os.system, ("touch hacked",)


def replace_pickle(path: Path, content: bytes):
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in files.items():
            archive.writestr(name, content if name.endswith("data.pkl") else old)


@pytest.mark.parametrize("kind, word", [(Bomb, "bytearray"), (Code, "system")])
def test_a_checkpoint_runs_no_code_and_is_no_bomb(tmp_path, monkeypatch, kind, word):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    torch.save({"model": {}}, path)
    replace_pickle(path, pickle.dumps({"model": kind()}, protocol=2))
    assert word in error_of(checkpoint.load, path)
    assert word in error_of(pretrained.read_weights, path)
    assert not (tmp_path / "hacked").exists()


def test_a_compressed_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("a/data/0", bytes(10_000_000))
    assert "it is compressed" in error_of(checkpoint.load, tmp_path / "a.pt")


AR = {"max_seq_len": 16, "num_latents": 8, "num_channels": 16, "num_heads": 2, "num_self_attention_layers": 1}


def save_ar(path: Path, change_config=lambda model: None, change_weight=lambda value: value):
    """Saves a Perceiver AR whose config or weights a stranger has changed."""
    config = from_dict({"task": "causal_lm", "model": AR}, TASKS)
    task = TASKS["causal_lm"](config)
    weights = {name: change_weight(value) for name, value in task.build_model().state_dict().items()}
    change_config(config.model)
    saved = {"model": weights, "optimizer": {}, "step": 1, "config": to_dict(config), "task": task.state_dict()}
    torch.save(saved, path)


@pytest.mark.parametrize("change", [{"num_channels": 2**24}, {"vocab_size": 10**12}, {"max_seq_len": 10**11}])
def test_a_checkpoint_with_a_huge_config_is_refused_before_it_takes_memory(tmp_path, change):
    save_ar(tmp_path / "a.pt", lambda model: vars(model).update(change))
    assert "do not fit" in error_of(pretrained.load_model, tmp_path / "a.pt")


def test_a_checkpoint_whose_tensors_repeat_one_value_is_refused(tmp_path):
    save_ar(tmp_path / "a.pt", change_weight=lambda value: torch.zeros(1).expand(value.shape))
    assert "repeats values" in error_of(pretrained.load_model, tmp_path / "a.pt")


@pytest.mark.parametrize("change", [{"num_labels": 2**25}, {"output_shape": [1, 16, 4000, 4000]}])
def test_published_weights_with_a_huge_config_are_refused(tmp_path, change):
    golden = ROOT / "tests/golden/multimodal"
    os.symlink(golden / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((golden / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert "larger than its weights" in error_of(pretrained.load_model, tmp_path)


def test_a_model_larger_than_the_machine_is_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text(f"task: causal_lm\nmodel: {AR | {'num_channels': 2**24}}\n")
    task = TASKS["causal_lm"](load_config(tmp_path / "a.yaml", [], TASKS))
    assert "this machine has" in error_of(task.build_model)


def test_torch_below_2_10_is_told_once(monkeypatch, tmp_path, capsys):
    torch.save({}, tmp_path / "a.pt")
    perceiver_io.advise_upgrade.cache_clear()
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    for _ in range(2):
        perceiver_io.load_tensors(tmp_path / "a.pt")
    assert capsys.readouterr().err.count("CVE-2026-24747") == 1
    perceiver_io.advise_upgrade.cache_clear()
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0"))
    perceiver_io.load_tensors(tmp_path / "a.pt")
    assert not capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Other files


def test_a_config_has_no_aliases_and_is_short(tmp_path):
    laughs = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh"))
    (tmp_path / "a.yaml").write_text(f"{laughs}task: *h\n")
    assert "it holds an alias" in error_of(load_config, tmp_path / "a.yaml", [], TASKS)
    (tmp_path / "b.yaml").write_text("#" * 10**6)
    assert "too many for a config" in error_of(load_config, tmp_path / "b.yaml", [], TASKS)


def test_a_small_file_that_declares_a_large_image_is_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    assert "12000 x 12000 pixels, more than" in error_of(read_image, tmp_path / "a.png", 3)
    with pytest.raises(ValueError, match="12000 x 12000"):
        read_png16(tmp_path / "a.png")


def test_postscript_is_no_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert "cannot identify image file" in error_of(read_image, tmp_path / "a.png", 3)


@pytest.mark.parametrize("row_filter", range(5))
def test_16_bit_colors_keep_all_bits(tmp_path, row_filter):
    """Pixels that a PNG file stores with each of its five filters."""
    rng = np.random.default_rng(row_filter)
    pixels = rng.integers(0, 2**16, (6, 5, 3)).astype(">u2")
    rows = pixels.view(np.uint8).reshape(6, 30).astype(int)
    rows = np.pad(rows, ((1, 0), (6, 0)))  # zeros above and on the left
    here, left, above, corner = rows[1:, 6:], rows[1:, :-6], rows[:-1, 6:], rows[:-1, :-6]
    estimate = left + above - corner
    distances = np.abs(np.stack((left, above, corner)) - estimate)
    nearest = np.choose(distances.argmin(0), (left, above, corner))
    predicted = (0, left, above, (left + above) // 2, nearest)[row_filter]
    content = np.pad((here - predicted) % 256, ((0, 0), (1, 0)), constant_values=row_filter).astype(np.uint8)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(content.tobytes()))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b""))
    assert torch.equal(read_png16(tmp_path / "a.png"), torch.from_numpy(pixels.astype(np.int64)).movedim(-1, 0))


def test_a_compressed_idx_file_is_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_IDX_BYTES", 1000)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(10**6)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(100)))
    assert "more than 1000 bytes" in error_of(load_labelled_images, "mnist", str(tmp_path), "", True)


def test_midi_files_are_short(tmp_path):
    pytest.importorskip("mido")
    events = b"\x00\x90\x40\x40" + b"\x00\x40\x40" * 10**6
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 96)
    (tmp_path / "a.mid").write_bytes(header + b"MTrk" + struct.pack(">I", len(events)) + events)
    assert "too many for a piece" in error_of(read_midi, tmp_path / "a.mid")


def test_a_video_opens_no_other_files(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "secret.txt").write_text("x")
    for text in ("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.txt\n#EXT-X-ENDLIST\n",
                 "ffconcat version 1.0\nfile secret.txt\n"):
        (tmp_path / "a.mp4").write_text(text)
        assert error_of(list, video_frames(tmp_path / "a.mp4")).startswith(f"cannot read {tmp_path}/a.mp4: ")


# ----------------------------------------------------------------------------------------------------------------------
# Large corpora


def test_a_worker_that_is_not_forked_gets_the_path_of_a_corpus(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, 10**6).astype(np.uint16)
    np.save(tmp_path / "a.npy", values)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for part in (slice(None), slice(10, 500), slice(999, None)):
        tokens = Tokens(mapped[part][1:], 6)
        packed = pickle.dumps(tokens)
        assert len(packed) < 1000
        assert np.array_equal(pickle.loads(packed)[:20], values[part][1:].astype(int)[:20] + 6)
        assert np.array_equal(np.concatenate(list(tokens.blocks(1000))), values[part][1:])
    os.truncate(tmp_path / "a.npy", 1000)  # reading the map would end this process
    assert "it has become shorter" in error_of(Tokens(mapped).__getitem__, slice(10**5, 10**5 + 9))


def test_a_large_folder_is_joined_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SMALL_CORPUS", 10)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"text {number}\n")
    config = CorpusConfig(path=str(folder), cache_dir=str(tmp_path / "cache"), val_fraction=0.1)
    first = load_corpus(config)
    assert isinstance(first.train.values, np.memmap) and isinstance(first.val.values, np.memmap)
    assert first.val.values.tobytes() == b"text 5\ntext 15\ntext 25\ntext 35\n"
    monkeypatch.setattr(data, "text_blocks", lambda *args: 1 / 0)  # the second start does not read the texts
    again = load_corpus(config)
    assert np.array_equal(again.train.values, first.train.values)
    monkeypatch.undo()
    monkeypatch.setattr(data, "SMALL_CORPUS", 10)
    (folder / "05.txt").write_text("another text\n")
    assert load_corpus(config).val.values.tobytes().startswith(b"another text\n")


def test_tokens_of_a_mapped_text_are_found_without_reading_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text\n" * 1000)
    values = np.memmap(tmp_path / "a.txt", np.uint8, mode="r")
    name = perceiver_io.digest("tokenizer", values[:5000])
    assert name != perceiver_io.digest("tokenizer", values[:5001]) != perceiver_io.digest("other", values[:5001])
    assert name == perceiver_io.digest("tokenizer", np.memmap(tmp_path / "a.txt", np.uint8, mode="r")[:5000])
    monkeypatch.setattr(builtins, "open", None)
    monkeypatch.setattr(np, "ascontiguousarray", None)
    assert name == perceiver_io.digest("tokenizer", values[:5000])


def test_a_million_file_names_are_one_block():
    files = [Path(f"/data/imagenet/train/n{number % 1000:08}/image_{number}.JPEG") for number in range(10_000)]
    names = data.file_array(files)
    assert os.fsdecode(names[77]) == str(files[77])
    assert names.nbytes < 60 * len(files)
    buffer = io.BytesIO()
    pickle.dump(names, buffer)
    assert buffer.tell() < 60 * len(files)
