"""Images: Perceiver and Perceiver IO classify them, and Perceiver AR generates them value by value."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from perceiver import decoding, pictures
from perceiver.adapters import FourierPositions, InputAdapter, TrainablePositions
from perceiver.config import Count, NonNegative, NonNegativeInt, Positive, Probability
from perceiver.data import (
    LabelledConfig,
    LabelledImages,
    Readable,
    Shuffled,
    TextBlocks,
    Tokens,
    file_array,
    labelled_files,
    left_padded,
    load_labelled_images,
    read_image,
    to_channels,
)
from perceiver.errors import UserError
from perceiver.io import input_files, output_files, progress, report, save_picture
from perceiver.model import init_weights
from perceiver.tasks.base import Autoregression, unigram_bits
from perceiver.tasks.classification import Classification, ClassifierConfig, report_classes

# ----------------------------------------------------------------------------------------------------------------------
# Model

ImageShape = tuple[Count, Count, Count]  # height, width, channels


@dataclass
class ImageInputConfig:
    image_shape: ImageShape = (224, 224, 3)
    features: Literal["pixels", "conv1x1", "conv"] = "pixels"  # see ImageFeatures
    num_feature_channels: Count = 64  # conv1x1 and conv: output channels
    conv_padding: Literal["same", "symmetric"] = "same"  # conv: DeepMind's padding, or the Hugging Face port's
    positions: Literal["fourier", "trainable"] = "fourier"  # concatenated to the features
    num_frequency_bands: Count = 64  # fourier: K, number of bands
    max_resolution: tuple[Count, Count] | None = None  # fourier: twice the highest frequency per axis; null: the grid
    num_position_channels: Count = 256  # trainable: channels

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of the features."""
        height, width, _ = self.image_shape
        if self.features != "conv":
            return height, width
        extra = 3 if self.conv_padding == "same" else -1  # "same" rounds up, "symmetric" rounds down
        return (height + extra) // 4, (width + extra) // 4

    def build(self, init_scale: float) -> InputAdapter:
        """Images (B, channels, height, width) -> (B, M, C)."""
        if self.positions == "fourier":
            positions = FourierPositions(self.grid, self.num_frequency_bands, self.max_resolution)
        else:
            num_channels = self.num_position_channels
            positions = TrainablePositions(self.grid, num_channels, num_channels, init_scale)
        features = ImageFeatures(self, init_scale)
        return InputAdapter(features, features.num_channels, positions)


class ImageFeatures(nn.Module):
    """Images (B, C, H, W) -> features (B, H', W', C') (Perceiver IO, appendix A.1; DeepMind's io_processors.py).

    pixels     the values themselves
    conv1x1    a linear map of each pixel
    conv       7x7 convolution with stride 2, BatchNorm, ReLU, 3x3 max-pooling with stride 2. The padding is "same", as
               in TensorFlow: H' = H / 4, rounded up. Or it is "symmetric", 3 pixels around the image and none before
               the pooling: H' = (H - 1) / 4, rounded down
    """

    def __init__(self, config: ImageInputConfig, init_scale=0.02):
        super().__init__()
        self.config = config
        num_image_channels = config.image_shape[2]
        self.num_channels = config.num_feature_channels
        if config.features == "pixels":
            self.num_channels = num_image_channels
            self.conv = nn.Identity()
        elif config.features == "conv1x1":
            self.conv = nn.Conv2d(num_image_channels, self.num_channels, 1)
        else:
            self.conv = nn.Conv2d(num_image_channels, self.num_channels, 7, stride=2, bias=False)
            self.norm = nn.BatchNorm2d(self.num_channels)
        init_weights(self, init_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError unless the images have the number of channels of `image_shape`."""
        channels = self.config.image_shape[2]
        if images.shape[1] != channels:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (batch, {channels}, height, width)")
        if self.config.features != "conv":
            return self.conv(images).movedim(1, -1)
        x = self.conv(self.pad(images, kernel=7, symmetric=3))
        x = self.norm(x).relu()
        x = self.pad(x, kernel=3, symmetric=0)  # padding with zeros is safe: ReLU returns no negative values
        x = F.max_pool2d(x, 3, stride=2)
        return x.movedim(1, -1)

    def pad(self, x, kernel, symmetric):
        if self.config.conv_padding == "symmetric":
            return F.pad(x, [symmetric] * 4)
        height, width = x.shape[2:]
        return F.pad(x, same_padding(width, kernel) + same_padding(height, kernel))


def same_padding(size, kernel):
    """The padding (before, after) of TensorFlow's "same" with stride 2: ceil(size / 2) outputs, an odd pixel after."""
    padding = kernel - 2 + size % 2
    return padding // 2, padding - padding // 2


@dataclass
class ImageClassifierConfig(ClassifierConfig):
    input: ImageInputConfig = field(default_factory=ImageInputConfig)


# ----------------------------------------------------------------------------------------------------------------------
# Data

# Mean and std of each channel, for values in [0, 1]
NORMALIZATION = {
    "mnist": ((0.5,), (0.5,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass
class ImageFilesConfig(LabelledConfig):
    """A data set of images, and its augmentation in training."""

    dataset: Literal["mnist", "cifar10", "imagefolder"] = "imagefolder"
    # The folder of the data. An imagefolder holds CLASS/*, or train/CLASS/* and val/CLASS/*. null: mnist and cifar10
    # are read from cache_dir, and downloaded if absent.
    path: str | None = None
    cache_dir: str = "data"
    # The center crop, as a fraction of the largest one; null: 0.875 for imagefolder, 1 for others. Training crops the
    # center, too, unless random_resized_crop is true.
    eval_crop: Annotated[float, "(0, 1]"] | None = None
    random_crop: NonNegativeInt = 0  # training: pad with this many black pixels, then crop at random
    random_resized_crop: bool = False  # training: crop 8% to 100% of the area, aspect ratio 3:4 to 4:3
    flip: bool = False  # training: horizontal flip, p 0.5
    rand_augment_layers: NonNegativeInt = 0  # training: RandAugment operations per image
    rand_augment_magnitude: Annotated[int, "[0, 10]"] = 5

    def __post_init__(self):
        if self.random_crop and self.random_resized_crop:
            raise ValueError(f"random_crop={self.random_crop} must be 0 with random_resized_crop")

    def transform(self, image_shape, train=False):
        """A transform from PIL images to tensors (C, H, W) in [0, 1]. `image_shape` is (H, W, C).

        It draws from PyTorch's CPU generator. Raises UserError unless C is 1 or 3.
        """
        *size, channels = image_shape
        if channels not in (1, 3):
            raise UserError(f"image_shape={list(image_shape)} has {channels} channels; set it to 1 (gray) or 3 (RGB)")
        if train and self.random_resized_crop:
            # DeepMind's order is crop, flip, RandAugment, resize. Here, the crop also resizes.
            steps = [v2.RandomResizedCrop(size, (0.08, 1), (3 / 4, 4 / 3), Image.BICUBIC)]
        else:
            default = 224 / 256 if self.dataset == "imagefolder" else 1
            fraction = self.eval_crop or default
            crop = partial(center_crop, size=size, fraction=fraction)
            steps = [crop, v2.Resize(size, Image.BICUBIC)]
        if train and self.random_crop:
            steps.append(v2.RandomCrop(size, padding=self.random_crop))
        if train and self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if train and self.rand_augment_layers:
            # With 11 bins, magnitudes are 0 to 10, as in DeepMind's autoaugment.py. At magnitude 5, rotation (15
            # degrees), shear (0.15) and solarize (from 128) are the same. Translation is close (51 pixels of 224;
            # DeepMind: 50). Posterize differs (6 bits; DeepMind: 2). Color, contrast, brightness and sharpness differ,
            # too (+-0.45; DeepMind: unchanged). torchvision has Identity instead of Invert, SolarizeAdd and Cutout.
            augment = v2.RandAugment(
                self.rand_augment_layers, self.rand_augment_magnitude, num_magnitude_bins=11, fill=128
            )
            steps.append(augment)
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        return v2.Compose(steps)


def center_crop(image, size, fraction):
    """Crops the center of a PIL image to the aspect ratio of `size` (H, W).

    The sides of the crop are a `fraction` of the largest that fit. For squares, this is DeepMind's padded center crop
    (train/dataset.py). If a margin is odd, the crop is one pixel lower or further right than in transformers.
    """
    sides = np.array(image.size)  # width and height
    target = np.flip(size)
    largest = np.minimum(sides, np.flip(sides) * target / size)
    crop = np.maximum(1, (fraction * largest).astype(int))
    start = (sides - crop + 1) // 2
    end = start + crop
    return image.crop((*start, *end))


@dataclass
class Images(Dataset):
    """Labeled images. Indexing reads an image and transforms it."""

    source: LabelledImages
    transform: Callable
    channels: int

    def __post_init__(self):
        self.labels = self.source.labels
        self.class_names = self.source.class_names

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """image (C, H, W), label: the class number"""
        image = self.source.images[index]
        if isinstance(image, np.ndarray):
            image = to_channels(Image.fromarray(image), self.channels)
        else:
            image = read_image(os.fsdecode(image), self.channels)
        return {"image": self.transform(image), "label": int(self.labels[index])}


def load_images(config, image_shape):
    """Images of `image_shape` (H, W, C) for training and for validation, and a line that names their source.

    Raises UserError if there are none.
    """
    place = (config.dataset, config.path, config.cache_dir)
    if config.dataset != "imagefolder":
        train = load_labelled_images(*place, train=True)
        val = load_labelled_images(*place, train=False)
        note = f"{config.dataset}: {len(train.labels):,} images for training, {len(val.labels):,} for validation"
    elif config.path is None:
        raise UserError("data.path=null must be a folder of images: CLASS/*, or train/CLASS/* and val/CLASS/*")
    else:
        folder = Path(config.path).expanduser()
        *parts, note = labelled_files(folder, IMG_EXTENSIONS, config)
        train, val = map(list_files, parts)
    channels = image_shape[2]
    train_images = Images(train, config.transform(image_shape, train=True), channels)
    val_images = Images(val, config.transform(image_shape), channels)
    return Readable(train_images, config.max_unreadable), Readable(val_images, config.max_unreadable), note


def list_files(classes):
    """The files of the dict `classes`, class name to files, with their labels."""
    images, labels = [], []
    for label, files in enumerate(classes.values()):
        images += files
        labels += [label] * len(files)
    # Workers would copy lists, element by element.
    return LabelledImages(file_array(images), np.array(labels), list(classes))


def image_files(inputs):
    """`inputs`, with each folder replaced by its images. Raises UserError if a folder has none."""
    return input_files(inputs, IMG_EXTENSIONS, "images")


# ----------------------------------------------------------------------------------------------------------------------
# Classification


@dataclass
class ImageDataConfig(ImageFilesConfig):
    mean: tuple[float, ...] | None = None  # of each channel, values in [0, 1]; null: the dataset's
    std: tuple[Positive, ...] | None = None
    mixup_alpha: NonNegative = 0.0  # MixUp in training; 0 disables
    cutmix_alpha: NonNegative = 0.0  # CutMix in training; 0 disables; with both, p 0.5 for each
    label_smoothing: Probability = 0.0  # in training

    def normalize(self, image_shape):
        """Normalizes images (C, H, W). By default, gray images use the averages over the dataset's channels."""
        channels = image_shape[2]
        mean, std = NORMALIZATION[self.dataset]
        if channels == 1:
            mean, std = [np.mean(mean)], [np.mean(std)]
        mean = self.mean or mean
        std = self.std or std
        if not {len(mean), len(std)} <= {1, channels}:
            raise UserError(
                f"data.mean={list(mean)} and data.std={list(std)} must have 1 value or {channels}, one for "
                f"each channel of image_shape={list(image_shape)}; null takes the dataset's"
            )
        return v2.Normalize(mean, std)

    def transform(self, image_shape, train=False):
        """The transform of `ImageFilesConfig`, then `normalize`."""
        return v2.Compose([super().transform(image_shape, train), self.normalize(image_shape)])

    def mixer(self, num_classes):
        """MixUp, CutMix, a random choice between both, or None."""
        mixers = []
        for kind, alpha in (v2.MixUp, self.mixup_alpha), (v2.CutMix, self.cutmix_alpha):
            if alpha:
                mixers.append(kind(alpha=alpha, num_classes=num_classes))
        return v2.RandomChoice(mixers) if mixers else None


@dataclass
class Mixed(Dataset):
    """Images, each mixed with a randomly drawn one.

    torchvision mixes each image of a batch with the one before it. Here its batch is a pair of images. So an example
    does not depend on how a training batch is spread over ranks.
    """

    images: Images
    mix: Callable

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        """image (C, H, W), label (E,): the probabilities of the classes"""
        first = self.images[index]
        second = self.images[torch.randint(len(self), ()).item()]
        mixed = self.mix(default_collate([first, second]))
        return {name: values[0] for name, values in mixed.items()}


class ImageClassification(Classification):
    """Perceiver or Perceiver IO classifies images."""

    name = "image_classification"
    ModelConfig = ImageClassifierConfig
    DataConfig = ImageDataConfig

    def load_data(self):
        data = self.config.data
        train, val, self.data_note = load_images(data, self.config.model.input.image_shape)
        mixer = data.mixer(len(train.class_names))
        if mixer:
            train = Mixed(train, mixer)
        return self.prepare(train, val)

    def loss(self, model, batch):
        smoothing = self.config.data.label_smoothing if model.training else 0.0
        return self.class_sums(model(batch["image"]), batch["label"], smoothing)

    def visualize(self, model):
        """The attention of the four most focused latents over the first validation image."""
        image = self.val_set[0]["image"]
        normalize = self.config.data.normalize(self.config.model.input.image_shape)
        return {"attention": pictures.over_image(model, image, normalize)}

    def predict(self, model, args):
        """Prints the most likely classes of each image. With --attention, writes a picture of each image, too."""
        data, image_shape = self.config.data, self.config.model.input.image_shape
        transform = data.transform(image_shape)
        device = next(model.parameters()).device
        for file, name in progress(image_files(args.inputs), args.limit):
            image = transform(read_image(file, image_shape[2])).to(device)
            written = []
            if args.attention:
                picture = pictures.over_image(model, image, data.normalize(image_shape), args.latents)
                written.append(Path(args.out) / f"{name}-attention.png")
                save_picture(picture, *written)
            report_classes(args, file, model(image[None])[0], self.class_names, written)


# ----------------------------------------------------------------------------------------------------------------------
# Generation. An image is a sequence of S values, row by row. The red, green and blue values of a pixel follow one
# another.

START = 256  # the first token of each sequence; tokens 0 to 255 are the values


@dataclass
class PixelDataConfig(ImageFilesConfig):
    image_shape: ImageShape = (28, 28, 1)

    @property
    def num_values(self):
        """S, the number of values of an image."""
        return math.prod(self.image_shape)


def to_tokens(image):
    """The tokens (1 + S,) of an image (C, H, W) in [0, 1]: START and its values."""
    values = (255 * image).round().long().movedim(0, -1).flatten()
    return np.insert(values.numpy(), 0, START)


def to_images(tokens, image_shape):
    """Images (..., C, H, W) of uint8 from the tokens (..., S) after START. A generated START becomes 255."""
    values = tokens.clamp(max=255).to(torch.uint8)
    return values.unflatten(-1, image_shape).movedim(-1, -3)


def some_values(images):
    """The values (n,) of up to 1000 images."""
    step = math.ceil(len(images) / 1000)
    picked = range(0, len(images), step)
    return np.concatenate([to_tokens(images[index]["image"])[1:] for index in picked])


@dataclass
class PixelCrops(Dataset):
    """Training examples: the first n tokens of an image, cut to the last T.

    The labels are the tokens that follow each of the last N. n is uniform from N to S. Google's
    dataset.py crops sequences that fit into the context in this way. PyTorch's CPU generator draws n.
    """

    images: Dataset
    max_seq_len: int  # T
    num_latents: int  # N

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        """input_ids (T,), padded on the left, labels (N,), pad_mask (T,)"""
        tokens = to_tokens(self.images[index]["image"])
        end = torch.randint(1 + self.num_latents, 1 + len(tokens), ()).item()
        window = tokens[max(0, end - 1 - self.max_seq_len) : end]
        return left_padded(window, self.num_latents, self.max_seq_len, self.num_latents, START)


@dataclass
class PixelBlocks(Dataset):
    """Whole images for evaluation: each value is predicted once, in blocks of N, after all tokens that fit into T."""

    images: Dataset
    num_values: int  # S
    max_seq_len: int  # T
    num_latents: int  # N

    @property
    def num_blocks(self):
        """Number of examples per image."""
        return math.ceil(self.num_values / self.num_latents)

    def __len__(self):
        return len(self.images) * self.num_blocks

    def __getitem__(self, index):
        """input_ids (T,), padded on the left, labels (N,), pad_mask (T,)"""
        number, block = divmod(index, self.num_blocks)
        tokens = Tokens(to_tokens(self.images[number]["image"]))
        return TextBlocks(tokens, self.max_seq_len, self.num_latents, START)[block]


class ImageSequences(Autoregression):
    """Perceiver AR on images: it predicts each value from the values before it."""

    name = "image_ar"
    DataConfig = PixelDataConfig
    unit = "dim"
    vocab_size = 257
    options = ("out",)

    def __init__(self, config):
        super().__init__(config)
        model, data = config.model, config.data
        if model.num_latents > data.num_values:
            raise UserError(
                f"model.num_latents={model.num_latents} must be at most {data.num_values}, the number of values "
                f"of data.image_shape={list(data.image_shape)}"
            )
        height, width, channels = data.image_shape
        self.num_given = 1 + height // 2 * width * channels  # START and the values of the upper half

    def load_data(self):
        model, data = self.config.model, self.config.data
        self.train_images, self.val_images, self.data_note = load_images(data, data.image_shape)
        length = min(model.max_seq_len, data.num_values)
        crops = PixelCrops(self.train_images, length, model.num_latents)
        train_set = Shuffled(crops, data.batch_size, self.config.train.seed)
        val_set = PixelBlocks(self.val_images, data.num_values, length, model.num_latents)
        return self.with_prefix_dropout(train_set), val_set

    def visualize(self, model):
        """The upper halves of up to eight validation images, completed by the model."""
        count = min(8, len(self.val_images))
        tokens = np.stack([to_tokens(self.val_images[index]["image"]) for index in range(count)])  # (B, 1 + S)
        prompts = tokens[:, : self.num_given].tolist()
        steps = decoding.generate(model, prompts, tokens.shape[1] - self.num_given)
        lower = torch.stack(list(steps), dim=1).cpu()
        return {"completions": self.completions(tokens, lower[None])}

    def completions(self, tokens, lower):
        """A picture of images `tokens` (B, 1 + S), and of K versions with the lower halves `lower` (K, B, S / 2)."""
        images = torch.from_numpy(tokens[:, 1:])
        samples = images.repeat(len(lower), 1, 1)
        samples[:, :, self.num_given - 1 :] = lower
        image_shape = self.config.data.image_shape
        return pictures.completions(to_images(images, image_shape), to_images(samples, image_shape))

    def summary(self, metrics):
        """Beside the unigram baseline, which predicts each value by its frequency alone."""
        train, val = some_values(self.train_images), some_values(self.val_images)
        bits = metrics["bits_per_dim"]
        baseline = unigram_bits(Tokens(train), [{"labels": val}])
        return f"{self.config.data.eval_name}: {bits:.3f} bits per dimension; the unigram baseline has {baseline:.3f}"

    def generate(self, model, args):
        """Writes a picture of the prompt's image, its upper half, and samples that complete this half."""
        image_shape = self.config.data.image_shape
        (out,) = output_files(args.out or "completion.png", 1, (".png", ".jpg"))
        image = read_image(args.prompt_file or args.prompt, image_shape[2])
        tokens = to_tokens(self.config.data.transform(image_shape)(image))
        prompt = tokens[: self.num_given].tolist()
        steps = self.sample(model, prompt, args, max_new_tokens=len(tokens) - self.num_given)
        lower = torch.tensor(list(steps)).T  # (number of samples, S / 2)
        save_picture(self.completions(tokens[None], lower[:, None]), out)
        report(args, {"prompt": args.prompt_file or args.prompt, "files": [str(out)]})
