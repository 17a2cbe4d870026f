"""What the tasks learn, trained from the command line as a user would; and the sizes of the recipes."""
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate

from conftest import ROOT, read_metrics, run_script
from digits import write_digits
from perceiver import checkpoint
from perceiver.config import load_config
from perceiver.distributed import floats
from perceiver.speed import training_flops
from perceiver.tasks import TASKS

SIZES = {
    "autoencode_kinetics": 19_858_855,
    "clm_wikitext103": 30_563_078,
    "clm_c4": 453_950_720,
    "copy_8k": 89_757_955,
    "copy_131k": 89_757_955,
    "flow_chairs": 41_057_134,
    "flow_kitti": 41_057_134,
    "flow_sintel": 41_057_134,
    "imagenet_conv": 48_646_522,
    "imagenet_fourier": 48_440_627,
    "imagenet_learned": 62_255_848,
    "imagenet_perceiver": 44_912_254,
    "mlm_paper": 201_108_230,
    "mnist": 907_212,
    "music_giantmidi": 134_840_832,
    "music_maestro": 28_531_712,
}
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_build_models_of_the_published_sizes(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml", [], TASKS)
    with torch.device("meta"):
        model = TASKS[config.task](config).build_model()
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == SIZES.get(name, size)
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert name not in SIZES or f"{size:,} parameters" in text


def train(name: str, out_dir: Path, *args: str):
    result = run_script("train.py", f"configs/{name}.yaml", f"train.out_dir={out_dir}", *args)
    assert result.returncode == 0, result.stderr
    return result


def accuracy(run: Path) -> float:
    return read_metrics(run, "val")[-1]["accuracy"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def test_digits_are_learned(digits, tmp_path):
    train("digits", tmp_path / "run", f"data.path={digits}", "train.eval_every=1000")
    assert accuracy(tmp_path / "run") > 0.95
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["class_names"] == [str(n) for n in range(10)]


SHORT = ["train.max_steps=10", "train.eval_every=10", "train.log_every=1"]


@pytest.mark.parametrize("processes, accumulate", [(2, 1), (1, 2)])
def test_ranks_and_micro_batches_change_nothing_in_images(digits, tmp_path, processes, accumulate):
    """With mixing and augmentation, whose random numbers belong to the example."""
    common = ["train.py", "configs/digits.yaml", f"data.path={digits}", "data.mixup_alpha=0.2", "data.cutmix_alpha=1",
              "data.batch_size=8", *SHORT]
    runs = [run_script(*common, f"train.out_dir={tmp_path}/one"),
            run_script(*common, f"train.out_dir={tmp_path}/many", f"train.accumulate={accumulate}",
                       processes=processes)]
    assert all(run.returncode == 0 for run in runs), runs[1].stderr
    one, many = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "many")
    assert len(one) == 10 and [line["loss"] for line in one] == pytest.approx([line["loss"] for line in many], abs=1e-5)


def test_masked_words_with_uneven_ranks(tmp_path, corpus):
    """Ranks have different numbers of masked bytes: the mean is over all of them, not of the ranks' means."""
    small = ["model.input.max_seq_len=64", "model.num_latents=8", "data.batch_size=4", "data.max_val_tokens=500",
             f"data.path={corpus}", *SHORT]
    for name, processes in (("one", 1), ("many", 2)):
        result = run_script("train.py", "configs/mlm.yaml", *small, f"train.out_dir={tmp_path}/{name}",
                            processes=processes)
        assert result.returncode == 0, result.stderr
    for split in ("train", "val"):
        one, many = ([line["loss"] for line in read_metrics(tmp_path / name, split)] for name in ("one", "many"))
        assert one == pytest.approx(many, abs=1e-5)


@pytest.fixture(scope="module")
def mlm(tmp_path_factory) -> tuple[Path, str]:
    """A masked language model of the standard library, trained for a fraction of its recipe."""
    run = tmp_path_factory.mktemp("mlm") / "run"
    return run, train("mlm", run, "train.max_steps=1000", "train.eval_every=1000", "data.max_val_tokens=65536").stdout


def test_masked_words_are_learned(mlm):
    """After a third of the recipe's steps. The best without looking around a byte, what bytes of words are, is half a
    bit better than the frequencies of bytes."""
    found = re.search(r"validation: ([\d.]+) bits per masked byte, .* it would be ([\d.]+) bits", mlm[1])
    assert float(found[1]) < float(found[2]) - 0.8, found[0]
    assert "----- filled" in mlm[1]


def test_a_frozen_pretrained_encoder_beats_a_random_one(mlm, tmp_path):
    init, steps = f"model.init_from={mlm[0]}/checkpoints/best.pt", ["train.max_steps=200", "train.eval_every=200"]
    train("txt_clf", tmp_path / "transfer", init, *steps)
    train("txt_clf", tmp_path / "random", "model.init_from=null", *steps)
    loss = {name: read_metrics(tmp_path / name, "val")[-1]["loss"] for name in ("transfer", "random")}
    assert loss["transfer"] < loss["random"] - 0.03
    before, after = (checkpoint.load(run / "checkpoints/last.pt")["model"] for run in (mlm[0], tmp_path / "transfer"))
    frozen = [name for name in after if name.startswith(("encoder.", "input_adapter."))]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    # then everything is trained on from there, the decoder included
    train("txt_clf", tmp_path / "all", f"model.init_from={tmp_path}/transfer/checkpoints/last.pt", "optim.lr=1e-4",
          "model.freeze_encoder=false", "train.max_steps=1", "optim.warmup_steps=0")
    tuned = checkpoint.load(tmp_path / "all/checkpoints/last.pt")["model"]
    assert all((tuned[name] - after[name]).abs().max() < 0.001 for name in tuned)
    assert any(not torch.equal(tuned[name], after[name]) for name in frozen)


@pytest.mark.parametrize("config, args, message", [
    ("digits", ["model.num_classes=9"], "model.num_classes=9, but the data has 10 classes"),
    ("digits", ["model.input.image_shape=[8,8,2]"], "2 channels"),
    ("digits", ["data.path=/nowhere"], "/nowhere"),
    ("txt_clf", ["model.init_from=/nowhere.pt"], "/nowhere.pt does not exist"),
    ("txt_clf", ["model.init_from={mlm}", "model.encoder.num_self_attention_heads=8"], "num_self_attention_heads=4"),
    ("txt_clf", ["model.init_from={mlm}", "model.num_latents=32"], "encoder"),
])
def test_mistakes_are_one_line_and_exit_code_2(digits, mlm, tmp_path, config, args, message):
    args = [arg.format(mlm=mlm[0] / "checkpoints/last.pt") for arg in args]
    data = [] if config == "txt_clf" or "data.path=/nowhere" in args else [f"data.path={digits}"]
    result = run_script("train.py", f"configs/{config}.yaml", f"train.out_dir={tmp_path}/run", *data, *args)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Videos

SMALL_CLIPS = ["model.input.image_shape=[4,16,16,3]", "model.input.max_resolution=[4,4,4]", "data.num_val_clips=8",
               "model.input.num_audio_samples=256", "data.sample_rate=512", "data.num_chunks=3", "model.num_latents=32",
               "data.num_audio_queries=8"]


def test_videos_are_learned(tmp_path):
    """Better than the mean frame by far: more than the colours of shape and ground is known after a few steps."""
    result = train("autoencode", tmp_path / "run", *SMALL_CLIPS, "data.audio_weight=0.1", "train.max_steps=350",
                   "train.eval_every=350", "optim.schedule=constant")
    found = re.search(r"PSNR ([\d.]+) dB; .* it would be ([\d.]+) dB, .* own frames ([\d.]+) dB", result.stdout)
    assert float(found[1]) > float(found[2]) + 3, found[0]
    assert float(found[1]) == pytest.approx(read_metrics(tmp_path / "run", "val")[-1]["psnr"], abs=0.01)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert events.Images("frames")[0].width == 4 + 4 * (96 + 4)
    assert events.Audio("sound")[0].sample_rate == events.Audio("sound_again")[0].sample_rate == 512


def test_ranks_change_nothing_in_videos(tmp_path):
    """What is asked for and which classes are shown belong to the example."""
    common = ["train.py", "configs/autoencode.yaml", *SMALL_CLIPS, "data.batch_size=4", *SHORT]
    runs = [run_script(*common, f"train.out_dir={tmp_path}/{processes}", processes=processes) for processes in (1, 2)]
    assert all(run.returncode == 0 for run in runs), runs[1].stderr
    for split, length in (("train", 10), ("val", 1)):
        one, two = (read_metrics(tmp_path / str(processes), split) for processes in (1, 2))
        assert len(one) == length
        for name in ("loss", "psnr", "audio_snr", "accuracy"):
            assert [line.get(name) for line in one] == pytest.approx([line.get(name) for line in two], abs=1e-3)


def test_yardsticks_of_videos_by_hand():
    config = load_config(ROOT / "configs/autoencode.yaml", [*SMALL_CLIPS, "data.num_val_clips=3"], TASKS)
    task = TASKS[config.task](config)
    task.load_data()
    train, val = (torch.stack([clips[index]["image"] for index in range(number)])  # (n, T, 3, H, W)
                  for clips, number in ((task.train_clips, 256), (task.val_clips, 3)))
    psnr, own = (-10 * (val - mean).square().mean().log10() for mean in (train.mean((0, 1)), val.mean(1, keepdim=True)))
    line = f"clips it would be {psnr:.2f} dB, the mean of the clip's own frames {own:.2f} dB"
    assert line in task.summary({"psnr": 0})


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_losses_of_videos_by_hand(distance):
    """All outputs at once in evaluation; in training those that are asked for."""
    config = load_config(ROOT / "configs/autoencode.yaml", [*SMALL_CLIPS, f"data.distance={distance}"], TASKS)
    torch.manual_seed(0)
    task = TASKS[config.task](config)
    model, (train_set, val_set) = task.build_model(), task.load_data()
    batch = default_collate([train_set[0, index] for index in range(3)])
    data, positions = config.data, batch["image_positions"]
    assert training_flops(task, batch) > 1e6  # on tensors without data
    for training in (True, False):
        sums = floats(task.loss(model.train(training), batch))
        mask = batch["label_mask"] if training else torch.ones(3, 1, dtype=torch.bool)
        out = model({"image": batch["image"], "audio": batch["audio"], "label_mask": mask,
                     "label": torch.nn.functional.one_hot(batch["label"], 9).float()})
        difference = {name: out[name] - batch[name] for name in ("image", "audio")}
        if training:
            pixels = difference["image"].permute(0, 1, 3, 4, 2).reshape(3, -1, 3)
            difference["image"] = torch.stack([pixels[b, positions[b]] for b in range(3)])
            patches = difference["audio"].reshape(3, -1, 16)
            difference["audio"] = torch.stack([patches[b, batch["audio_positions"][b]] for b in range(3)])
        means = {name: values.abs().pow(1 if distance == "l1" else 2).mean() for name, values in difference.items()}
        expected = (data.image_weight * means["image"] + data.audio_weight * means["audio"]
                    + data.label_weight * torch.nn.functional.cross_entropy(out["label"], batch["label"]))
        metrics = task.metrics(sums)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert metrics["psnr"] == pytest.approx(-10 * difference["image"].square().mean().log10().item(), abs=1e-3)
        assert sums["masked"] == mask.sum()
