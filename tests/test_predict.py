"""predict.py, called as from the command line."""
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import GOLDEN, MODEL, TEXT_INPUT, fails, new_checkpoint, ranking, run_script, run_train
import perceiver.io
from perceiver.config import from_dict
from perceiver.data import ByteTokenizer
from perceiver.errors import printable
from perceiver.pretrained import from_pretrained
from perceiver.tasks import TASKS

TERMINAL = SimpleNamespace(isatty=lambda: True)
OFFICIAL = [GOLDEN / f"image-{kind}" for kind in ("fourier", "learned", "conv")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with input files."""
    folder = tmp_path_factory.mktemp("predict")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8)).resize((450, 300)).save(folder / "photo.png")
    Image.fromarray(rng.integers(0, 255, (28, 28), np.uint8)).save(folder / "gray.png")
    (folder / "a.txt").write_text("a short text")
    (folder / "long.txt").write_text("a text that is longer than what the model takes of it, 48 bytes")
    return folder


@pytest.fixture(scope="module")
def mlm(tmp_path_factory):
    """The run folder of a masked language model that knows one sentence."""
    folder = tmp_path_factory.mktemp("mlm")
    (folder / "text.txt").write_text("the quick brown fox. " * 500)
    (folder / "mlm.yaml").write_text("task: masked_lm")
    result = run_script(
        "train.py", folder / "mlm.yaml", f"data.path={folder}/text.txt", f"train.out_dir={folder}/run",
        "data.mask_prob=0.3", "train.max_steps=800",
        "train.eval_every=800", "data.val_size=200", "optim.lr=0.01", "optim.warmup_steps=50",
        "model.num_latents=8", "model.num_latent_channels=32", "model.input.max_seq_len=42", "train.device=cpu",
        "model.input.num_input_channels=32", "model.encoder.num_self_attention_layers_per_block=1",
        *(f"model.encoder.num_{kind}_attention_heads=2" for kind in ("cross", "self")),
        "model.decoder.num_cross_attention_heads=2", "model.encoder.init_scale=0.1", "model.decoder.init_scale=0.1")
    assert result.returncode == 0, result.stderr
    return folder / "run"


# ----------------------------------------------------------------------------------------------------------------------
# Masked language models


def test_masks_are_filled_with_what_was_learned(mlm, predict, tmp_path):
    ckpt = mlm / "checkpoints" / "last.pt"
    result = predict(ckpt, "the quick [MASK] fox. the [MASK] brown fox", "--mask-bytes", "5")
    assert result.code == 0 and result.err == ""
    filled, *spans = result.out.splitlines()
    assert filled == "the quick brown fox. the quick brown fox"
    for line, word in zip(spans, ("brown", "quick"), strict=True):
        assert 0 < float(re.fullmatch(f"  '{word}', probability (.+)", line)[1]) <= 1

    text = "the [MASK][MASK][MASK][MASK][MASK] brown fox. é\n"
    (tmp_path / "text.txt").write_text(text)
    expected = predict(ckpt, text, "--mask-bytes", "1").out
    assert expected.startswith("the quick brown fox. é\n\n  'quick', probability ") and expected.count("\n") == 3
    assert predict(ckpt, tmp_path / "text.txt", "--mask-bytes", "1").out == expected
    assert predict(ckpt, "-", "--mask-bytes", "1", stdin=text.encode()).out == expected


def test_official_weights_fill_masks_greedily_with_bytes_alone(predict):
    text = "An [MASK] sentence where \xff some [MASK]."
    result = predict(GOLDEN / "masked-lm", text, "--mask-bytes", "4")
    tokenizer, ids = ByteTokenizer(), []
    for piece in text.split("[MASK]"):
        ids += tokenizer.encode(piece) + 4 * [tokenizer.MASK]
    ids = torch.tensor(ids[:-4])
    probs = from_pretrained(GOLDEN / "masked-lm")(ids[None])[0, :, 6:].softmax(-1)
    masked = ids == tokenizer.MASK
    filled = torch.where(masked, probs.argmax(-1) + 6, ids).tolist()
    lines = result.out.splitlines()
    assert lines[0] == tokenizer.decode(filled)
    starts = [3, masked.nonzero()[4].item()]
    for line, start in zip(lines[1:], starts, strict=True):
        text, prob = re.fullmatch("  (.+), probability (.+)", line).groups()
        assert text == repr(tokenizer.decode(filled[start : start + 4]))
        assert float(prob) == pytest.approx(probs[start : start + 4].amax(-1).prod().item(), rel=6e-3)
    assert "\ufffd" in result.out  # this model predicts bytes that are not UTF-8


# ----------------------------------------------------------------------------------------------------------------------
# Classifiers


def test_texts(folder, predict):
    names = ["argparse", "json", "os"]
    ckpt, model = new_checkpoint(folder / "texts.pt", "text_classification", names,
                                 {"num_classes": 3, "input": TEXT_INPUT})
    result = predict(ckpt, folder / "a.txt", folder / "long.txt", "--top-k", "2")
    lines = result.out.splitlines()
    assert result.code == 0 and lines[::3] == [str(folder / "a.txt"), str(folder / "long.txt")] and len(lines) == 6
    assert f"{folder}/long.txt has 63 bytes; the model sees only the first 48" in result.err
    assert "2/2" in result.err  # the progress bar
    for start, file in ((1, "a.txt"), (4, "long.txt")):
        ids = torch.tensor(ByteTokenizer().encode((folder / file).read_bytes()[:48]))
        probs = model(ids[None])[0].softmax(-1)
        found, shown = ranking(lines[start : start + 2])
        assert found == [names[i] for i in probs.argsort(descending=True)[:2]]
        torch.testing.assert_close(torch.tensor(shown), probs.sort(descending=True).values[:2], atol=6e-5, rtol=0)
    everything = predict(ckpt, "-", stdin=b"a short text").out.splitlines()
    found, shown = ranking(everything[1:])
    assert everything[0] == "-" and sorted(found) == names and sum(shown) == pytest.approx(1, abs=2e-4)


def test_texts_and_folders_as_inputs_and_json(folder, predict, tmp_path):
    ckpt, model = new_checkpoint(folder / "texts.pt", "text_classification", ["x", "y", "z"],
                                 {"num_classes": 3, "input": TEXT_INPUT})
    (tmp_path / "texts").mkdir()
    for number in (10, 9, 8):
        (tmp_path / f"texts/{number}.txt").write_text("a short text" if number == 9 else "another")
    result = predict(ckpt, "a short text", tmp_path / "texts", "--json", "--limit", "3")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["input"] for line in lines] == ["a short text", f"{tmp_path}/texts/8.txt", f"{tmp_path}/texts/9.txt"]
    assert lines[0]["classes"] == lines[2]["classes"] != lines[1]["classes"]
    probs = model(torch.tensor(ByteTokenizer().encode("a short text"))[None])[0].softmax(-1)
    found = {item["name"]: item["probability"] for item in lines[0]["classes"]}
    assert found == pytest.approx(dict(zip("xyz", probs.tolist())))
    assert "--limit 3 leaves out 1 of 4 inputs" in result.err
    assert fails(predict(ckpt, "nowhere.txt"), "nowhere.txt") and fails(predict(ckpt, "-", "--limit", "0"), "--limit 0")
    (tmp_path / "empty").mkdir()
    assert fails(predict(ckpt, tmp_path / "empty"), "empty holds no files")


def test_json_of_pictures_and_masks(folder, predict, mlm):
    line = json.loads(predict(GOLDEN / "image-conv", folder / "photo.png", "--json", "--attention", "--top-k", "2").out)
    assert line["input"] == str(folder / "photo.png") and len(line["classes"]) == 2
    assert line["files"] == ["predictions/photo-attention.png"] and os.path.exists(*line["files"])
    line = json.loads(predict(mlm, "the quick [MASK] fox", "--mask-bytes", "5", "--json").out)
    assert line["text"] == "the quick brown fox" and [mask["text"] for mask in line["masks"]] == ["brown"]
    assert 0 < line["masks"][0]["probability"] <= 1


def test_no_control_characters_reach_a_terminal(folder, predict, monkeypatch):
    ckpt, _ = new_checkpoint(folder / "names.pt", "text_classification", ["x\x1b[2J", "y"],
                             {"num_classes": 2, "input": TEXT_INPUT})
    assert "x\x1b[2J" in predict(ckpt, "a text").out
    monkeypatch.setattr(perceiver.io, "printable", lambda text, stream: printable(text, TERMINAL))
    out = predict(ckpt, "a \x9btext\x07\udcff").out
    assert "x\\x1b[2J" in out and "a \\x9btext\\x07\\xff" in out and "\x1b" not in out


def prepared(file, size, channels, crop, mean, std):
    """A landscape image, prepared for evaluation by PIL and NumPy."""
    image = Image.open(file).convert("RGB" if channels == 3 else "L")
    side = int(crop * image.height)
    left, top = (image.width - side + 1) // 2, (image.height - side + 1) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)
    pixels = (np.array(image).reshape(size, size, channels) / 255 - mean) / std
    return torch.tensor(pixels, dtype=torch.float32).movedim(-1, 0)[None]


@pytest.mark.parametrize("variant", ["deepmind", "transformers"])
@pytest.mark.parametrize("official", OFFICIAL, ids=lambda path: path.name)
def test_images_with_official_weights(official, variant, folder, predict):
    result = predict(official, folder / "photo.png", "--variant", variant)
    size = 32 if official.name == "image-learned" else 224
    image = prepared(folder / "photo.png", size, 3, 224 / 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    probs = from_pretrained(official, variant)(image)[0].softmax(-1)
    name, *lines = result.out.splitlines()
    found, shown = ranking(lines)
    assert name == str(folder / "photo.png") and len(lines) == 5
    assert found == [f"class {i}" for i in probs.argsort(descending=True)[:5]]
    torch.testing.assert_close(torch.tensor(shown), probs.sort(descending=True).values[:5], atol=6e-5, rtol=0)


def test_names_of_official_classes(folder, predict, tmp_path):
    """config.json gives the names. Without names in it, 1000 classes get ImageNet's names."""
    weights = load_file(OFFICIAL[1] / "model.safetensors")
    config = (OFFICIAL[1] / "config.json").read_text()
    for names, wide in ((", ".join(f'"{i}": "name {i}"' for i in range(10)), False),
                        (", ".join(f'"{i}": "LABEL_{i}"' for i in range(1000)), True)):
        here = tmp_path / f"{wide}"
        here.mkdir()
        if wide:
            for key in ("weight", "bias"):
                key = f"perceiver.decoder.decoder.final_layer.{key}"
                weights[key] = weights[key].repeat(100, *[1] * (weights[key].ndim - 1)).contiguous()
            weights[key][281] += 50.0
        save_file(weights, here / "model.safetensors")
        (here / "config.json").write_text(
            config.rstrip().rstrip("}") + f', "id2label": {{{names}}}}}' if not wide else
            config.replace('"num_labels": 10', f'"id2label": {{{names}}}'))
        found, shown = ranking(predict(here, folder / "photo.png").out.splitlines()[1:])
        assert len(found) == 5
        assert found[0] == "tabby" and shown[0] == 1 if wide else all(name.startswith("name ") for name in found)


def test_images_with_our_checkpoints(folder, predict):
    """An original Perceiver on gray images, without class names, with the normalization of its config."""
    ckpt, model = new_checkpoint(
        folder / "images.pt", "image_classification", None,
        {"num_classes": 4, "decoder": None, "input": {"image_shape": [28, 28, 1], "num_frequency_bands": 4}},
        {"dataset": "mnist", "mean": [0.3], "std": [0.2], "eval_crop": 0.9})
    lines = predict(ckpt, folder / "photo.png", folder / "gray.png").out.splitlines()
    probs = model(prepared(folder / "photo.png", 28, 1, 0.9, 0.3, 0.2))[0].softmax(-1)
    found, shown = ranking(lines[1:5])
    assert lines[5] == str(folder / "gray.png") and len(lines) == 10
    assert found == [f"class {i}" for i in probs.argsort(descending=True)]
    torch.testing.assert_close(torch.tensor(shown), probs.sort(descending=True).values, atol=6e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_are_written(folder, predict, tmp_path, mlm):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "photo.png", other)
    result = predict(GOLDEN / "image-conv", folder / "photo.png", other / "photo.png", "--attention")
    assert result.code == 0 and "wrote predictions/photo-attention.png" in result.err
    for name in ("photo-attention.png", "photo-2-attention.png"):
        with Image.open(tmp_path / "predictions" / name) as image:
            assert image.mode == "RGB" and image.size == (16 + 5 * (448 + 16), 16 + 448 + 30 + 16)
    predict(GOLDEN / "image-conv", folder / "photo.png", "--attention", "--latents", "7,0", "--out", "here/and/there")
    with Image.open(tmp_path / "here" / "and" / "there" / "photo-attention.png") as image:
        assert image.size == (16 + 3 * (448 + 16), 16 + 448 + 30 + 16)

    predict(mlm / "checkpoints" / "last.pt", "the [MASK]", "a [MASK]", "--attention", "--latents", "0,1,2")
    for name in ("text-attention.png", "text-2-attention.png"):
        with Image.open(tmp_path / "predictions" / name) as image:
            assert image.size == (400, 16 + 3 * (30 + 32 + 16))


def pictures_of(run):
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    return [(image.step, image.width) for image in events.Images("attention")]


def test_training_shows_pictures(mlm, tmp_path, folder):
    assert pictures_of(mlm)[0][0] == 800 and pictures_of(mlm)[0][1] >= 400
    for name in "ab":
        (tmp_path / "texts" / name).mkdir(parents=True)
        for part, size in (("train", (24, 20)), ("val", (30, 30))):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", size).save(tmp_path / "images" / part / name / "1.png")
        for n in range(3):
            (tmp_path / "texts" / name / f"{n}.txt").write_text(f"{name} {n} " * 9)
    texts = {"task": "text_classification", "model": MODEL | {"num_classes": 2, "input": TEXT_INPUT},
             "data": {"path": str(tmp_path / "texts")}}
    images = {"task": "image_classification", "data": {"path": str(tmp_path / "images")},
              "model": MODEL | {"num_classes": 2, "input": {"image_shape": [16, 16, 3], "num_frequency_bands": 4}}}
    for values in (texts, images):
        task = TASKS[values["task"]](from_dict(values, TASKS))
        model = task.build_model().eval()
        task.load_data()
        with torch.inference_mode():
            picture = task.visualize(model)["attention"]
        assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and not model.training
    assert picture.shape == (3, 16 + 320 + 30 + 16, 16 + 5 * (320 + 16))


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_mistakes_are_one_line_and_exit_code_2(folder, predict, mlm, tmp_path):
    mlm = mlm / "checkpoints" / "last.pt"
    images, nowhere = GOLDEN / "image-learned", tmp_path / "nowhere"
    texts, _ = new_checkpoint(tmp_path / "texts.pt", "text_classification", ["a", "b"],
                              {"num_classes": 2, "input": TEXT_INPUT})
    (tmp_path / "empty").write_text("")
    (tmp_path / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:5000])
    Image.fromarray(np.zeros((40, 40), np.int32)).save(tmp_path / "deep.tiff")

    assert fails(predict(mlm, "nothing to fill"), "nothing to fill", "[MASK]")
    assert fails(predict(mlm, folder / "a.txt"), "a.txt", "[MASK]")
    assert fails(predict(mlm, tmp_path), tmp_path, "directory")
    assert fails(predict(mlm, "the [MASK]" + "." * 100), "the [MASK]....", "111 bytes", "takes 42")
    assert fails(predict(mlm, "[MASK]", "--mask-bytes", "0"), "--mask-bytes 0")
    assert fails(predict(texts, nowhere), "cannot read", nowhere, "No such file")
    assert fails(predict(texts, tmp_path / "empty"), "empty is empty")
    assert fails(predict(texts, folder / "a.txt", "--top-k", "0"), "--top-k 0")
    assert fails(predict(images, nowhere), "cannot read", nowhere, "No such file")
    assert fails(predict(images, tmp_path / "cut.png"), "cannot read", "cut.png")
    assert fails(predict(images, folder / "a.txt"), "cannot read", "a.txt")
    assert fails(predict(images, tmp_path / "deep.tiff"), "deep.tiff", "8 bits")
    assert fails(predict(images, folder / "photo.png", "--latents", "1"), "--latents 1", "--attention")
    for latents in ("8", "-1", "", "1,", "a"):
        assert fails(predict(images, folder / "photo.png", "--attention", f"--latents={latents}"), "0 to 7")
    assert predict(images, folder / "photo.png", "--attention", "--out", folder / "a.txt").code == 2
    assert fails(predict(nowhere, "a"), nowhere)
    assert fails(predict(tmp_path / "nowhere.pt", "a"), "nowhere.pt does not exist")


def test_a_bad_file_among_good_ones_is_named_after_their_results(folder, predict, tmp_path):
    result = predict(GOLDEN / "image-learned", folder / "photo.png", tmp_path / "nowhere.png")
    assert result.code == 2 and result.out.startswith(f"{folder}/photo.png\n")
    assert re.search(r"^error: cannot read .*nowhere.png: No such file", result.err.replace("\r", "\n"), re.MULTILINE)


def test_a_wrong_channel_count_is_named(folder, predict, tmp_path):
    ckpt, _ = new_checkpoint(tmp_path / "images.pt", "image_classification", None,
                             {"input": {"image_shape": [28, 28, 4], "num_frequency_bands": 4}}, {"dataset": "mnist"})
    assert fails(predict(ckpt, folder / "photo.png"), "4 channels")


def test_each_script_names_the_other_for_the_wrong_kind_of_checkpoint(predict, tmp_path, corpus, mlm):
    assert run_train(f"data.path={corpus}", f"train.out_dir={tmp_path}/run", "train.max_steps=1").returncode == 0
    assert fails(predict(tmp_path / "run" / "checkpoints" / "last.pt", "[MASK]"), "causal_lm", "generate.py")
    result = run_script("generate.py", "--ckpt", mlm / "checkpoints" / "last.pt", "--prompt", "a")
    assert result.returncode == 2 and "masked_lm" in result.stderr and "predict.py" in result.stderr
    assert result.stderr.count("\n") == 1


def test_in_a_process_of_its_own(mlm):
    ckpt = mlm / "checkpoints" / "last.pt"
    result = run_script("predict.py", "--ckpt", ckpt, "-", "--mask-bytes", "5", input="the [MASK] brown é")
    assert result.returncode == 0 and result.stdout.startswith("the quick brown é\n"), result.stderr
    result = run_script("predict.py", "--ckpt", ckpt, "a")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.startswith("error: a holds no [MASK]")
