"""Images: features, transforms, mixing, sequences of values, models that classify and complete them."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from conftest import ROOT, new_checkpoint, read_metrics, run_script
from digits import write_digits
from perceiver import pictures
from perceiver.config import Config, build, load_config
from perceiver.data import (
    IGNORE,
    Shuffled,
    TrainKeys,
    collate_padded,
    eval_loader,
    load_labelled_images,
    read_image,
    train_loader,
)
from perceiver.distributed import Ranks
from perceiver.errors import UserError
from perceiver.tasks import TASKS
from perceiver.tasks.images import (
    START,
    ImageClassification,
    ImageClassifierConfig,
    ImageDataConfig,
    ImageInputConfig,
    ImageSequences,
    Mixed,
    PixelBlocks,
    PixelCrops,
    PixelDataConfig,
    center_crop,
    image_files,
    load_images,
    same_padding,
    to_images,
    to_tokens,
)

ONE = Ranks(0, 1, torch.device("cpu"))
AUGMENTED = {"flip": True, "rand_augment_layers": 4, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}
CLASSES = ["n01440764", "n01443537", "n01484850"]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_classes(folder: Path, count: int, size: tuple[int, int] = (40, 50)) -> Path:
    """Writes `count` images for each of three classes."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            image = Image.fromarray(noise(*size, seed=10 * label + n))
            image.save(folder / name / (f"{n}.JPEG" if n % 2 else f"{n}.png"))
    return folder


def write_folder(root: Path) -> Path:
    """Writes folders train and val of three classes. A class has four images in train and two in val."""
    write_classes(root / "train", 4)
    write_classes(root / "val", 2)
    return root


def message(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Features


@pytest.mark.parametrize("size, kernel, padding", [(224, 7, (2, 3)), (112, 3, (0, 1)), (225, 7, (3, 3)), (5, 3, (1, 1)),
                                                   (1, 7, (3, 3))])
def test_same_padding_is_tensorflows(size, kernel, padding):
    assert same_padding(size, kernel) == padding


@pytest.mark.parametrize("kwargs, grid, num_channels", [
    (dict(), (9, 14), 2 + 18), (dict(features="conv1x1"), (9, 14), 5 + 18), (dict(features="conv"), (3, 4), 5 + 18),
    (dict(features="conv", conv_padding="symmetric"), (2, 3), 5 + 18), (dict(positions="trainable"), (9, 14), 2 + 6)])
def test_images_of_any_shape_and_channel_count(kwargs, grid, num_channels):
    config = ImageInputConfig((9, 14, 2), num_feature_channels=5, num_frequency_bands=4, num_position_channels=6,
                              **kwargs)
    adapter, images = config.build(0.02), torch.randn(3, 2, 9, 14)
    assert config.grid == adapter.positions.grid == adapter.features(images).shape[1:-1] == grid
    assert adapter.num_channels == num_channels
    assert adapter(images).shape == (3, grid[0] * grid[1], num_channels)
    with pytest.raises(ValueError, match=r"images of shape \(3, 1, 9, 14\), expected \(batch, 2, height, width\)"):
        adapter(images[:, :1])


def test_pixels_come_with_their_own_positions():
    """The inputs are the pixels row by row, each with its own coordinates."""
    config, images = ImageInputConfig((3, 5, 1), num_frequency_bands=2), torch.arange(15.0).view(1, 1, 3, 5)
    x = config.build(0.02)(images)[0]
    row, column = (x[:, 1] + 1) * 1, (x[:, 2] + 1) * 2
    torch.testing.assert_close(x[:, 0], 5 * row + column)


@pytest.mark.parametrize("values, words", [
    ({"image_shape": [28, 28]}, "image_shape=[28, 28] must have 3 values"),
    ({"max_resolution": [0, 3]}, "max_resolution=0 must be at least 1"),
    ({"features": "conv3"}, "features='conv3' must be one of pixels, conv1x1, conv"),
    ({"positions": "sin"}, "positions='sin' must be one of fourier, trainable"),
    ({"num_frequency_bands": 0}, "num_frequency_bands=0 must be at least 1"),
    ({"conv_padding": "x"}, "conv_padding"),
])
def test_mistakes_in_the_input_config_are_named(values, words):
    assert words in message(build, ImageInputConfig, values)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_folders(tmp_path):
    root = write_folder(tmp_path)
    Image.fromarray(noise(9, 9, 1)).save(root / "val" / CLASSES[0] / "gray.png")
    Image.fromarray(noise(9, 9, 4)).save(root / "val" / CLASSES[0] / "transparent.png")
    train, val, note = load_images(ImageDataConfig(path=str(root)), (24, 16, 3))
    assert (len(train), len(val)) == (12, 8) and train.class_names == CLASSES
    assert [train[n]["label"] for n in (0, 4, 11)] == [0, 1, 2]
    assert {val[n]["image"].shape for n in range(8)} == {(3, 24, 16)}
    assert "12 examples for training, 8 for validation" in note


def test_without_a_split_a_part_of_each_class_is_held_out(tmp_path):
    root = write_classes(tmp_path, 4)
    train, val, _ = load_images(ImageDataConfig(path=str(root), val_fraction=0.25), (16, 16, 3))
    assert list(train.labels) == [0] * 3 + [1] * 3 + [2] * 3 and list(val.labels) == [0, 1, 2]
    files = {*train.source.images, *val.source.images}
    assert len(files) == 12 and train.class_names == val.class_names == CLASSES


def test_a_config_needs_no_data():
    """Published models come without data."""
    config = build(ImageDataConfig, {})
    assert config.transform((16, 16, 3))(Image.new("RGB", (20, 20))).shape == (3, 16, 16)
    assert "data.path=null must be a folder of images" in message(load_images, config, (16, 16, 3))


def test_normalization():
    """Mean and std come from the config or else the dataset. Gray images take their averages over the channels."""
    image = Image.fromarray(noise(32, 32))
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
    found = ImageDataConfig(dataset="cifar10").transform((32, 32, 3))(image)
    assert np.allclose(found, ((noise(32, 32) / 255 - mean) / std).transpose(2, 0, 1), atol=1e-5)
    gray = image.convert("L")
    for config, expected_mean, expected_std in (
        (ImageDataConfig(dataset="cifar10"), mean.mean(), std.mean()),
        (ImageDataConfig(dataset="cifar10", mean=(0.0,), std=(1.0,)), 0, 1),
        (ImageDataConfig(dataset="mnist"), 0.5, 0.5),
    ):
        found = config.transform((32, 32, 1))(gray)
        assert np.allclose(found[0], (np.array(gray) / 255 - expected_mean) / expected_std, atol=1e-5)
    found = ImageDataConfig(dataset="mnist").transform((32, 32, 3))(image)  # one value for all channels
    assert np.allclose(found, (noise(32, 32) / 127.5 - 1).transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(320, 480), (512, 320), (256, 256), (224, 224), (96, 160)])
def test_validation_sees_what_transformers_processor_makes(size):
    from transformers.models.perceiver.image_processing_pil_perceiver import PerceiverImageProcessorPil
    image = Image.fromarray(noise(*size))
    theirs = PerceiverImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    ours = ImageDataConfig().transform((224, 224, 3))(image)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("height, width", [(100, 131), (131, 100), (99, 99), (37, 61), (224, 225)])
def test_the_center_is_deepminds(height, width):
    """DeepMind crops a square with sides c = int(7/8 min(h, w)) at ((h - c) + 1) // 2, ((w - c) + 1) // 2."""
    c = int(224 / (224 + 32) * min(height, width))
    top, left = ((height - c) + 1) // 2, ((width - c) + 1) // 2
    image = noise(height, width)
    assert np.array_equal(center_crop(Image.fromarray(image), (224, 224), 0.875), image[top : top + c, left : left + c])


def test_centers_of_other_proportions():
    image = Image.fromarray(noise(100, 100))
    assert center_crop(image, (32, 64), 1.0).size == (100, 50) and center_crop(image, (64, 32), 0.5).size == (25, 50)
    assert center_crop(Image.fromarray(noise(1, 1)), (32, 32), 0.875).size == (1, 1)


def test_random_crop_moves_the_image_by_the_padding(tmp_path):
    config = ImageDataConfig(dataset="mnist", path=str(write_digits(tmp_path)), random_crop=2)
    train, val, note = load_images(config, (8, 8, 1))
    assert note == "mnist: 1,437 images for training, 360 for validation"
    images = load_labelled_images("mnist", str(tmp_path), "data", train=True).images
    place = np.full((12, 12), -1.0)
    place[2:10, 2:10] = images[0] / 127.5 - 1
    crops = {(top, left): place[top : top + 8, left : left + 8] for top in range(5) for left in range(5)}
    torch.manual_seed(0)
    found = set()
    for _ in range(100):
        image = train[0]["image"][0].numpy()
        found |= {key for key, crop in crops.items() if np.allclose(crop, image, atol=1e-5)}
    assert len(found) > 20
    assert torch.equal(val[0]["image"], val[0]["image"]) and val[0]["image"].shape == (1, 8, 8)


@pytest.mark.parametrize("option", [{"flip": True}, {"random_resized_crop": True}, {"rand_augment_layers": 4},
                                    AUGMENTED])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_a_function_of_seed_step_and_index(tmp_path, option, channels):
    config = ImageDataConfig(path=str(write_folder(tmp_path)), mean=(0.5,), std=(0.5,), **option)
    task = ImageClassification(Config("image_classification", ImageClassifierConfig(
        num_classes=3, input=ImageInputConfig((16, 16, channels))), config))
    config.batch_size = 4
    shuffled, val = task.load_data()

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
    """Three classes of constant images, with values 0, 100 and 200. So a mixed pixel shows its parts."""
    for label, name in enumerate("abc"):
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(np.full((20, 20), 100 * label, np.uint8)).save(tmp_path / part / name / "0.png")
    config = ImageDataConfig(path=str(tmp_path), mean=(0.0,), std=(100 / 255,), **config)
    train, val, _ = load_images(config, (20, 20, 1))
    assert val[2]["label"] == 2
    return Shuffled(Mixed(train, config.mixer(3)), batch_size=3, seed=0)


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
            if target.max() < 1:  # the second image fills a box
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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, workers):
    root = write_folder(tmp_path)
    file = root / "val" / CLASSES[0] / "1.JPEG"
    file.write_bytes(file.read_bytes()[:300])
    _, val, _ = load_images(ImageDataConfig(path=str(root), max_unreadable=0), (16, 16, 3))
    text = message(list, eval_loader(val, 6, ONE, workers))
    assert text.startswith(f"cannot read {file}: ") and "Traceback" not in text


def test_mistakes_in_shapes_and_folders_are_explained(tmp_path):
    def load(folder: Path, shape=(28, 28, 1), **config) -> str:
        return message(load_images, ImageDataConfig(path=str(folder), **config), shape)

    root = write_folder(tmp_path / "folder")
    assert "CLASS" in load(tmp_path / "folder" / "val" / CLASSES[0])
    assert load(root, (28, 28, 5)) == "image_shape=[28, 28, 5] has 5 channels; set it to 1 (gray) or 3 (RGB)"
    text = load(root, mean=(0.1, 0.2, 0.3))
    assert "data.mean=[0.1, 0.2, 0.3]" in text and "1 value" in text and "null takes the dataset's" in text
    (root / "val" / CLASSES[2]).rename(root / "val" / "other")
    assert "the same classes" in load(root, (28, 28, 3))


@pytest.mark.parametrize("values, words", [
    ({"dataset": "svhn"}, "dataset='svhn'"), ({"std": [0.0, 1.0, 1.0]}, "std=0.0 must be positive"),
    ({"eval_crop": 2.0}, "eval_crop=2.0"), ({"rand_augment_magnitude": 11}, "rand_augment_magnitude=11"),
    ({"mixup_alpha": -1.0}, "mixup_alpha=-1.0"), ({"val_fraction": 0.0}, "val_fraction=0.0"),
    ({"random_crop": 4, "random_resized_crop": True}, "random_crop=4"),
])
def test_mistakes_in_the_data_config_are_named(values, words):
    assert words in message(build, ImageDataConfig, values)


# ----------------------------------------------------------------------------------------------------------------------
# Classification


def test_summary_compares_with_the_most_frequent_class(tmp_path):
    write_classes(tmp_path / "train", 2)
    write_classes(tmp_path / "val", 2)
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / CLASSES[1] / "more.png")
    task = TASKS["image_classification"](Config("image_classification", ImageClassifierConfig(
        num_classes=3, input=ImageInputConfig((8, 8, 3))), ImageDataConfig(path=str(tmp_path))))
    task.load_data()
    assert task.val_set.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert re.search(r"50\.0%.* 42\.9%", task.summary({"accuracy": 0.5}))
    assert "4 examples" not in task.data_note and "6 examples for training, 7 for validation" in task.data_note


def test_a_folder_of_images_is_classified(tmp_path, predict):
    ckpt, _ = new_checkpoint(tmp_path / "images.pt", "image_classification", ["a", "b"], {
        "num_classes": 2, "input": {"image_shape": [8, 8, 3], "num_frequency_bands": 4}}, {})
    write_classes(tmp_path / "photos", 2)
    lines = predict(ckpt, tmp_path / "photos", "--attention").out.splitlines()
    assert lines[::3] == [str(tmp_path / "photos" / name / file) for name in CLASSES for file in ("0.png", "1.JPEG")]
    assert len(list((tmp_path / "predictions").glob("*-attention.png"))) == 6


def test_folders_of_images_are_inputs(tmp_path):
    """The images of a folder are sorted by the numbers in their names. Its other files are left out."""
    for name in ("10.png", "9.png", ".hidden.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    files = image_files([str(tmp_path), "elsewhere.png"])
    assert files == [str(tmp_path / "9.png"), str(tmp_path / "10.png"), "elsewhere.png"]
    assert message(image_files, [str(tmp_path / "empty")]) == f"{tmp_path}/empty holds no images"


# ----------------------------------------------------------------------------------------------------------------------
# Sequences of values

SMALL = ["data.image_shape=[8,8,1]", "model.max_seq_len=64", "model.num_latents=32", "model.num_channels=64",
         "model.num_self_attention_layers=2", "data.num_workers=0"]


class Noise:
    """Images (3, 4, 5) of random values."""

    def __init__(self, number: int = 3):
        self.values = np.random.default_rng(0).integers(0, 256, (number, 4, 5, 3))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.from_numpy(self.values[index]).permute(2, 0, 1) / 255}

    def tokens(self, index: int) -> list[int]:
        """START, then the values: row by row, pixel by pixel, channel by channel."""
        return [START, *(int(value) for row in self.values[index] for pixel in row for value in pixel)]


def test_values_in_raster_order():
    images = Noise()
    for index in range(3):
        tokens = to_tokens(images[index]["image"])
        assert tokens.tolist() == images.tokens(index)
        assert np.array_equal(to_images(torch.from_numpy(tokens[1:]), (4, 5, 3)).movedim(0, -1), images.values[index])
    every = torch.arange(256).view(1, 16, 16) / 255
    assert to_tokens(every)[1:].tolist() == list(range(256))
    assert to_images(torch.tensor([[START, 255]]), (1, 2, 1)).tolist() == [[[[255, 255]]]]


def test_files_become_their_values(tmp_path):
    image = noise(8, 8, 1)
    Image.fromarray(image).save(tmp_path / "gray.png")
    found = PixelDataConfig(dataset="mnist").transform((8, 8, 1))(read_image(tmp_path / "gray.png", 1))
    assert to_tokens(found).tolist() == [START, *image.flatten()]


@pytest.mark.parametrize("max_seq_len, num_latents", [(60, 60), (60, 16), (25, 7)])
def test_validation_predicts_every_value_once(max_seq_len, num_latents):
    images = Noise()
    blocks = PixelBlocks(images, 60, max_seq_len, num_latents)
    found = [blocks[index] for index in range(len(blocks))]
    labels = np.concatenate([example["labels"] for example in found])
    assert labels[labels != IGNORE].tolist() == [token for index in range(3) for token in images.tokens(index)[1:]]
    for example in found:
        check(example, images, max_seq_len, num_latents)


def check(example: dict, images: Noise, max_seq_len: int, num_latents: int) -> int:
    """Checks that the inputs are the tokens before the labels, as many as fit. Returns the place of the last input."""
    assert example["input_ids"].shape == (max_seq_len,) and example["labels"].shape == (num_latents,)
    inputs = example["input_ids"][~example["pad_mask"]].tolist()
    padding = max_seq_len - len(inputs)
    assert example["pad_mask"].tolist() == [True] * padding + [False] * len(inputs)
    whole = inputs + [int(example["labels"][-1])]
    places = [(index, end) for index in range(len(images)) for end in range(len(whole), 62)
              if images.tokens(index)[end - len(whole) : end] == whole]
    assert len(places) == 1 and (padding == 0 or whole[0] == START)
    assert all(label in (token, IGNORE) for label, token in zip(example["labels"][::-1], whole[::-1]))
    return places[0][1] - 1


def test_training_crops_are_starts_of_random_length():
    images = Noise()
    crops = Shuffled(PixelCrops(images, 60, 16), batch_size=4, seed=0)
    ends = [check(crops[step, index], images, 60, 16) for step in range(60) for index in range(4)]
    assert min(ends) >= 16 and max(ends) <= 60 and len(set(ends)) > 40
    example, again = crops[7, 2], crops[7, 2]
    assert all(np.array_equal(example[name], again[name]) for name in example)
    assert (example["labels"] != IGNORE).all()
    whole = PixelCrops(images, 60, 60)[1]  # with as many latents as values, nothing is random or padded
    assert not whole["pad_mask"].any()
    assert whole["labels"].tolist() == images.tokens(1)[1:]


def sequences(*args: str) -> ImageSequences:
    config = load_config(ROOT / "configs/image_ar.yaml", [*SMALL, *args], TASKS)
    return TASKS["image_ar"](config)


@pytest.mark.parametrize("num_latents, num_kept", [(16, 24), (64, 0)])
def test_training_drops_a_part_of_the_prefix(tmp_path, num_latents, num_kept):
    task = sequences(f"data.path={write_digits(tmp_path)}", f"model.num_latents={num_latents}",
                     "model.cross_attention_dropout=0.5")
    train_set, _ = task.load_data()
    example = train_set[7, 2]
    kept = example["prefix_keep"].tolist()
    assert len(set(kept)) == num_kept and all(place < 64 - num_latents for place in kept)
    assert kept == train_set[7, 2]["prefix_keep"].tolist()
    assert num_kept == 0 or kept != train_set[7, 3]["prefix_keep"].tolist()
    model = task.build_model()
    batch = collate_padded([example, train_set[7, 3]])
    assert task.loss(model.train(), batch)["count"] == 2 * num_latents


def test_the_loss_of_images_does_not_depend_on_the_number_of_latents():
    """Without self-attention layers, a latent sees the same context in every block."""
    task = sequences("data.image_shape=[4,5,3]", "model.num_latents=60", "model.max_seq_len=60",
                     "model.num_channels=32", "model.num_self_attention_layers=0", "model.num_rotary_layers=0",
                     "model.init_scale=0.3")
    model, losses = task.config.model.build().eval(), []
    for num_latents in (60, 13, 1):
        blocks = PixelBlocks(Noise(), 60, 60, num_latents)
        with torch.inference_mode():
            sums = task.loss(model, collate_padded([blocks[index] for index in range(len(blocks))]))
        assert sums["count"] == 180
        losses.append(sums["loss"].item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("image_ar")
    result = run_script("train.py", "configs/image_ar.yaml", *SMALL, f"data.path={write_digits(folder / 'digits')}",
                        f"train.out_dir={folder}/run", "train.max_steps=200", "train.eval_every=200")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_digits_are_learned(run):
    folder, out = run
    found = re.search(r"validation: ([\d.]+) bits per dimension; the unigram baseline has ([\d.]+)", out)
    assert float(found[1]) < float(found[2]) - 0.4, found[0]
    assert read_metrics(folder / "run", "val")[-1]["bits_per_dim"] == pytest.approx(float(found[1]), abs=1e-3)


def test_pictures_of_a_run_are_written_to_files(run):
    folder, _ = run
    result = run_script("docs/show.py", folder / "run", "completions", folder / "shown.png")
    assert result.returncode == 0, result.stderr
    with Image.open(folder / "shown.png") as picture:
        assert picture.size == (16 + 8 * (96 + 4) + 16, 16 + 3 * (30 + 96 + 16))
    result = run_script("docs/show.py", folder / "run", "samples", folder / "shown.png")
    assert result.returncode == 2 and result.stderr.endswith("has no picture samples; choose from completions\n")


def test_completions_keep_the_upper_half(run, monkeypatch, capsys):
    folder, _ = run
    digit = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    Image.fromarray(digit).save(folder / "digit.png")

    def complete(*args) -> np.ndarray:
        monkeypatch.setattr(sys, "argv", ["generate.py", "--ckpt", f"{folder}/run/checkpoints/last.pt", "--prompt",
                                          f"{folder}/digit.png", "--out", f"{folder}/out.png", *args])
        generate.main(generate.parse_args())
        picture = np.array(Image.open(folder / "out.png"))[pictures.MARGIN :, pictures.MARGIN : pictures.MARGIN + 96, 0]
        rows = picture.reshape(-1, pictures.CAPTION + 96 + pictures.MARGIN, 96)
        return rows[:, pictures.CAPTION : pictures.CAPTION + 96 : 12, ::12]  # a pixel is drawn as 12 x 12 pixels

    original, given, *samples = complete("--num-samples", "3")
    assert np.array_equal(original, digit) and np.array_equal(given[:4], digit[:4]) and (given[4:] == 128).all()
    assert len(samples) == 3 and all(np.array_equal(sample[:4], digit[:4]) for sample in samples)
    assert not np.array_equal(samples[0], samples[1])
    capsys.readouterr()
    assert np.array_equal(complete("--num-samples", "1", "--seed", "2", "--json")[2], samples[2])
    assert json.loads(capsys.readouterr().out)["files"] == [f"{folder}/out.png"]
    for args, words in ((("--out", f"{folder}/out.xyz"), "cannot write .*out.xyz: "),
                        (("--out", f"{folder}"), "cannot write"),
                        (("--piano-roll", "a.png"), "--piano-roll"),
                        (("--tokenizer", "a.json"), "--tokenizer")):
        with pytest.raises(UserError, match=words):
            complete(*args)


@pytest.mark.parametrize("args, words", [
    (["model.vocab_size=256"], "model.vocab_size=256"),
    (["model.num_latents=64", "data.image_shape=[4,8,1]"], "model.num_latents=64 must be at most 32"),
    (["data.mean=[0.5]"], "unknown key data.mean"), (["data.mixup_alpha=0.2"], "unknown key data.mixup_alpha"),
    (["data.image_shape=[8,8]"], "image_shape=[8, 8] must have 3"), (["data.image_shape=[8,8,2]"], "2 channels"),
])
def test_mistakes_are_told(args, words, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)):
        sequences(f"data.path={write_digits(tmp_path)}", *args).load_data()


def test_the_vocabulary_comes_from_the_task():
    assert sequences().config.model.vocab_size == 257
