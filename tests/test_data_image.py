"""Images as files of the real formats, as tensors, augmented and mixed."""
import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from perceiver.data import (ImageDataConfig, Shuffled, TrainKeys, eval_loader, image_transform, load_images, read_image,
                            train_loader)
from perceiver.distributed import Ranks
from perceiver.errors import UserError

ONE = Ranks(0, 1, torch.device("cpu"))
AUGMENTED = {"flip": True, "rand_augment_layers": 4, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_mnist(folder: Path, packed: bool = True) -> np.ndarray:
    """scikit-learn's digits as MNIST's four files; returns the images for training."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = np.pad(np.repeat(np.repeat(digits.images * 15.9, 3, 1), 3, 2).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", slice(0, 300)), ("t10k", slice(300, 400))):
        for kind, values in (("images-idx3", images[rows]), ("labels-idx1", digits.target[rows])):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            data = header + values.astype(np.uint8).tobytes()
            file = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(data) if packed else data)
    return images[:300]


def write_cifar10(folder: Path) -> np.ndarray:
    """Twelve images as CIFAR-10's batches; returns those for training, (10, 32, 32, 3)."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([noise(32, 32, seed=n) for n in range(12)])
    for n, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        batch = {"data": images[2 * n : 2 * n + 2].transpose(0, 3, 1, 2).reshape(2, 3072), "labels": [n, n + 1]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return images[:10]


def write_folder(root: Path, size: tuple[int, int] = (40, 50)) -> Path:
    """An ImageFolder of three classes with four images each, for training and two for validation."""
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("n01440764", "n01443537", "n01484850")):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                image = Image.fromarray(noise(*size, seed=10 * label + n))
                image.save(root / part / name / (f"{n}.JPEG" if n % 2 else f"{n}.png"))
    return root


@pytest.mark.parametrize("place, packed", [("", True), ("", False), ("MNIST/raw", True)])
def test_mnist(tmp_path, place, packed):
    images = write_mnist(tmp_path / place, packed)
    train, val = load_images(ImageDataConfig(dataset="mnist", path=str(tmp_path)), (28, 28, 1))
    assert (len(train), len(val)) == (300, 100) and train.class_names == [str(n) for n in range(10)]
    example = train[17]
    assert example["image"].shape == (1, 28, 28) and example["label"] == 7
    assert torch.allclose(example["image"], torch.from_numpy(images[17:18] / 255).float() * 2 - 1, atol=1e-6)


def test_mnist_is_read_as_torchvision_reads_it(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw", packed=False)
    _, val = load_images(ImageDataConfig(dataset="mnist", cache_dir=str(tmp_path)), (28, 28, 1))
    theirs = torchvision.datasets.MNIST(tmp_path, train=False)
    assert np.array_equal(val.images, theirs.data) and np.array_equal(val.labels, theirs.targets)


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py"])
def test_cifar10(tmp_path, place):
    images = write_cifar10(tmp_path / place)
    train, val = load_images(ImageDataConfig(dataset="cifar10", path=str(tmp_path)), (32, 32, 3))
    assert (len(train), len(val)) == (10, 2) and train.class_names[9] == "truck"
    assert [train[n]["label"] for n in range(10)] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5] and val[1]["label"] == 6
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
    expected = ((images[3] / 255 - mean) / std).transpose(2, 0, 1)
    assert np.allclose(train[3]["image"], expected, atol=1e-5)
    grey, _ = load_images(ImageDataConfig(dataset="cifar10", path=str(tmp_path), mean=[0.0], std=[1.0]), (16, 24, 1))
    assert grey[0]["image"].shape == (1, 16, 24)


def test_folders(tmp_path):
    root = write_folder(tmp_path)
    Image.fromarray(noise(9, 9, 1)).save(root / "val" / "n01440764" / "grey.png")
    Image.fromarray(noise(9, 9, 4)).save(root / "val" / "n01440764" / "transparent.png")
    train, val = load_images(ImageDataConfig(path=str(root)), (24, 16, 3))
    assert (len(train), len(val)) == (12, 8) and train.class_names == ["n01440764", "n01443537", "n01484850"]
    assert [train[n]["label"] for n in (0, 4, 11)] == [0, 1, 2]
    assert {val[n]["image"].shape for n in range(8)} == {(3, 24, 16)}


@pytest.mark.parametrize("size", [(320, 480), (512, 320), (256, 256), (224, 224), (96, 160)])
def test_validation_sees_what_transformers_processor_makes(size):
    from transformers.models.perceiver.image_processing_pil_perceiver import PerceiverImageProcessorPil
    image = Image.fromarray(noise(*size))
    theirs = PerceiverImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    ours = image_transform(ImageDataConfig(path="."), (224, 224, 3))(image)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("height, width", [(100, 131), (131, 100), (99, 99), (37, 61), (224, 225)])
def test_the_centre_is_deepminds(height, width):
    """Each pixel tells its place; the crop of c = int(7/8 min) is at ((h - c) + 1) // 2, ((w - c) + 1) // 2."""
    from perceiver.data.image import crop_centre
    c = int(224 / (224 + 32) * min(height, width))
    top, left = ((height - c) + 1) // 2, ((width - c) + 1) // 2
    image = noise(height, width)
    assert np.array_equal(crop_centre(Image.fromarray(image), (224, 224), 0.875), image[top : top + c, left : left + c])


def test_centres_of_other_proportions():
    from perceiver.data.image import crop_centre
    image = Image.fromarray(noise(100, 100))
    assert crop_centre(image, (32, 64), 1.0).size == (100, 50) and crop_centre(image, (64, 32), 0.5).size == (25, 50)
    assert crop_centre(Image.fromarray(noise(1, 1)), (32, 32), 0.875).size == (1, 1)


def test_random_crop_moves_the_image_by_the_padding(tmp_path):
    images = write_mnist(tmp_path)
    train, val = load_images(ImageDataConfig(dataset="mnist", path=str(tmp_path), random_crop=2), (28, 28, 1))
    place = np.full((32, 32), -1.0)
    place[2:30, 2:30] = images[0] / 127.5 - 1
    crops = {(top, left): place[top : top + 28, left : left + 28] for top in range(5) for left in range(5)}
    torch.manual_seed(0)
    found = set()
    for _ in range(100):
        image = train[0]["image"][0].numpy()
        found |= {key for key, crop in crops.items() if np.allclose(crop, image, atol=1e-5)}
    assert len(found) > 20
    assert torch.equal(val[0]["image"], val[0]["image"]) and val[0]["image"].shape == (1, 28, 28)


@pytest.mark.parametrize("option", [{"flip": True}, {"random_resized_crop": True}, {"rand_augment_layers": 4},
                                    AUGMENTED])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_a_function_of_seed_step_and_index(tmp_path, option, channels):
    norm = {"mean": [0.5] * channels, "std": [0.5] * channels}
    config = ImageDataConfig(path=str(write_folder(tmp_path)), **option, **norm)
    train, val = load_images(config, (16, 16, channels))
    shuffled = Shuffled(train, batch_size=4, seed=0)

    def batches(workers: int) -> list[dict]:
        return list(train_loader(shuffled, TrainKeys(4, 2, ONE, 0, 6), workers))

    plain = batches(0)
    torch.rand(1)
    for a, b in zip(plain, batches(2 if option is AUGMENTED else 0), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    images = torch.cat([batch["image"] for batch in plain])
    assert images.dtype == torch.float32 and images.shape == (24, channels, 16, 16)
    assert images.min() >= -1.001 and images.max() <= 1.001 and len({image.numpy().tobytes() for image in images}) > 13
    assert torch.equal(val[1]["image"], val[1]["image"]) and val[1]["label"] == 0


def constant_images(tmp_path: Path, **config) -> Shuffled:
    """Three classes of images that are 0, 100 and 200 everywhere: what was mixed can be read off."""
    for label, name in enumerate("abc"):
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(np.full((20, 20), 100 * label, np.uint8)).save(tmp_path / part / name / "0.png")
    config = ImageDataConfig(path=str(tmp_path), mean=[0.0], std=[100 / 255], **config)
    train, val = load_images(config, (20, 20, 1))
    assert val[2]["label"] == 2
    return Shuffled(train, batch_size=3, seed=0)


def test_mixup(tmp_path):
    mixed = constant_images(tmp_path, mixup_alpha=0.2)
    shares = []
    for step in range(100):
        for example in (mixed[step, index] for index in range(3)):
            image, target = example["image"], example["label"]
            assert target.shape == (3,) and target.sum().item() == pytest.approx(1)
            assert torch.allclose(image, target @ torch.tensor([0.0, 1.0, 2.0]), atol=1e-5)
            shares.append(target.max().item())
    assert sum(share > 0.99 for share in shares) > 100 and sum(share < 0.9 for share in shares) > 30  # Beta(0.2, 0.2)


def test_cutmix(tmp_path):
    mixed = constant_images(tmp_path, cutmix_alpha=1.0)
    own = 0
    for step in range(50):
        for index in range(3):
            image, target = mixed[step, index]["image"].round().long(), mixed[step, index]["label"]
            counts = torch.bincount(image.flatten(), minlength=3) / 400
            assert torch.allclose(counts, target, atol=1e-5)
            own += target.max().item() == 1
            if target.max() < 1:  # the other image is a box
                rows, columns = torch.nonzero(image[0] == target.topk(2).indices[1], as_tuple=True)
                corner = image[0, 0, 0] == target.topk(2).indices[1]
                assert corner or len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert own < 100


def test_both_mixings_and_targets_in_batches(tmp_path):
    mixed = constant_images(tmp_path, mixup_alpha=0.2, cutmix_alpha=1.0)
    flat = [mixed[step, 0]["image"].unique().numel() == 1 for step in range(200)]
    assert 60 < sum(flat) < 190  # MixUp, or CutMix with the same class
    batch = next(iter(train_loader(mixed, TrainKeys(3, 1, ONE, 0, 1), 0)))
    assert batch["image"].shape == (3, 1, 20, 20)
    assert batch["label"].shape == (3, 3) and batch["label"].dtype == torch.float


def message(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, workers):
    root = write_folder(tmp_path)
    file = root / "val" / "n01440764" / "1.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    _, val = load_images(ImageDataConfig(path=str(root)), (16, 16, 3))
    text = message(list, eval_loader(val, 6, ONE, workers))
    assert text.startswith(f"cannot read {file}: ") and "Traceback" not in text


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


def test_mistakes_in_data_are_named(tmp_path, monkeypatch):
    def load(dataset: str, folder: Path | None, shape=(28, 28, 1), **config) -> str:
        return message(load_images, ImageDataConfig(dataset=dataset, path=folder and str(folder), **config), shape)

    assert "train-images-idx3-ubyte" in load("mnist", tmp_path) and "data_batch_1" in load("cifar10", tmp_path)
    assert "train/CLASS" in load("imagefolder", tmp_path)
    root = write_folder(tmp_path / "folder")
    assert "5 channels" in load("imagefolder", root, (28, 28, 5)) and "data.mean" in load("imagefolder", root)
    (root / "val" / "n01484850").rename(root / "val" / "other")
    assert "the same classes" in load("imagefolder", root, (28, 28, 3))

    write_mnist(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for content in (whole[:1000], gzip.compress(gzip.decompress(whole)[:-5]), b"junk", gzip.compress(b"junk, too")):
        images.write_bytes(content)
        assert f"cannot read {images}: " in load("mnist", tmp_path)
    images.write_bytes((tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert "(100, 28, 28) and (300,)" in load("mnist", tmp_path)
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(b"junk")
    assert f"cannot read {tmp_path / 'data_batch_3'}: " in load("cifar10", tmp_path, (32, 32, 3))

    def no_network(*args, **kwargs):
        raise RuntimeError("no\nnetwork")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert "no network" in load("cifar10", None, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("config, words", [
    ({"dataset": "svhn"}, "dataset='svhn'"), ({}, "path=None"), ({"std": [0.0, 1.0, 1.0]}, "std="),
    ({"mean": [0.5]}, "mean="), ({"eval_crop": 2.0}, "eval_crop=2.0"),
    ({"rand_augment_magnitude": 11}, "rand_augment_magnitude=11"),
    ({"mixup_alpha": -1.0}, "mixup_alpha=-1.0"), ({"random_crop": 4, "random_resized_crop": True}, "random_crop=4"),
])
def test_mistakes_in_the_config_are_named(config, words):
    with pytest.raises(ValueError, match=words):
        ImageDataConfig(**({"path": "."} if config else {}) | config)
