"""Images as sequences: their tokens, what is predicted of them, a model that completes them."""
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from conftest import ROOT, read_metrics, run_script
from digits import write_digits
from perceiver.config import load_config
from perceiver.data import IGNORE, START, PixelBlocks, PixelCrops, Shuffled, collate_padded, to_images, to_tokens
from perceiver.errors import UserError
from perceiver.tasks import TASKS

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
        """Rows, their pixels, the channels of a pixel."""
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
    """Inputs are what is just before the labels, as much as fits; returns the number of the last input."""
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
    crops = Shuffled(PixelCrops(images, 60, 16, num_kept=11), batch_size=4, seed=0)
    ends = [check(crops[step, index], images, 60, 16) for step in range(60) for index in range(4)]
    assert min(ends) >= 16 and max(ends) <= 60 and len(set(ends)) > 40
    example, again = crops[7, 2], crops[7, 2]
    assert all(np.array_equal(example[name], again[name]) for name in example)
    assert (example["labels"] != IGNORE).all()
    kept = example["prefix_keep"].tolist()
    assert len(set(kept)) == 11 and max(kept) < 44 and kept != crops[7, 3]["prefix_keep"].tolist()
    whole = PixelCrops(images, 60, 60, num_kept=0)[1]  # as many latents as values: nothing is random, nothing padded
    assert "prefix_keep" not in whole and not whole["pad_mask"].any()
    assert whole["labels"].tolist() == images.tokens(1)[1:]


def test_the_loss_of_images_does_not_depend_on_the_number_of_latents():
    """Without layers on the latents, each latent sees the same context whatever the block that it is in."""
    config = load_config(ROOT / "configs/image_ar.yaml", [
        "data.image_shape=[4,5,3]", "model.num_latents=60", "model.max_seq_len=60", "model.num_channels=32",
        "model.num_self_attention_layers=0", "model.num_rotary_layers=0", "model.init_scale=0.3"], TASKS)
    task, model, losses = TASKS["image_ar"](config), config.model.build().eval(), []
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
    found = re.search(r"validation: ([\d.]+) bits per dimension; .* it would be ([\d.]+)", out)
    assert float(found[1]) < float(found[2]) - 0.4, found[0]
    assert read_metrics(folder / "run", "val")[-1]["bits_per_dim"] == pytest.approx(float(found[1]), abs=1e-3)


def test_completions_keep_the_upper_half(run, monkeypatch):
    folder, _ = run
    digit = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    Image.fromarray(digit).save(folder / "digit.png")

    def complete(*args) -> np.ndarray:
        monkeypatch.setattr(sys, "argv", ["generate.py", "--ckpt", f"{folder}/run/checkpoints/last.pt", "--prompt",
                                          f"{folder}/digit.png", "--out", f"{folder}/out.png", *args])
        generate.main(generate.parse_args())
        picture = np.array(Image.open(folder / "out.png"))[..., 0]
        return picture[4:, 4:100].reshape(-1, 100, 96)[:, :96:12, ::12]  # tiles: 8x8 pixels of 12, 4 between

    original, given, *samples = complete("--num-samples", "3")
    assert np.array_equal(original, digit) and np.array_equal(given[:4], digit[:4]) and (given[4:] == 128).all()
    assert len(samples) == 3 and all(np.array_equal(sample[:4], digit[:4]) for sample in samples)
    assert not np.array_equal(samples[0], samples[1])
    assert np.array_equal(complete("--num-samples", "1", "--seed", "2")[2], samples[2])
    for args, message in ((("--out", f"{folder}/out.xyz"), "cannot write .*out.xyz: it must be a file, ending in"),
                          (("--out", f"{folder}"), "cannot write"),
                          (("--piano-roll", "a.png"), "--piano-roll a.png is not for task image_ar"),
                          (("--tokenizer", "a.json"), "--tokenizer a.json is not for task image_ar")):
        with pytest.raises(UserError, match=message):
            complete(*args)


@pytest.mark.parametrize("args, message", [
    (["model.vocab_size=256"], "model.vocab_size=256 must be at least 257"),
    (["model.num_latents=64", "data.image_shape=[4,8,1]"], "model.num_latents=64 must be at most 32"),
    (["data.mean=[0.5]"], "mean=(0.5,)"), (["data.mixup_alpha=0.2"], "mixup_alpha=0.2 must be 0"),
    (["data.image_shape=[8,8]"], "image_shape=(8, 8) must be 3"), (["data.image_shape=[8,8,2]"], "2 channels"),
])
def test_mistakes_are_told(args, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        TASKS["image_ar"](load_config(ROOT / "configs/image_ar.yaml", [
            *SMALL, f"data.path={write_digits(tmp_path)}", *args], TASKS)).load_data()
