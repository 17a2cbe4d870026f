"""The order of examples, batches, windows of a corpus, splits of files, and image files."""
import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from conftest import ROOT
from perceiver.config import build
from perceiver.data import (IGNORE, LabelledConfig, LoaderConfig, Shuffled, TextBlocks, TextWindows, Tokens,
                            TrainKeys, collate_padded, eval_loader, hold_out, hold_out_folders, labelled_files,
                            load_labelled_images, read_image, to_channels, train_loader)
from perceiver.distributed import Ranks
from perceiver.errors import UserError


def ranks(world_size: int) -> list[Ranks]:
    return [Ranks(rank, world_size, torch.device("cpu")) for rank in range(world_size)]


ONE = ranks(1)[0]


# ----------------------------------------------------------------------------------------------------------------------
# The order of examples, and batches


def test_windows_are_a_function_of_seed_step_and_index():
    tokens = Tokens(np.arange(1000, dtype=np.uint16))
    windows = TextWindows(tokens, max_seq_len=32, num_latents=8, seed=3)
    example = windows[5, 2]
    ids = example["input_ids"]
    assert ids.tolist() == list(range(ids[0], ids[0] + 32))
    assert example["labels"].tolist() == list(range(ids[0] + 25, ids[0] + 33))
    for name in example:
        assert np.array_equal(example[name], windows[5, 2][name])
        assert not np.array_equal(example[name], windows[5, 3][name])
        assert not np.array_equal(example[name], windows[6, 2][name])
    with pytest.raises(UserError, match="fewer than model.max_seq_len"):
        TextWindows(Tokens(np.zeros(32, np.uint8)), 32, 8, 0)


def test_every_window_of_a_corpus_can_be_drawn():
    windows = TextWindows(Tokens(np.arange(35, dtype=np.uint8)), 32, 8, 0)
    assert {windows[step, 0]["input_ids"][0] for step in range(50)} == {0, 1, 2}


@pytest.mark.parametrize("length", [2, 5, 9, 17, 33, 34, 100, 101])
def test_blocks_predict_every_token_but_the_first_once(length):
    blocks = TextBlocks(Tokens(np.arange(length, dtype=np.uint8), 6), max_seq_len=32, num_latents=8)
    predicted = []
    for block in (blocks[i] for i in range(len(blocks))):
        ids, labels, padded = block["input_ids"], block["labels"], block["pad_mask"]
        assert len(ids) == len(padded) == 32 and len(labels) == 8
        for position in np.flatnonzero(labels != IGNORE):
            predicted.append(labels[position])
            assert ids[32 - 8 + position] == labels[position] - 1 and not padded[32 - 8 + position]
        assert ids[~padded].tolist() == list(range(ids[~padded][0], ids[~padded][0] + 32 - padded.sum()))
        assert not padded.any() or ids[~padded][0] == 6  # padded only where the corpus begins
    assert predicted == list(range(7, 6 + length))


@pytest.mark.parametrize("world_size, accumulate", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_ranks_and_micro_batches_share_the_same_batch(world_size, accumulate):
    seen = {}
    for rank in ranks(world_size):
        micro_batches = list(TrainKeys(12, accumulate, rank, first_step=3, last_step=5))
        assert len(micro_batches) == 2 * accumulate
        for i, batch in enumerate(micro_batches):
            assert all(step == 3 + i // accumulate for step, _ in batch)
            seen.setdefault(batch[0][0], []).extend(index for _, index in batch)
    assert {step: sorted(indices) for step, indices in seen.items()} == {3: list(range(12)), 4: list(range(12))}


def test_workers_change_nothing_and_evaluation_sees_everything_once():
    tokens = Tokens(np.arange(1000, dtype=np.uint16))
    windows, blocks = TextWindows(tokens, 32, 8, 0), TextBlocks(tokens, 32, 8)
    batches = [list(train_loader(windows, TrainKeys(4, 2, ONE, 0, 3), workers)) for workers in (0, 2)]
    assert len(batches[0]) == 6
    for a, b in zip(*batches):
        assert all(torch.equal(a[name], b[name]) for name in a)
    labels = torch.cat([batch["labels"][batch["labels"] != IGNORE]
                        for rank in ranks(3) for batch in eval_loader(blocks, 5, rank, 0)])
    assert sorted(labels.tolist()) == list(range(1, 1000))
    padded = ["pad_mask" in batch for batch in eval_loader(blocks, 5, ranks(3)[0], 0)]
    assert padded[0] and not any(padded[1:])


def test_shorter_inputs_are_padded_and_prefix_positions_move_along():
    examples = [{"input_ids": np.arange(1, 6), "prefix_keep": np.array([0, 2])},
                {"input_ids": np.arange(1, 4), "prefix_keep": np.array([0, 1])}]
    batch = collate_padded(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [0, 0, 1, 2, 3]]
    assert batch["pad_mask"].tolist() == [[False] * 5, [True, True, False, False, False]]
    assert batch["prefix_keep"].tolist() == [[0, 2], [2, 3]]
    assert "pad_mask" not in collate_padded(examples[:1])


class Noisy(torch.utils.data.Dataset):
    """Ten examples: a number, and noise from PyTorch's generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int):
        return {"number": number, "noise": torch.rand(3)}


def test_every_epoch_has_each_example_once_in_another_order():
    shuffled = Shuffled(Noisy(), batch_size=4, seed=0)
    numbers = [shuffled[step, index]["number"] for step in range(10) for index in range(4)]
    epochs = [tuple(numbers[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(epochs)) == 4
    assert numbers[:10] != [Shuffled(Noisy(), 4, seed=1)[0, index]["number"] for index in range(10)]
    assert shuffled[0, 1]["number"] == numbers[1]  # back in an earlier epoch


def test_augmentation_is_a_function_of_the_key_and_restores_the_generator():
    shuffled = Shuffled(Noisy(), batch_size=4, seed=0)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    noise = shuffled[3, 2]["noise"]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(shuffled[3, 2]["noise"], noise)
    others = [shuffled[3, 3], shuffled[4, 2], Shuffled(Noisy(), batch_size=4, seed=1)[3, 2]]
    assert not any(torch.equal(other["noise"], noise) for other in others)
    batches = [list(train_loader(shuffled, TrainKeys(4, 2, ONE, 2, 5), workers)) for workers in (0, 2)]
    assert torch.equal(batches[0][3]["noise"][0], noise)
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["number"], b["number"]) and torch.equal(a["noise"], b["noise"])


class Broken(Noisy):

    def __getitem__(self, number: int):
        try:
            raise OSError("on the way")
        except OSError:
            raise UserError(f"cannot read {number}.png: it is truncated") from None


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_are_one_line(workers):
    with pytest.raises(UserError) as error:
        next(iter(eval_loader(Broken(), 2, ONE, workers)))
    assert str(error.value) == "cannot read 0.png: it is truncated"


def run_python(tmp_path: Path, code: str) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(code)
    return subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)


def test_a_process_with_running_workers_can_exit(tmp_path):
    """At exit, Python sends SIGTERM to its workers and waits for them. So workers must not ignore the signal."""
    result = run_python(tmp_path, """
import builtins, torch
from perceiver.data import eval_loader
from perceiver.distributed import Ranks
builtins.kept = iter(eval_loader([{"number": 1}] * 8, 2, Ranks(0, 1, torch.device("cpu")), 1))
print(next(builtins.kept))
""")
    assert result.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere fork is not safe")
def test_workers_do_not_copy_the_corpus(tmp_path):
    """This holds even if fork is not the default start method, as in Python 3.14."""
    result = run_python(tmp_path, """
import multiprocessing, torch
from perceiver.data import eval_loader
from perceiver.distributed import Ranks
class Corpus(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return {"number": index}
    def __reduce__(self): raise RuntimeError("the corpus was pickled")
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    (batch,) = eval_loader(Corpus(), 4, Ranks(0, 1, torch.device("cpu")), 1)
    assert batch["number"].tolist() == [0, 1, 2, 3]
""")
    assert result.returncode == 0


def test_mistakes_in_the_config_are_named():
    for values, message in (({"batch_size": 0}, "batch_size=0"), ({"num_workers": -1}, "num_workers=-1")):
        with pytest.raises(UserError, match=f"data.{message} must"):
            build(LoaderConfig, values, "data.")


# ----------------------------------------------------------------------------------------------------------------------
# Splits of files


def test_every_nth_item_is_held_out():
    assert hold_out(list(range(20)), 0.1) == ([n for n in range(20) if n not in (5, 15)], [5, 15])
    assert hold_out([1, 2], 0.01) == ([1], [2])


def test_folders_are_held_out_whole():
    root = Path("data")
    files = [root / name for name in (
        "alone.mid", "bach/fugue/a.mid", "bach/fugue/b.mid", "bach/fugue/slow/c.mid", "bach/prelude/a.mid",
        "chopin/nocturne.mid", "chopin/op9/a.mid")]
    train, val = hold_out_folders(root, files, 0.25)  # groups: alone.mid, bach/fugue, bach/prelude, chopin
    assert val == [root / "bach/prelude/a.mid"]
    assert sorted(train + val) == sorted(files)
    train, val = hold_out_folders(root, files, 0.5)
    assert val == files[1:4] + files[5:]


def test_files_of_a_single_folder_are_split():
    root = Path("data")
    for folder in "", "pop/":
        files = [root / f"{folder}{number}.mid" for number in range(10)]
        assert hold_out_folders(root, files, 0.1) == (files[:5] + files[6:], files[5:6])


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize("held_out", ["val", "valid", "test"])
def test_labelled_files_with_a_split(tmp_path, held_out):
    write(tmp_path, "train/b/1.avi", "train/a/2.MP4", "train/a/.hidden.avi", "train/a/notes.txt",
          f"{held_out}/a/x.avi", f"{held_out}/b/y.avi", "README")
    train, val, note = labelled_files(tmp_path, (".avi", ".mp4"), LabelledConfig())
    assert train == {"a": [tmp_path / "train/a/2.MP4"], "b": [tmp_path / "train/b/1.avi"]}
    assert val == {"a": [tmp_path / held_out / "a/x.avi"], "b": [tmp_path / held_out / "b/y.avi"]}
    assert note == f"{tmp_path}: 2 examples for training, 2 for validation (train and {held_out})"


def test_evaluation_on_the_test_part(tmp_path):
    write(tmp_path, *(f"{part}/{kind}/{part}.avi" for part in ("train", "val", "test") for kind in "ab"))
    for split, name in (("val", "validation"), ("test", "test")):
        train, val, note = labelled_files(tmp_path, (".avi",), LabelledConfig(eval_split=split))
        assert [file.name for file in (*train["a"], *val["b"])] == ["train.avi", f"{split}.avi"]
        assert note.endswith(f"2 for {name} (train and {split})")
    with pytest.raises(UserError, match="data.eval_split=test: .* does not hold the parts train and test"):
        labelled_files(tmp_path / "train", (".avi",), LabelledConfig(eval_split="test"))


def test_labelled_files_without_a_split(tmp_path):
    write(tmp_path, *(f"{kind}/{n}.avi" for kind, end in (("a", 30), ("b", 12)) for n in range(10, end)))
    train, val, note = labelled_files(tmp_path, (".avi",), LabelledConfig())
    assert {name: [file.name for file in files] for name, files in val.items()} == {
        "a": ["15.avi", "25.avi"], "b": ["11.avi"]}
    assert len(train["a"]) == 18 and len(train["b"]) == 1
    assert note == f"{tmp_path}: 19 examples for training, 3 for validation (held out)"


@pytest.mark.parametrize("names, message", [
    ((), "fewer than two class folders"), (("a.avi",), "fewer than two class folders"),
    (("a/1.avi", "a/2.avi"), "fewer than two class folders"),
    (("a/1.avi", "b/1.txt", "b/.2.avi"), "no valid file for the classes b"),
    (("a/1.avi", "b/1.avi"), "class a of .* has one example"),
    (("train/a/1.avi", "train/b/1.avi", "val/a/1.avi", "val/c/1.avi"), "the same classes"),
])
def test_mistakes_in_folders_are_named(tmp_path, names, message):
    write(tmp_path / "clips", *names)
    with pytest.raises(UserError, match=message) as error:
        labelled_files(tmp_path / "clips", (".avi",), LabelledConfig())
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Image files


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def message(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)  # the quarters have different colors
    upright[:8, :12], upright[:8, 12:], upright[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # The array that a camera stores for each orientation. The EXIF standard says where row 0 and column 0 belong.
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1),
              8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "photo.png", 3), upright)


def test_transparent_pixels_become_white(tmp_path):
    image = np.zeros((1, 3, 4), np.uint8)  # three black pixels: transparent, half transparent, opaque
    image[0, :, 3] = (0, 128, 255)
    Image.fromarray(image).save(tmp_path / "rgba.png")
    Image.fromarray(image[..., 2:]).save(tmp_path / "gray.png")  # gray with alpha
    assert Image.open(tmp_path / "gray.png").mode == "LA"
    for name in "rgba.png", "gray.png":
        assert np.array(read_image(tmp_path / name, 3))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]
        assert np.array(read_image(tmp_path / name, 1)).tolist() == [[255, 127, 0]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.array(read_image(tmp_path / "palette.png", 3))[0].tolist() == [[255] * 3, [40, 50, 60]]
    opaque = noise(9, 9, 4)
    opaque[..., 3] = 255
    assert np.array_equal(to_channels(Image.fromarray(opaque), 3), opaque[..., :3])


def test_gray_and_color(tmp_path):
    Image.fromarray(noise(9, 9, 1)).save(tmp_path / "gray.png")
    Image.fromarray(noise(9, 9)).save(tmp_path / "color.png")
    for name in "gray.png", "color.png":
        assert read_image(tmp_path / name, 1).mode == "L" and read_image(tmp_path / name, 3).mode == "RGB"
    assert np.array_equal(read_image(tmp_path / "color.png", 3), noise(9, 9))


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(noise(8, 8, 1).astype(np.uint16) * 200).save(tmp_path / "deep.png")
    png = tmp_path / "cut.png"
    Image.fromarray(noise(64, 64)).save(png)
    png.write_bytes(png.read_bytes()[:2000])
    assert "text.png" in message(read_image, tmp_path / "text.png", 3)
    assert "cut.png" in message(read_image, png, 3)
    assert "8 bits" in message(read_image, tmp_path / "deep.png", 3)
    assert "none.png: No such file" in message(read_image, tmp_path / "none.png", 3)


def write_mnist(folder: Path, packed: bool = True, size: int = 28) -> np.ndarray:
    """Writes 400 of scikit-learn's digits as MNIST's four files. Returns the training images."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = (digits.images * 15.9).astype(np.uint8)
    if size == 28:
        images = np.pad(np.repeat(np.repeat(images, 3, 1), 3, 2), ((0, 0), (2, 2), (2, 2)))
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", slice(0, 300)), ("t10k", slice(300, 400))):
        for kind, values in (("images-idx3", images[rows]), ("labels-idx1", digits.target[rows])):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            data = header + values.astype(np.uint8).tobytes()
            file = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(data) if packed else data)
    return images[:300]


@pytest.mark.parametrize("place, packed, size", [("", True, 28), ("", False, 28), ("MNIST/raw", True, 28),
                                                 ("", False, 8)])
def test_mnist(tmp_path, place, packed, size):
    images = write_mnist(tmp_path / place, packed, size)
    train, val = (load_labelled_images("mnist", str(tmp_path), "nowhere", part) for part in (True, False))
    assert np.array_equal(train.images, images) and train.images.dtype == np.uint8 and train.labels[17] == 7
    assert len(val.images) == len(val.labels) == 100 and train.class_names == [str(n) for n in range(10)]


def test_mnist_is_read_as_torchvision_reads_it(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw", packed=False)
    ours = load_labelled_images("mnist", None, str(tmp_path), train=False)  # no download
    theirs = torchvision.datasets.MNIST(tmp_path, train=False)
    assert np.array_equal(ours.images, theirs.data) and np.array_equal(ours.labels, theirs.targets)


def write_cifar10(folder: Path, monkeypatch) -> np.ndarray:
    """Writes twelve images as CIFAR-10's batches, and makes torchvision expect their checksums.

    Returns the training images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([noise(32, 32, seed=n) for n in range(12)])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    batches = {"batches.meta": {"label_names": names}}
    for n, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        batches[name] = {"data": images[2 * n : 2 * n + 2].transpose(0, 3, 1, 2).reshape(2, 3072), "labels": [n, n + 1]}
    md5 = {}
    for name, batch in batches.items():
        (folder / name).write_bytes(pickle.dumps(batch))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, md5[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setitem(kind.meta, "md5", md5["batches.meta"])
    return images[:10]


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py"])
def test_cifar10(tmp_path, place, monkeypatch):
    images = write_cifar10(tmp_path / "cifar-10-batches-py", monkeypatch)
    train, val = (load_labelled_images("cifar10", str(tmp_path / place), "nowhere", part) for part in (True, False))
    assert np.array_equal(train.images, images) and list(train.labels) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert len(val.images) == 2 and list(val.labels) == [5, 6] and val.class_names[9] == "truck"


def run_by_pickle(file: str) -> dict:
    Path(file).write_text("it ran")
    return {}


class Malicious:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return run_by_pickle, (str(self.file),)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_changed_files_of_cifar10_are_not_opened(tmp_path, monkeypatch, name):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, monkeypatch)
    (folder / name).write_bytes(pickle.dumps(Malicious(tmp_path / "trace")))
    assert "MD5" in message(load_labelled_images, "cifar10", str(tmp_path), "nowhere", True)
    assert not (tmp_path / "trace").exists()


def test_mistakes_in_image_data_are_named(tmp_path, monkeypatch):
    def load(dataset: str, folder: Path | None, cache_dir: Path = tmp_path) -> str:
        return message(load_labelled_images, dataset, folder and str(folder), str(cache_dir), True)

    assert "train-images-idx3-ubyte" in load("mnist", tmp_path)
    assert "cifar-10-batches-py" in load("cifar10", tmp_path)
    (tmp_path / "photos/cats").mkdir(parents=True)
    for dataset in "mnist", "cifar10":
        assert "your own images: data.dataset=imagefolder" in load(dataset, tmp_path / "photos")

    write_mnist(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for content in (whole[:1000], gzip.compress(gzip.decompress(whole)[:-5]), b"junk", gzip.compress(b"junk, too")):
        images.write_bytes(content)
        assert f"cannot read {images}: " in load("mnist", tmp_path)
    images.write_bytes((tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert "(100, 28, 28) and (300,)" in load("mnist", tmp_path)

    def no_network(*args, **kwargs):
        raise RuntimeError("no\nnetwork")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    assert "no network" in load("cifar10", None, tmp_path / "cache")
    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    assert "no network" in load("mnist", None, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"no IDX file", b"",
                                     b"\0\0\x0d\3" + np.array([1, 1, 1], ">i4").tobytes() + b"\0" * 4])
def test_idx_files_of_another_kind_are_refused(tmp_path, content):
    """Text, an empty file, and an IDX file of 32-bit floats."""
    for name in ("images-idx3", "labels-idx1"):
        (tmp_path / f"train-{name}-ubyte").write_bytes(content)
    with pytest.raises(UserError, match="cannot read .*train-images-idx3-ubyte") as error:
        load_labelled_images("mnist", str(tmp_path), "nowhere", True)
    assert "\n" not in str(error.value)
