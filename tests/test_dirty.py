"""Unreadable examples: training replaces them, evaluation leaves them out, and both count them."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from conftest import read_metrics, run_script
from perceiver.data import Readable, Shuffled, TrainKeys, eval_loader, train_loader
from perceiver.distributed import Ranks
from perceiver.errors import UserError

ONE = Ranks(0, 1, torch.device("cpu"))


class Numbers(Dataset):
    """Numbers 0, 1, ..., with noise from PyTorch's generator. Some cannot be read."""

    def __init__(self, size: int, unreadable: set[int]):
        self.size, self.unreadable, self.reads = size, unreadable, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict:
        self.reads.append(number)
        noise = torch.rand(())
        if number in self.unreadable:
            raise UserError(f"cannot read {number}.png: it ends too early")
        return {"number": number, "noise": noise}


def test_the_next_readable_example_takes_the_place(capsys):
    numbers = Numbers(10, {3, 4, 9})
    data = Readable(numbers, 0.3)
    assert [data[index]["number"] for index in range(10)] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    lines = capsys.readouterr().err.splitlines()
    assert [line[:17] for line in lines] == [f"cannot read {number}.png" for number in (3, 4, 9)]
    numbers.reads.clear()
    assert data[3]["number"] == 5 and numbers.reads == [5]  # unreadable examples are not tried again
    assert not capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_and_counts_and_a_later_start_sees_the_same(workers):
    def batches(first, last):
        data = Shuffled(Readable(Numbers(20, {3, 4}), 0.1), batch_size=4, seed=0)
        return list(train_loader(data, TrainKeys(4, 1, ONE, first, last), workers))

    epoch = batches(0, 5)
    assert sum(batch["unreadable"].item() for batch in epoch) == 2
    assert sorted(torch.cat([batch["number"] for batch in epoch]).tolist()) == [0, 1, 2, 5, 5, *range(5, 20)]
    for batch, again in zip(epoch[3:], batches(3, 5), strict=True):  # the second epoch has not seen them before
        assert torch.equal(batch["number"], again["number"]) and torch.equal(batch["noise"], again["noise"])
    for batch, again in zip(batches(5, 10), batches(0, 10)[5:], strict=True):  # the second epoch, known or not
        assert torch.equal(batch["number"], again["number"]) and torch.equal(batch["noise"], again["noise"])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_and_counts(workers):
    data = Readable(Numbers(10, {3, 6, 7}), 0.3)
    for _ in range(2):
        batches = list(eval_loader(data, 2, ONE, workers))
        assert [batch["unreadable"].item() for batch in batches] == [0, 1, 0, 2, 0]
        assert [batch["num_readable"].item() for batch in batches] == [2, 1, 2, 0, 2]
        counted = [batch["number"].tolist() for batch in batches if batch["num_readable"]]
        assert counted == [[0, 1], [2], [4, 5], [8, 9]]


def test_too_many_unreadable_examples_are_an_error():
    data = Readable(Numbers(200, {5, 50, 100}), 0.01)
    assert data[5]["number"] == 6 and data[50]["number"] == 51
    with pytest.raises(UserError, match=r"cannot read 100.png.*3 of 200 .* data.max_unreadable=0.01"):
        data[100]
    with pytest.raises(UserError, match="1 of 10 "):
        Readable(Numbers(10, {5}), 0.0)[5]
    with pytest.raises(UserError, match="1.png.* no example is readable"):
        Readable(Numbers(2, {0, 1}), 1.0)[0]


def test_a_broken_image_ends_no_run(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in ("train", 12), ("val", 4):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
                image.save(tmp_path / part / label / f"{number}.png")
    (tmp_path / "train/a/3.png").write_bytes(b"broken")
    (tmp_path / "val/b/1.png").unlink()
    (tmp_path / "val/b/1.png").write_bytes((tmp_path / "val/b/2.png").read_bytes()[:100])

    result = run_script(
        "train.py", "configs/photos.yaml", f"data.path={tmp_path}", "model.num_classes=2", "data.batch_size=8",
        "model.num_latents=4", "model.input.image_shape=[16,16,3]", "train.log_every=1", "train.eval_every=3",
        f"train.out_dir={tmp_path}/run", "train.max_steps=6", "data.num_workers=1")
    assert result.returncode == 0, result.stderr
    for file in "train/a/3.png", "val/b/1.png":
        assert result.stderr.count(f"cannot read {tmp_path / file}: ") == 1
    assert sum(line.get("unreadable", 0) for line in read_metrics(tmp_path / "run")) == 2  # one an epoch of 3 steps
    assert [line["unreadable"] for line in read_metrics(tmp_path / "run", "val")] == [1, 1]
