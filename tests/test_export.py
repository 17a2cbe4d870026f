"""python -m perceiver.export: programs that run without the package, and published models."""
import json
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves

from conftest import MODEL, ROOT, TEXT_INPUT, new_checkpoint, run_script
from perceiver import checkpoint, decoding
from perceiver.config import from_dict, load_config
from perceiver.data import ByteTokenizer
from perceiver.errors import UserError
from perceiver.export import CachedStep, example_inputs, export, main, parse_args, run_file
from perceiver.pretrained import from_pretrained, load_model
from perceiver.publish import port_config
from perceiver.tasks import TASKS
from test_pretrained import assert_equal, compare_subsets, patches, randomize

AR = dict(max_seq_len=24, num_latents=8, num_channels=16, num_heads=2, num_self_attention_layers=2,
          encoder=None, decoder=None, num_latent_channels=None)
IMAGE = {"image_shape": [12, 12, 3], "num_frequency_bands": 4}
BLOCKS = {"num_cross_attention_layers": 2, "num_self_attention_blocks": 2, "first_self_attention_block_shared": False}
MODELS = {
    "perceiver_ar": ("causal_lm", dict(ngram_sizes=[2, 3], num_ngram_buckets=50)),
    "perceiver_ar_google": ("causal_lm", dict(architecture="google")),
    "masked_lm": ("masked_lm", {"input": TEXT_INPUT}),
    "text_classifier": ("text_classification", {"input": TEXT_INPUT}),
    "image_classifier": ("image_classification", {"input": IMAGE | {"features": "conv"}}),
    "perceiver": ("image_classification", {"input": IMAGE, "decoder": None, "encoder": MODEL["encoder"] | BLOCKS}),
    "optical_flow": ("optical_flow", {"input": {"frame_shape": [12, 16], "num_frequency_bands": 4}}),
    "autoencoder": ("multimodal_autoencoding", {
        "input": {"image_shape": [2, 8, 8, 3], "num_audio_samples": 32, "num_classes": 5, "num_image_bands": 4,
                  "num_audio_bands": 4}, "num_output_channels": 12}),
}
# Runs files in a process that cannot import perceiver. The arguments are a folder and names of models.
OUTSIDE = """
import sys
sys.modules["perceiver"] = None
import torch
folder, *names = sys.argv[1:]
for name in names:
    inputs = torch.load(f"{folder}/{name}.inputs")
    program = torch.export.load(f"{folder}/{name}.pt2").module()
    torch.save(program(**inputs), f"{folder}/{name}.outputs")
try:
    import perceiver
except ImportError:
    print("without perceiver")
"""


def build(name):
    """The task and the model `name` of MODELS, with random weights."""
    task_name, options = MODELS[name]
    model = {key: value for key, value in AR.items() if value} if task_name == "causal_lm" else MODEL
    task = TASKS[task_name](from_dict({"task": task_name, "model": model | options}, TASKS))
    return task, randomize(task.build_model())


def largest_difference(a, b) -> float:
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    assert all(x.shape == y.shape and x.std() > 0.05 for x, y in pairs)  # not a comparison of zeros
    return max((x - y).abs().max().item() for x, y in pairs)


@torch.no_grad()
def test_programs_of_all_models_run_without_the_package(tmp_path):
    """With another batch size than that of the export, and with padding of other lengths."""
    expected = {}
    for name in MODELS:
        task, model = build(name)
        line = export(model, example_inputs(task), tmp_path / f"{name}.pt2")
        assert line.startswith(f"{tmp_path}/{name}.pt2 (") and " MB): " in line and " -> " in line and "(B, " in line
        inputs = example_inputs(task, batch_size=3)
        if "pad_mask" in inputs:
            inputs["pad_mask"][0] = False
        torch.save(inputs, tmp_path / f"{name}.inputs")
        expected[name] = model(**inputs)
    command = [sys.executable, "-c", OUTSIDE, tmp_path, *MODELS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "without perceiver\n", result.stderr
    for name, outputs in expected.items():
        assert largest_difference(torch.load(tmp_path / f"{name}.outputs"), outputs) < 1e-4, name


@pytest.mark.parametrize("name", ["perceiver_ar", "masked_lm", "image_classifier", "perceiver", "optical_flow",
                                  "autoencoder", "step"])
def test_onnx(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if name == "step":
        model = CachedStep(build("perceiver_ar")[1])
        make_inputs = model.example_inputs
    else:
        task, model = build(name)
        make_inputs = lambda batch_size=2: example_inputs(task, batch_size)  # noqa: E731
    line = export(model, make_inputs(), tmp_path / "model.onnx")
    assert "outputs differ from the model's by at most" in line
    inputs = make_inputs(batch_size=3)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    leaves = {key: tensor for key, tensor in zip(names, tree_leaves(inputs), strict=True)}
    found = session.run(None, {key: tensor.numpy() for key, tensor in leaves.items()})
    with torch.inference_mode():
        expected = model(**inputs)
    assert largest_difference([torch.from_numpy(array) for array in found], expected) < 1e-4


def run_steps(step, inputs, tokens, num_prefix, num_recent):
    """Feeds `tokens` to an exported step, one after the other. Returns the logits after the last."""
    cache = {name: torch.zeros_like(array[:1]) for name, array in inputs.items() if "_" in name}
    for place in range(len(tokens)):
        recent = [0] * num_recent + tokens[: place + 1]
        latent = max(0, place - num_prefix)
        outputs = step(tokens=torch.tensor([recent[-num_recent:]]), position=torch.tensor([place]),
                       latent=torch.tensor([latent]), **cache)
        cache = {name: outputs[f"new_{name}"] for name in cache}
    return outputs["logits"]


@torch.no_grad()
def test_steps_give_the_logits_of_generation(tmp_path):
    """Token by token, with and without a prefix, and after the window has moved."""
    _, model = build("perceiver_ar")
    inputs = CachedStep(model).example_inputs()
    export(CachedStep(model), inputs, tmp_path / "step.pt2")
    step = torch.export.load(tmp_path / "step.pt2").module()
    tokens = torch.randint(262, (30,)).tolist()
    for length in (1, 8, 9, 20, 30):
        first_token, first_latent = decoding.window_bounds(length, 24, 8, stride=4)
        found = run_steps(step, inputs, tokens[first_token:length], first_latent - first_token,
                          model.num_recent_tokens)
        expected = decoding.Decoder(model, [tokens[:length]], stride=4).logits()
        assert largest_difference(found, expected) < 1e-4


def test_the_command(tmp_path, capsys):
    """The script itself, an image model of Perceiver AR, and mistakes."""
    path, _ = new_checkpoint(tmp_path / "clf.pt", "image_classification", model={"input": IMAGE})
    result = run_script("-m", "perceiver.export", "--ckpt", path, "--out", tmp_path / "new" / "clf.pt2")
    assert result.returncode == 0 and "inputs (B, 3, 12, 12) float32 -> output (B, 10) float32" in result.stdout
    assert (tmp_path / "new" / "clf.pt2").exists()
    with pytest.raises(UserError, match="--step needs a Perceiver AR and a file"):
        main(parse_args(["--ckpt", str(path), "--out", str(tmp_path / "step.pt2"), "--step"]))
    with pytest.raises(UserError, match="must end with .pt2, .onnx, or / for a folder"):
        main(parse_args(["--ckpt", str(path), "--out", str(tmp_path / "model.pth")]))


def test_a_file_that_differs_from_the_model_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("perceiver.export.run_file", lambda path, inputs: [inputs["input"] + 1e-2])
    with pytest.raises(UserError, match="outputs differ from the model's by 0.01"):
        export(nn.Identity(), {"input": torch.ones(2, 3)}, tmp_path / "model.pt2")


@pytest.mark.parametrize("change, message", [
    (lambda a, b: [a, b * torch.nan], "differ from the model's by nan"),
    (lambda a, b: [a, b + torch.inf], "differ from the model's by inf"),
    (lambda a, b: [a], r"outputs have shapes \[\(1, 3\)\], the model's \[\(1, 3\), \(1, 3\)\]"),
    (lambda a, b: [a, b[:, :1]], r"outputs have shapes \[\(1, 3\), \(1, 1\)\]")])
def test_each_output_is_checked(tmp_path, monkeypatch, change, message):
    """Also one that is not the first, is not a number, is missing, or has a shape that broadcasts."""

    class Two(nn.Module):
        def forward(self, x):
            return {"a": x, "b": 2 * x}

    read = run_file
    monkeypatch.setattr("perceiver.export.run_file", lambda path, inputs: change(*read(path, inputs)))
    with pytest.raises(UserError, match=message):
        export(Two(), {"x": torch.ones(2, 3)}, tmp_path / "model.pt2")


def test_a_model_with_a_fixed_batch(tmp_path):
    """The line says so. Inputs of unknown tasks are the user's to give."""

    class Fixed(nn.Module):
        def forward(self, x):
            return 2 * x.view(2, -1)

    line = export(Fixed(), {"x": torch.randn(2, 3)}, tmp_path / "model.pt2")
    assert "x (2, 3) float32 -> output (2, 3) float32" in line


# ----------------------------------------------------------------------------------------------------------------------
# Publishing


def publish(path, folder, *options):
    main(parse_args(["--ckpt", str(path), "--out", f"{folder}/", *options]))
    return folder


SMALL = {"num_latents": 6, "num_latent_channels": 32,
         "encoder": {"num_cross_attention_heads": 1, "num_self_attention_heads": 4,
                     "num_self_attention_layers_per_block": 2, "num_self_attention_blocks": 2},
         "decoder": {"num_cross_attention_heads": 1, "cross_attention_residual": False}}
RESIDUAL = {"decoder": {"num_cross_attention_heads": 1}}
OFFICIAL = {  # small models of the six official kinds, as options of our configs
    "masked_lm": ("masked_lm", {
        "input": {"max_seq_len": 40, "num_input_channels": 24},
        "decoder": {"num_cross_attention_heads": 8, "num_cross_attention_qk_channels": 256,
                    "num_cross_attention_v_channels": 24, "cross_attention_residual": False}}),
    "image_fourier": ("image_classification", {"input": {"image_shape": [224, 224, 3]}} | RESIDUAL),
    "image_learned": ("image_classification", {
        "input": {"image_shape": [32, 32, 3], "features": "conv1x1", "num_feature_channels": 256,
                  "positions": "trainable"}} | RESIDUAL),
    "image_conv": ("image_classification", {
        "input": {"image_shape": [224, 224, 3], "features": "conv", "conv_padding": "symmetric",
                  "max_resolution": [56, 56]}} | RESIDUAL),
    "optical_flow": ("optical_flow", {"input": {"frame_shape": [20, 28]}}),
    "multimodal": ("multimodal_autoencoding", {
        "input": {"image_shape": [3, 8, 8, 3], "num_audio_samples": 48, "samples_per_patch": 8, "num_classes": 11},
        "decoder": {"num_cross_attention_heads": 1, "cross_attention_residual": False, "num_query_channels": 40},
        "num_output_channels": 20}),
}


@pytest.mark.parametrize("kind, activation", [("image_learned", "gelu"), *((kind, "gelu_tanh") for kind in OFFICIAL)])
@torch.inference_mode()
def test_transformers_loads_what_we_publish(tmp_path, kind, activation, capsys):
    """All weights, and the same outputs. Our own `from_pretrained` gives the same model again."""
    task_name, options = OFFICIAL[kind]
    options = SMALL | options
    for part in ("encoder", "decoder"):
        options[part] = options[part] | {"activation": activation}
    path, model = new_checkpoint(tmp_path / "model.pt", task_name, model=options)
    saved = checkpoint.load(path)
    checkpoint.save(saved | {"model": randomize(model).state_dict()}, path)
    folder = publish(path, tmp_path / "published")
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    assert f"transformers.{architecture}.from_pretrained loads them, too\n" in capsys.readouterr().out
    port, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    ours = from_pretrained(folder)
    if kind == "masked_lm":
        ids, pad = torch.randint(262, (2, 40)), torch.arange(40) >= torch.tensor([[40], [17]])
        assert_equal(ours(ids, pad), port(ids, attention_mask=~pad).logits)
    elif kind == "optical_flow":
        frames = torch.rand(2, 2, 3, 20, 28) * 2 - 1
        assert_equal(ours(frames), 20 * port(patches(frames)).logits)
    elif kind == "multimodal":
        inputs = {"image": torch.rand(2, 3, 3, 8, 8), "audio": torch.randn(2, 48, 1), "label": torch.randn(2, 11)}
        compare_subsets(port, ours, inputs, {"image": torch.arange(192), "audio": torch.arange(6)})
    else:
        images = torch.randn(1, *reversed(options["input"]["image_shape"]))
        assert_equal(ours(images), port(images).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


def test_published_models_of_ours(tmp_path, capsys):
    """Perceiver AR with a tokenizer, and classes with names. Folders and the data's path stay here."""
    for name, (task_name, options) in {name: MODELS[name] for name in ("perceiver_ar", "perceiver")}.items():
        ar = task_name == "causal_lm"
        task, model = build(name)
        task.class_names = None if ar else list("abcdefghij")
        if ar:
            task.tokenizer = ByteTokenizer()
        task.config.data.path = "/home/me/secret/data"
        config = checkpoint.to_dict(task.config)
        path = tmp_path / f"{name}.pt"
        checkpoint.save({"model": model.state_dict(), "optimizer": {}, "step": 1, "config": config,
                         "task": task.state_dict()}, path)
        folder = publish(path, tmp_path / name)
        assert "transformers has no such model" in capsys.readouterr().out
        assert "secret" not in (folder / "config.json").read_text()
        again, loaded = load_model(folder)
        assert again.name == task.name and again.class_names == task.class_names
        assert again.config.model == task.config.model and type(getattr(again, "tokenizer", None)) is (
            ByteTokenizer if ar else type(None))
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_class_names_become_transformers_labels(tmp_path):
    names = [f"kind {number}" for number in range(10)]
    task_name, options = OFFICIAL["image_learned"]
    path, _ = new_checkpoint(tmp_path / "model.pt", task_name, names, model=SMALL | options)
    port = transformers.PerceiverForImageClassificationLearned.from_pretrained(publish(path, tmp_path / "published"))
    assert list(port.config.id2label.values()) == names


@pytest.mark.parametrize("config, expected", [
    ("imagenet_fourier", "transformers"), ("imagenet_learned", "deepmind"), ("imagenet_conv", "deepmind"),
    ("mlm_paper", "transformers"), ("flow_kitti", "transformers"), ("autoencode_kinetics", "transformers"),
    ("mnist", None), ("clm", None), ("cifar10", None)])
def test_recipes_that_transformers_can_load(config, expected):
    config = load_config(ROOT / "configs" / f"{config}.yaml", ["data.path=data"], TASKS)
    port = port_config(config)
    assert (port and port[2]) == expected
