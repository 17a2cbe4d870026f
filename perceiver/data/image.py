"""Images with labels: files in folders, MNIST and CIFAR-10, augmentation and mixing."""
import gzip
import pickle
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from perceiver.config import require
from perceiver.data.batches import LoaderConfig
from perceiver.errors import UserError

# name: mean and std of channels in [0, 1] as the recipes have them, and the share of the image that validation sees
NORMS = {
    "mnist": ((0.5,), (0.5,), 1.0),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 1.0),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224 / 256),
}


@dataclass
class ImageDataConfig(LoaderConfig):
    dataset: str = "imagefolder"  # mnist, cifar10 or imagefolder: train/CLASS/* and val/CLASS/*, as ImageNet
    path: str | None = None  # folder with the data; only mnist and cifar10 can do without
    cache_dir: str = "data"  # without a path: where mnist and cifar10 are looked for, and downloaded to
    mean: tuple[float, ...] | None = None  # of channels in [0, 1], subtracted; null: the dataset's
    std: tuple[float, ...] | None = None  # of channels in [0, 1], divided by; null: the dataset's
    eval_crop: float | None = None  # side of the centre that validation sees; null: 0.875 of folders, 1 of the others
    random_crop: int = 0  # training: black pixels added at each side before a random crop to the image's size
    random_resized_crop: bool = False  # training: a random box of 8% to 100% of the area, sides 3:4 to 4:3
    flip: bool = False  # training: left and right exchanged, in half of the images
    rand_augment_layers: int = 0  # training: random operations on each image (RandAugment), one after the other
    rand_augment_magnitude: int = 5  # their strength, 0 to 10
    mixup_alpha: float = 0.0  # training: images mixed with others, MixUp's parameter; 0: not
    label_smoothing: float = 0.0  # training: share of a label's probability that is spread over all classes
    cutmix_alpha: float = 0.0  # training: boxes pasted from others, CutMix's; with both, half of the images get each

    def __post_init__(self):
        super().__post_init__()
        require(self.dataset in NORMS, f"dataset={self.dataset!r} must be one of {', '.join(NORMS)}")
        require(self.path is not None or self.dataset != "imagefolder",
                "path=None must name a folder with train/CLASS/* and val/CLASS/* if dataset is imagefolder")
        mean, std, eval_crop = NORMS[self.dataset]
        self.mean, self.std = self.mean or mean, self.std or std
        self.eval_crop = self.eval_crop or eval_crop
        require(len(self.mean) == len(self.std), f"mean={self.mean} and std={self.std} must be equally many")
        require(min(self.std) > 0, f"std={self.std} must be positive")
        require(0 < self.eval_crop <= 1, f"eval_crop={self.eval_crop} must be in (0, 1]")
        require(0 <= self.rand_augment_magnitude <= 10,
                f"rand_augment_magnitude={self.rand_augment_magnitude} must be 0 to 10")
        require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        for name in ("random_crop", "rand_augment_layers", "mixup_alpha", "cutmix_alpha"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(not (self.random_crop and self.random_resized_crop),
                f"random_crop={self.random_crop} must be 0 with random_resized_crop")


# ----------------------------------------------------------------------------------------------------------------------
# Transforms: images to tensors (C, H, W)


def image_transform(config: ImageDataConfig, image_shape: tuple[int, ...], train: bool = False
                    ) -> Callable[[Image.Image], Tensor]:
    """For images of `image_shape`, (H, W, C). Randomness is drawn from torch's CPU generator."""
    *size, channels = image_shape
    if channels not in (1, 3) or len(config.mean) not in (1, channels):
        raise UserError(f"model.input.image_shape={list(image_shape)} has {channels} channels; it must have 1 (grey) "
                        f"or 3 (RGB), and data.mean={list(config.mean)} as many")
    bicubic = InterpolationMode.BICUBIC
    steps = [v2.Lambda(partial(crop_centre, size=size, share=config.eval_crop)), v2.Resize(size, bicubic)]
    if train and config.random_resized_crop:
        # DeepMind's order is crop, flip, RandAugment, and then the resizing, which here comes with the crop.
        steps = [v2.RandomResizedCrop(size, (0.08, 1), (3 / 4, 4 / 3), bicubic)]
    if train and config.random_crop:
        steps += [v2.RandomCrop(size, padding=config.random_crop)]
    if train and config.flip:
        steps += [v2.RandomHorizontalFlip()]
    if train and config.rand_augment_layers:
        # With 11 bins, magnitudes are the 0 to 10 of DeepMind's autoaugment.py. At 5, rotation (15 degrees), shear
        # (0.15) and solarising (from 128) are the same, and translation nearly (51 pixels of 224; there 50 of any
        # size). Not the same: posterising to 6 bits (there 2); colour, contrast, brightness and sharpness by +-0.45
        # (there by factor 1.0, so not at all); torchvision has the identity, and no Invert, SolarizeAdd and Cutout.
        steps += [v2.RandAugment(config.rand_augment_layers, config.rand_augment_magnitude, num_magnitude_bins=11,
                                 fill=128)]
    return v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(config.mean, config.std)])


def crop_centre(image: Image.Image, size: tuple[int, int], share: float) -> Image.Image:
    """The centre of an image in the proportions of `size`, with `share` of the sides of the largest that fits.

    For squares, it's DeepMind's padded centre crop (train/dataset.py). Where it can't be in the very middle, it is a
    pixel further right and down than transformers'. Like there, but not in DeepMind's training, resizing smooths.
    """
    (width, height), (h, w) = image.size, size
    crop_height = max(1, int(share * min(height, width * h / w)))
    crop_width = max(1, int(share * min(width, height * w / h)))
    top, left = (height - crop_height + 1) // 2, (width - crop_width + 1) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def read_image(file: str | Path, channels: int) -> Image.Image:
    """An image file in grey (1 channel) or RGB (3). Raises UserError if it is none, is broken, or has over 8 bits."""
    with reading(file):
        image = Image.open(file)
        image.load()
    return convert(image, channels, file)


def convert(image: Image.Image, channels: int, file: str | Path = "image") -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{file} has pixels of kind {image.mode}; give an image with 8 bits a channel")
    return image.convert("L" if channels == 1 else "RGB")


# ----------------------------------------------------------------------------------------------------------------------
# Datasets


class Images(Dataset):
    """Images with labels, files or arrays, each transformed and, with `mix`, mixed with another one of them."""

    def __init__(self, images: list[str] | np.ndarray, labels: list[int] | np.ndarray, class_names: list[str],
                 transform: Callable[[Image.Image], Tensor], channels: int, mix: Callable | None = None):
        """`images` are files' names, or (n, height, width) or (n, height, width, 3) of uint8."""
        self.images, self.labels, self.class_names = images, labels, class_names
        self.transform, self.channels, self.mix = transform, channels, mix

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        """image (C, H, W), and label: a class, or with `mix` the probabilities of all, (number of classes,)"""
        image, label = self.read(index), int(self.labels[index])
        if self.mix is None:
            return {"image": image, "label": label}
        # torchvision mixes each image of a batch with the one before it. This batch is of two: the example depends on
        # no others of its batch, and so not on how that is spread over ranks.
        other = torch.randint(len(self), ()).item()
        images, labels = self.mix(torch.stack((image, self.read(other))),
                                  torch.tensor([label, int(self.labels[other])]))
        return {"image": images[0], "label": labels[0]}

    def read(self, index: int) -> Tensor:
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return self.transform(convert(Image.fromarray(image), self.channels))
        return self.transform(read_image(image, self.channels))


def load_images(config: ImageDataConfig, image_shape: tuple[int, ...]) -> tuple[Images, Images]:
    """Images for training and for validation, as `image_shape` (H, W, C). Raises UserError if they are not there."""
    (*train, class_names), (*val, val_names) = (READERS[config.dataset](config, part) for part in (True, False))
    if class_names != val_names:
        different = sorted(set(class_names) ^ set(val_names))
        raise UserError(f"data.path={config.path}: train and val must hold the same classes; one lacks {different[0]}")
    mixers = [kind(alpha=alpha, num_classes=len(class_names))
              for kind, alpha in ((v2.MixUp, config.mixup_alpha), (v2.CutMix, config.cutmix_alpha)) if alpha]
    mix = v2.RandomChoice(mixers) if mixers else None
    return (Images(*train, class_names, image_transform(config, image_shape, train=True), image_shape[2], mix),
            Images(*val, class_names, image_transform(config, image_shape), image_shape[2]))


def read_folder(config: ImageDataConfig, train: bool) -> tuple[list[str], list[int], list[str]]:
    folder = Path(config.path) / ("train" if train else "val")
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except OSError as error:
        raise UserError(f"data.path={config.path} must hold train/CLASS/* and val/CLASS/*: "
                        f"{' '.join(str(error).split())}") from None
    return [file for file, _ in found.samples], found.targets, found.classes


def read_mnist(config: ImageDataConfig, train: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    part = "train" if train else "t10k"
    files = locate(config, f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    images, labels = (read_idx(file) for file in files)
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max() > 9:
        raise UserError(f"{files[0]} and {files[1].name} hold {images.shape} and {labels.shape} numbers; they must "
                        "hold images (n, height, width) and labels (n,) from 0 to 9")
    return images, labels, [str(digit) for digit in range(10)]


def read_idx(file: Path) -> np.ndarray:
    """An IDX file: two zeros, the type (8: uint8), the number of dimensions, those as big-endian int32, the values."""
    with reading(file):
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not start as an IDX file of bytes does")
        shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def read_cifar10(config: ImageDataConfig, train: bool) -> tuple[np.ndarray, list[int], list[str]]:
    names = [f"data_batch_{n}" for n in range(1, 6)] if train else ["test_batch"]
    images, labels, class_names = [], [], []
    for file in locate(config, *names, "batches.meta"):
        with reading(file), open(file, "rb") as stream:
            values = pickle.load(stream, encoding="latin1")
            if file.name == "batches.meta":
                class_names = values["label_names"]
            else:
                images.append(values["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels += values["labels"]
    return np.concatenate(images), labels, class_names


READERS = {"mnist": read_mnist, "cifar10": read_cifar10, "imagefolder": read_folder}


def locate(config: ImageDataConfig, *names: str) -> list[Path]:
    """The files of these names, or names with .gz; without data.path, they are downloaded if they are not there."""
    root = Path(config.path or config.cache_dir)
    folders = (root, root / "MNIST" / "raw", root / "cifar-10-batches-py")  # the latter two are torchvision's

    def find(name: str) -> Path | None:
        files = (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz"))
        return next((file for file in files if file.is_file()), None)

    if config.path is None and not all(find(name) for name in names):
        print(f"downloading {config.dataset} to {root}", file=sys.stderr)
        try:
            {"mnist": torchvision.datasets.MNIST, "cifar10": torchvision.datasets.CIFAR10}[config.dataset](
                root, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"data.dataset={config.dataset} cannot be had ({' '.join(str(error).split())}); put "
                            f"{', '.join(names)} into {root}, or name their folder with data.path=") from None
    for name in names:
        if find(name) is None:
            raise UserError(f"there is no {name} in {root}; data.dataset={config.dataset} needs {', '.join(names)}")
    return [find(name) for name in names]


@contextmanager
def reading(file: str | Path):
    try:
        yield
    except Exception as error:  # of all kinds: what a decoder runs into in a broken file
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {file}: {reason}") from None
