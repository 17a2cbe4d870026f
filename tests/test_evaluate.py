"""python -m perceiver.evaluate, and the confusion matrix."""
import json

import pytest
import torch
from PIL import Image

from conftest import TEXT_INPUT, new_checkpoint, read_metrics, run_script, run_train
from perceiver import evaluate
from perceiver.data import ByteTokenizer
from perceiver.errors import UserError
from perceiver.pictures import RED, confusion_matrix


def run(capsys, *args):
    """What the command writes to stdout."""
    capsys.readouterr()
    evaluate.main(evaluate.parse_args(["--device", "cpu", *map(str, args)]))
    return capsys.readouterr().out


def test_it_repeats_the_validation_of_a_run_and_evaluates_other_data(tmp_path, corpus, capsys):
    folder = tmp_path / "run"
    result = run_train(f"data.path={corpus}", f"train.out_dir={folder}", "train.max_steps=3")
    assert result.returncode == 0, result.stderr
    (val,) = read_metrics(folder, "val")
    found = json.loads(run(capsys, "--ckpt", folder, "--json"))
    assert found["loss"] == pytest.approx(val["loss"], rel=1e-6) and found["bits_per_byte"] > 0
    assert result.stdout.splitlines()[-3] in run(capsys, "--ckpt", folder)  # the summary

    parts = tmp_path / "parts"
    parts.mkdir()
    for name, text in (("train", "abc" * 500), ("val", "zyx" * 100), ("test", "the green bottles " * 50)):
        (parts / f"{name}.txt").write_text(text)
    losses = [json.loads(run(capsys, "--ckpt", folder, "--json", f"data.path={parts}", *more))["loss"]
              for more in ([], ["data.eval_split=test"])]
    assert losses[0] > losses[1]  # the model knows English letters


@pytest.fixture
def classifier(tmp_path):
    return new_checkpoint(tmp_path / "texts.pt", "text_classification", ["a", "b", "c"],
                          {"num_classes": 3, "input": TEXT_INPUT})


def test_a_classifier_gets_its_confusion_matrix(classifier, tmp_path, capsys):
    ckpt, model = classifier
    texts = {f"{part}/{name}/{number}.txt": f"{name} {number}" * (number + 1) for part in ("train", "val")
             for name in "abc" for number in range(5)}
    for file, text in texts.items():
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).write_text(text)
    result = json.loads(run(capsys, "--ckpt", ckpt, f"data.path={tmp_path}/data", "--json", "--out", tmp_path))
    expected = torch.zeros(3, 3, dtype=torch.long)
    for file, text in texts.items():
        if file.startswith("val"):
            ids = torch.tensor(ByteTokenizer().encode(text)[:48])
            expected["abc".index(file[4]), model(ids[None])[0].argmax()] += 1
    assert result["confusion"] == expected.tolist() and result["classes"] == ["a", "b", "c"]
    assert result["examples"] == 15 and result["accuracy"] == pytest.approx(expected.trace().item() / 15)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.mode == "RGB"
    limited = json.loads(run(capsys, "--ckpt", ckpt, f"data.path={tmp_path}/data", "--json", "--limit", 3, "--out",
                             tmp_path))
    assert limited["examples"] == 3 and torch.tensor(limited["confusion"]).sum(1).tolist() == [1, 1, 1]


def test_other_names_of_classes_are_told(classifier, tmp_path, capsys):
    for name in ("a", "x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "data" / name / f"{number}.txt").write_text(name)
    evaluate.main(evaluate.parse_args(["--ckpt", str(classifier[0]), f"data.path={tmp_path}/data", "--device", "cpu",
                                       "--out", str(tmp_path)]))
    assert "the model knows the classes as a, b, c; they are matched by their order" in capsys.readouterr().err


@pytest.mark.parametrize("override, message", [
    ("model.num_latents=3", "evaluation can change only data.KEY=VALUE"),
    ("data.pth=x", "did you mean path"),
    ("data.path=/nowhere", "data.path=/nowhere does not exist"),
])
def test_mistakes_are_one_line(classifier, override, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(evaluate.parse_args(["--ckpt", str(classifier[0]), override, "--device", "cpu"]))
    assert "\n" not in str(error.value)


def test_the_command_says_its_name():
    assert "python -m perceiver.evaluate" in run_script("-m", "perceiver.evaluate", "--help").stdout


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_the_picture_of_a_confusion_matrix(num_classes):
    """A class that is always right is red on the diagonal, one that is never seen is white."""
    counts = 7 * torch.eye(num_classes, dtype=torch.long)
    counts[1, 1] = 0
    picture = confusion_matrix(counts, [f"{number}" for number in range(num_classes)])
    red = (picture == RED.byte()[:, None, None]).all(0)
    cell = 40 if num_classes == 3 else 1
    assert cell**2 * (num_classes - 1) * 0.8 < red.sum() <= cell**2 * (num_classes - 1)
