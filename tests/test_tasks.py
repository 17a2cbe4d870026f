"""Tasks that are trained from the command line learn, and recipes have the published sizes."""
import re
from pathlib import Path

import pytest
import torch

from conftest import ROOT, read_metrics, run_script
from digits import write_digits
from perceiver import checkpoint
from perceiver.config import load_config
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
    result = train("digits", tmp_path / "run", f"data.path={digits}", "train.eval_every=1000")
    assert accuracy(tmp_path / "run") > 0.95
    assert re.search(r"validation: 9\d\.\d% right; .* most frequent class would give 1\d\.\d%", result.stdout)
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["task"]["class_names"] == [str(n) for n in range(10)]


SHORT = ["train.max_steps=10", "train.eval_every=10", "train.log_every=1"]


@pytest.mark.parametrize("processes, accumulate", [(2, 1), (1, 2)])
def test_ranks_and_micro_batches_change_nothing_in_images(digits, tmp_path, processes, accumulate):
    """The random numbers of mixing and augmentation depend on the example only."""
    common = ["train.py", "configs/digits.yaml", f"data.path={digits}", "data.mixup_alpha=0.2", "data.cutmix_alpha=1",
              "data.batch_size=8", *SHORT]
    runs = [run_script(*common, f"train.out_dir={tmp_path}/one"),
            run_script(*common, f"train.out_dir={tmp_path}/many", f"train.gradient_accumulation_steps={accumulate}",
                       processes=processes)]
    assert all(run.returncode == 0 for run in runs), runs[1].stderr
    one, many = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "many")
    assert len(one) == 10 and [line["loss"] for line in one] == pytest.approx([line["loss"] for line in many], abs=1e-5)


def test_masked_words_with_uneven_ranks(tmp_path, corpus):
    """Ranks have different numbers of masked bytes. The loss is the mean over all bytes, not over the ranks' means."""
    small = ["model.input.max_seq_len=64", "model.num_latents=8", "data.batch_size=4", "data.val_size=500",
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
    return run, train("mlm", run, "train.max_steps=1000", "train.eval_every=1000", "data.val_size=65536").stdout


def test_masked_words_are_learned(mlm):
    """A third of the recipe's steps beats the unigram baseline by 0.8 bits. The frequencies of bytes in words, without
    the text around a byte, would beat it by only half a bit."""
    found = re.search(r"validation: ([\d.]+) bits per masked byte, .* the unigram baseline has ([\d.]+) bits", mlm[1])
    assert float(found[1]) < float(found[2]) - 0.8, found[0]
    assert "----- filled" in mlm[1]


def test_a_frozen_pretrained_encoder_beats_a_random_one(mlm, tmp_path):
    init, steps = f"model.init_from={mlm[0]}/checkpoints/best.pt", ["train.max_steps=200", "train.eval_every=200"]
    train("txt_clf", tmp_path / "transfer", init, *steps)
    random = train("txt_clf", tmp_path / "random", "model.init_from=null", *steps)
    assert "the encoder is frozen at random weights" in random.stdout
    loss = {name: read_metrics(tmp_path / name, "val")[-1]["loss"] for name in ("transfer", "random")}
    assert loss["transfer"] < loss["random"] - 0.03
    before, after = (checkpoint.load(run / "checkpoints/last.pt")["model"] for run in (mlm[0], tmp_path / "transfer"))
    frozen = [name for name in after if name.startswith(("encoder.", "input_adapter."))]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    # another run starts from this checkpoint and trains all parts
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
    ("txt_clf", ["model.init_from={mlm}", "model.encoder.num_self_attention_heads=8"],
     "model.encoder.num_self_attention_heads was 4, is 8"),
    ("txt_clf", ["model.init_from={mlm}", "model.num_latents=32"], "encoder"),
])
def test_mistakes_are_one_line_and_exit_code_2(digits, mlm, tmp_path, config, args, message):
    args = [arg.format(mlm=mlm[0] / "checkpoints/last.pt") for arg in args]
    data = [] if config == "txt_clf" or "data.path=/nowhere" in args else [f"data.path={digits}"]
    result = run_script("train.py", f"configs/{config}.yaml", f"train.out_dir={tmp_path}/run", *data, *args)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
