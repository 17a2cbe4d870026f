"""The copy task: data, metrics, training, and contexts as long as the paper's."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, read_metrics, run_script
from perceiver.config import load_config
from perceiver.data import IGNORE, collate_padded
from perceiver.errors import UserError
from perceiver.speed import training_flops
from perceiver.tasks import TASKS
from perceiver.tasks.copy import CopyBlocks, CopyWindows

SMALL = ["model.num_channels=16", "model.num_heads=2", "data.batch_size=4"]


def copy_task(*overrides: str, name: str = "copy"):
    config = load_config(ROOT / "configs" / f"{name}.yaml", [*SMALL, *overrides], TASKS)
    return TASKS[config.task](config)


def is_mirrored(sequence: np.ndarray) -> bool:
    """Whether `sequence` is 2, values from 3 to 258, the same values backwards, and 1."""
    inside = sequence[1:-1]
    return (sequence[0] == 2 and sequence[-1] == 1 and inside.min() >= 3 and inside.max() <= 258
            and (inside == inside[::-1]).all())


def test_windows_are_starts_of_mirrored_sequences():
    windows = CopyWindows(length=32, num_latents=16, min_seq_len=20, seed=5)
    sizes, values = [], []
    for step in range(400):
        example = windows[step, 3]
        ids, labels = example["input_ids"], example["labels"]
        sizes.append(len(ids))
        values.extend(ids[1:16])
        assert (labels[:-1] == ids[-15:]).all()
        assert (example["mirrored"] == (np.arange(len(ids) - 15, len(ids) + 1) >= 16)).all()
        if len(ids) == 31:
            assert is_mirrored(np.append(ids, labels[-1]))
    counts = np.bincount(sizes, minlength=32)[20:]
    assert len(sizes) == counts.sum() and counts.min() > 10  # windows of each length from 20 to 31; 33 on average
    assert set(values) == set(range(3, 259))
    assert all((windows[7, 1][name] == windows[7, 1][name]).all() for name in windows[7, 1])
    examples = [windows[7, 1], windows[7, 2], windows[8, 1], CopyWindows(32, 16, 20, 6)[7, 1]]
    assert len({tuple(example["input_ids"][:16]) for example in examples}) == 4


def test_floating_point_operations_are_counted_with_z_loss():
    """The counter runs the loss on meta tensors, which hold no data."""
    task = copy_task("model.z_loss=0.1")
    train_set, _ = task.load_data()
    assert training_flops(task, collate_padded([train_set[0, index] for index in range(4)])) > 1e5


@pytest.mark.parametrize("length, num_latents", [(32, 16), (32, 12), (32, 5), (32, 31), (10, 4)])
def test_blocks_predict_every_token_of_the_second_halves_once(length, num_latents):
    blocks = CopyBlocks(length, num_latents, num_sequences=3)
    predicted = []
    for index in range(len(blocks)):
        example, sequence = blocks[index], blocks.sequence(index // (len(blocks) // 3))
        end = len(example["input_ids"])
        assert is_mirrored(sequence) and (example["input_ids"] == sequence[:end]).all()
        assert ((example["labels"] != IGNORE) == example["mirrored"]).all()
        targets = np.arange(end - num_latents, end)[example["mirrored"]] + 1
        assert (example["labels"][example["mirrored"]] == sequence[targets]).all()
        predicted.extend(targets)
    assert predicted == 3 * list(range(length // 2, length))


def test_windows_of_several_lengths_are_padded_on_the_left():
    batch = collate_padded([{"input_ids": np.array(ids)} for ids in ([5, 6, 7], [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["pad_mask"].tolist() == [[False] * 3, [True, True, False]]
    assert "pad_mask" not in collate_padded([{"input_ids": np.array([5, 6])}] * 2)


def test_a_batch_has_the_summed_loss_of_its_windows():
    """Padding changes no sum. Accuracy counts only the second half."""
    task = copy_task()
    model = task.build_model().double().eval()
    torch.nn.init.normal_(model.output_weight)
    windows, _ = task.load_data()
    examples = [windows[0, index] for index in range(8)]
    together = task.loss(model, collate_padded(examples))
    alone = [task.loss(model, collate_padded([example])) for example in examples]
    for name, total in together.items():
        assert total.item() == pytest.approx(sum(sums[name].item() for sums in alone), rel=1e-6)
    assert together["mirrored"] == sum(example["mirrored"].sum() for example in examples) < together["count"] == 8 * 16
    rates = task.metrics({"loss": 8.0, "cross_entropy": 4.0, "count": 8, "correct": 3, "mirrored": 4})
    assert rates == pytest.approx({"loss": 1.0, "bits_per_token": 0.5 / np.log(2), "accuracy": 0.75})


def test_z_loss_changes_only_the_training_loss():
    """Compares with its definition, computed from the softmax denominator Z. Ignored labels have no z-loss."""
    plain, task = copy_task("model.z_loss=0"), copy_task("model.z_loss=0.1")
    model = task.build_model().double()
    torch.nn.init.normal_(model.output_weight)
    windows, _ = task.load_data()
    batch = collate_padded([windows[0, index] for index in range(4)])
    batch["labels"][0, :5] = IGNORE
    with_z, without = task.loss(model, batch), plain.loss(model, batch)
    logits = model(batch["input_ids"], 16, batch["pad_mask"])
    z = logits.exp().sum(-1)
    expected = 0.1 * sum(z[row, i].log() ** 2 for row in range(4) for i in range(16) if (row, i) not in
                         {(0, k) for k in range(5)})
    assert (with_z["loss"] - without["loss"]).item() == pytest.approx(expected.item(), rel=1e-6)
    assert task.metrics(with_z)["bits_per_token"] == plain.metrics(without)["bits_per_token"]
    model.eval()
    assert task.loss(model, batch)["loss"] == plain.loss(model, batch)["loss"]


@pytest.mark.parametrize("override, words", [
    ("model.max_seq_len=33", "model.max_seq_len=33"), ("model.num_latents=32", "model.num_latents=32"),
    ("data.min_seq_len=15", "data.min_seq_len=15"), ("data.min_seq_len=32", "data.min_seq_len=32"),
    ("model.vocab_size=256", "model.vocab_size=256"), ("data.val_size=0", "data.val_size=0"),
])
def test_mistakes_are_named(override, words):
    with pytest.raises(UserError, match=words):
        copy_task(override)


def test_at_the_published_width_the_model_has_the_published_size():
    """The model is that of Google's random_mirrored_32. test_tasks.py checks the longer contexts."""
    with torch.device("meta"):
        model = copy_task("model.num_channels=1024", "model.num_heads=16").build_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 26_776_835


def test_windows_grow_in_the_curriculum():
    """The visible tokens always include the mirror image of each label in the second half."""
    windows = CopyWindows(256, 32, 160, 0, curriculum_steps=60)
    seen = []
    for step in range(60):
        examples = [windows[step, index] for index in range(4)]
        batch = collate_padded(examples)
        reach = (batch["prefix_keep"].shape[1] + batch["labels"].shape[1]) // 2
        assert batch["labels"].shape == batch["mirrored"].shape == (4, min(32, reach))
        for example, ids, kept in zip(examples, batch["input_ids"], batch["prefix_keep"]):
            end, num_latents = len(example["input_ids"]), len(example["labels"])
            assert (ids.numpy()[kept] == example["input_ids"][example["prefix_keep"]]).all()
            visible = {*example["prefix_keep"], *range(end - num_latents, end)}
            targets = np.arange(end - num_latents, end) + 1
            assert all(255 - target in visible for target in targets[example["mirrored"]])
            assert 128 < end < 128 + reach and example["mirrored"].any()
        seen.append(reach)
    assert seen == sorted(seen) and seen[0] == 16 and 100 < seen[-1] <= 128
    assert all(len(CopyWindows(16, 8, 8, 0, 9)[step, 0]["input_ids"]) < 16 for step in range(9))
    assert "prefix_keep" not in windows[60, 0] and windows[60, 0]["labels"].shape == (32,)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A run of copy.yaml with a smaller model, half of the context, and a quarter of the steps."""
    folder = tmp_path_factory.mktemp("copy") / "run"
    result = run_script("train.py", "configs/copy.yaml", f"train.out_dir={folder}", "model.max_seq_len=16",
                        "model.num_latents=8", "model.num_channels=64", "data.min_seq_len=12", "data.batch_size=64",
                        "optim.lr=3e-3", "train.max_steps=500", "train.eval_every=500")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_second_half_is_learned(run):
    folder, output = run
    assert read_metrics(folder, "val")[-1]["accuracy"] > 0.9
    right, copied = re.search("----- expected\n(.*)\n-----\n----- copied\n(.*)\n-----", output).groups()
    assert len(right.split()) == 8 and sum(a == b for a, b in zip(right.split(), copied.split())) >= 7


def test_a_prompt_is_copied(run):
    result = run_script("generate.py", "--ckpt", run[0] / "checkpoints/last.pt", "--prompt", "2 5 77 130 258 30 40 99",
                        "--max-new-tokens", "8", "--temperature", "0")
    copied = result.stdout.split()[8:]
    assert sum(a == b for a, b in zip(copied, "99 40 30 258 130 77 5 1".split())) >= 7


def test_ranks_and_micro_batches_change_nothing(tmp_path):
    """This holds while windows grow, and afterwards, when micro-batches are padded to different lengths."""
    common = ["train.py", "configs/copy.yaml", *SMALL, "data.curriculum_steps=5", "model.max_seq_len=64",
              "train.max_steps=8", "train.log_every=1"]
    runs = [run_script(*common, f"train.out_dir={tmp_path}/one"),
            run_script(*common, f"train.out_dir={tmp_path}/two", "train.gradient_accumulation_steps=2", processes=2)]
    assert all(run.returncode == 0 for run in runs), runs[1].stderr
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 8 and [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=1e-5)


@pytest.mark.slow
def test_memory_is_linear_in_the_context():
    """The models are tiny, and the contexts have up to 131,072 tokens. A quadratic cost would have the exponent 2."""
    result = run_script("benchmarks/long_context.py", "configs/copy_131k.yaml", *SMALL, "model.num_latents=32",
                        "model.num_self_attention_layers=1", "--lengths", "32768", "65536", "131072", "--repeats", "2")
    assert result.returncode == 0, result.stderr
    assert re.search(r"\| 131,072 \| [\d.]+ ", result.stdout)
    exponents = re.findall(r"\| memory of (?:it|both) \| ([\d.]+) \|", result.stdout)
    assert len(exponents) == 2 and max(map(float, exponents)) < 1.1
