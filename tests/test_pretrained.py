"""Published weights: against DeepMind's own outputs and the Hugging Face port; what can be wrong with files."""
import dataclasses
import http.server
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import GOLDEN, run_script
from perceiver import checkpoint, pretrained
from perceiver.config import from_dict, to_dict
from perceiver.errors import UserError
from perceiver.pretrained import from_pretrained, load_weights, perceiver_ar, read_config, read_pretrained
from perceiver.tasks import TASKS

SMALL = dict(num_latents=6, d_latents=32, num_self_attends_per_block=2, num_self_attention_heads=4)
FULL = dict(num_latents=512, d_latents=1024, num_self_attends_per_block=6, num_self_attention_heads=8, num_blocks=8,
            num_cross_attention_heads=1, num_labels=1000, image_size=224)
IMAGES = {"image_fourier": (transformers.PerceiverForImageClassificationFourier, 261),
          "image_learned": (transformers.PerceiverForImageClassificationLearned, 512),
          "image_conv": (transformers.PerceiverForImageClassificationConvProcessing, 322)}


def masked_lm_port(**kwargs) -> nn.Module:
    return randomize(transformers.PerceiverForMaskedLM(transformers.PerceiverConfig(**kwargs)))


def image_port(kind: str, **kwargs) -> nn.Module:
    port, d_model = IMAGES[kind]
    return randomize(port(transformers.PerceiverConfig(d_model=d_model, **kwargs)))


def flow_port(**kwargs) -> nn.Module:
    return randomize(transformers.PerceiverForOpticalFlow(transformers.PerceiverConfig(d_model=322, **kwargs)))


def patches(frames: torch.Tensor) -> torch.Tensor:
    """What the port wants: (B, 2, 3, H, W) -> (B, 2, 27, H, W), the 3x3 neighbours of each pixel, zeros outside."""
    height, width = frames.shape[-2:]
    padded = nn.functional.pad(frames, (1, 1, 1, 1))
    return torch.cat([padded[..., row : row + height, column : column + width]
                      for row in range(3) for column in range(3)], dim=2)


def multimodal_port(**kwargs) -> nn.Module:
    return randomize(transformers.PerceiverForMultimodalAutoencoding(transformers.PerceiverConfig(**kwargs)))


def compare_subsets(port: nn.Module, model: nn.Module, inputs: dict, positions: dict):
    """The port always computes all of the label, and joins the patches of sound."""
    theirs = port(inputs, subsampled_output_points={"label": None} | positions).logits
    ours = model(inputs, output_positions={"label": None} | positions)
    assert_equal(ours["label"], theirs["label"])
    assert_equal(ours["image"], theirs["image"])
    assert_equal(ours["audio"].flatten(1), theirs["audio"])


def randomize(model: nn.Module) -> nn.Module:
    """Weights that matter, all of them: as large as keeps the activations' size, biases and norms far from 0 and 1."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif "running_var" in name or ("norm" in name and "weight" in name):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.3)
    return model.eval()


def save(model: nn.Module, folder: Path, file: str) -> Path:
    """As save_pretrained or torch.save(state_dict) leave it, with the config beside."""
    model.save_pretrained(folder)
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / file)
    return folder


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor):
    assert theirs.std() > 0.05  # there is something to compare
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# DeepMind's outputs


@pytest.mark.parametrize("folder", ["masked-lm", "image-fourier", "image-learned", "image-conv", "optical-flow"])
@torch.inference_mode()
def test_outputs_of_deepminds_code(folder):
    file, model = np.load(GOLDEN / folder / "io.npz"), from_pretrained(GOLDEN / folder)
    out = torch.from_numpy(file["out"])
    if folder != "masked-lm":
        return assert_equal(model(torch.from_numpy(file["frames" if "frames" in file else "images"]).float()), out)
    ids, pad = torch.from_numpy(file["ids"]).long(), torch.from_numpy(file["pad"])
    assert_equal(model(ids, pad)[~pad], out[~pad])
    assert_equal(model(ids, pad, query_pad_mask=pad), out)


@torch.inference_mode()
def test_multimodal_outputs_of_deepminds_code():
    file, model = np.load(GOLDEN / "multimodal" / "io.npz"), from_pretrained(GOLDEN / "multimodal")
    inputs = {name: torch.from_numpy(file[name]).float() for name in ("image", "audio")}
    outputs = model(inputs | {"label": torch.randn(1, 12)})  # masked: whatever it is
    for name in ("image", "audio", "label"):
        assert_equal(outputs[name], torch.from_numpy(file[f"out_{name}"]))


# ----------------------------------------------------------------------------------------------------------------------
# The port


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@torch.inference_mode()
def test_masked_lm_equals_the_port(tmp_path, file):
    port = masked_lm_port(**SMALL, d_model=24, qk_channels=16, v_channels=32, max_position_embeddings=40, num_blocks=2,
                          num_cross_attention_heads=2, cross_attention_widening_factor=2,
                          self_attention_widening_factor=3)
    model, ids = from_pretrained(save(port, tmp_path, file), "transformers"), torch.randint(262, (3, 40))
    pad = torch.arange(40) >= torch.tensor([[40], [17], [1]])
    assert_equal(model(ids), port(ids).logits)
    assert_equal(model(ids, pad), port(ids, attention_mask=~pad).logits)
    assert_equal(model(ids[1:2, :17]), port(ids, attention_mask=~pad).logits[1:2, :17])  # shorter, not padded


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@torch.inference_mode()
def test_image_classifiers_equal_the_port(tmp_path, kind, file):
    port = image_port(kind, **SMALL, num_blocks=2, num_cross_attention_heads=1, num_labels=11, image_size=32)
    model, images = from_pretrained(save(port, tmp_path, file), "transformers"), torch.randn(2, 3, 32, 32)
    assert_equal(model(images), port(images).logits)
    if kind != "image_learned":  # Fourier positions are of any size
        images = torch.randn(1, 3, 48, 40)
        assert_equal(model(images), port(images).logits)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@torch.inference_mode()
def test_multimodal_equals_the_port(tmp_path, file):
    port = multimodal_port(**SMALL, num_blocks=2, num_cross_attention_heads=1, num_labels=11, num_frames=3,
                           image_size=2, audio_samples_per_frame=16, samples_per_patch=8, output_shape=[1, 3, 8, 8],
                           d_model=397, output_num_channels=20, _label_trainable_num_channels=40)
    model = from_pretrained(save(port, tmp_path, file), "transformers")
    inputs = {"image": torch.rand(2, 3, 3, 8, 8), "audio": torch.randn(2, 48, 1), "label": torch.randn(2, 11)}
    everything = {"image": torch.arange(192), "audio": torch.arange(6)}
    compare_subsets(port, model, inputs, everything)
    compare_subsets(port, model, inputs, {"image": torch.tensor([190, 3, 3, 77]), "audio": torch.tensor([4])})
    subsets, whole = model(inputs, output_positions=everything), model(inputs)
    torch.testing.assert_close(whole["audio"], subsets["audio"].view(2, 48, 1))
    torch.testing.assert_close(whole["image"], subsets["image"].view(2, 3, 8, 8, 3).permute(0, 1, 4, 2, 3))


@torch.inference_mode()
def test_batchnorm_in_training_mode_updates_like_the_ports(tmp_path):
    port = image_port("image_conv", **SMALL, num_blocks=1, num_cross_attention_heads=1, num_labels=11, image_size=32,
                      attention_probs_dropout_prob=0.0).train()
    model, images = from_pretrained(save(port, tmp_path, "model.safetensors"), "transformers").train(), \
        torch.randn(4, 3, 32, 32)
    assert_equal(model(images), port(images).logits)
    theirs, ours = port.perceiver.input_preprocessor.convnet.batchnorm, model.input_adapter.features.norm
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, getattr(theirs, name))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@torch.inference_mode()
def test_optical_flow_equals_the_port(tmp_path, file):
    """But for the factor 20, without which the port gives it."""
    port = flow_port(**SMALL, num_blocks=2, num_cross_attention_heads=2, train_size=[20, 28])
    model, frames = from_pretrained(save(port, tmp_path, file), "transformers"), torch.rand(2, 2, 3, 20, 28) * 2 - 1
    assert_equal(model(frames), 20 * port(patches(frames)).logits)


@pytest.mark.slow
@torch.inference_mode()
def test_optical_flow_of_the_official_size_equals_the_port(tmp_path):
    """On small frames, which take a hundredth of the time; positions are of the official size."""
    port = flow_port(num_latents=2048, d_latents=512, num_self_attends_per_block=24, num_self_attention_heads=16,
                     num_blocks=1, num_cross_attention_heads=1, train_size=[368, 496])
    folder, frames = save(port, tmp_path, "pytorch_model.bin"), torch.rand(1, 2, 3, 32, 48) * 2 - 1
    (folder / "config.json").unlink()
    port.perceiver.decoder.output_image_shape = (32, 48)
    model = from_pretrained(folder, "transformers")
    assert_equal(model(frames), 20 * port(patches(frames)).logits)
    assert model.input_adapter.positions.grid == (368, 496)
    assert sum(parameter.numel() for parameter in model.parameters()) == 41_057_134


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked_lm", *IMAGES])
@torch.inference_mode()
def test_official_sizes_equal_the_port(tmp_path, kind):
    """Without config.json: what the weights don't tell is the official models'."""
    if kind == "masked_lm":
        port = masked_lm_port(qk_channels=256, v_channels=1280)
        inputs = torch.randint(262, (1, 2048)), torch.arange(2048)[None] >= 1500
        expected = port(inputs[0], attention_mask=~inputs[1]).logits
    else:
        port, inputs = image_port(kind, **FULL), (torch.randn(1, 3, 224, 224),)
        expected = port(*inputs).logits
    folder = save(port, tmp_path, "pytorch_model.bin")
    (folder / "config.json").unlink()
    assert_equal(from_pretrained(folder, "transformers")(*inputs), expected)
    for variant in pretrained.VARIANTS:
        count = sum(parameter.numel() for parameter in from_pretrained(folder, variant).parameters())
        assert count == {"masked_lm": 201_108_230, "image_fourier": 48_440_627, "image_learned": 62_255_848,
                         "image_conv": 48_646_522}[kind]


@pytest.mark.slow
@torch.inference_mode()
def test_official_multimodal_size_equals_the_port(tmp_path):
    port = multimodal_port(num_latents=784, d_latents=512, d_model=704, num_blocks=1, num_self_attends_per_block=8,
                           num_self_attention_heads=8, num_cross_attention_heads=1, num_labels=700)
    folder = save(port, tmp_path, "pytorch_model.bin")
    (folder / "config.json").unlink()
    model = from_pretrained(folder, "transformers")
    assert sum(parameter.numel() for parameter in model.parameters()) == 19_858_855
    inputs = {"image": torch.rand(1, 16, 3, 224, 224), "audio": torch.randn(1, 30720, 1), "label": torch.zeros(1, 700)}
    compare_subsets(port, model, inputs, {"image": torch.randint(16 * 224 * 224, (500,)),
                                          "audio": torch.arange(0, 1920, 13)})


# ----------------------------------------------------------------------------------------------------------------------
# krasserm's Perceiver AR

PEER = os.environ.get("KRASSERM")  # where krasserm's package is, as golden/krasserm/peer.py says
# Of the published models' config.json
CLM_BASE = dict(vocab_size=32_000, max_seq_len=1024, max_latents=512, num_channels=1280, num_heads=10,
                num_self_attention_layers=20, output_norm=True, output_bias=False, abs_pos_emb=False)
GIANT_MIDI = CLM_BASE | dict(vocab_size=389, max_seq_len=6144, max_latents=2048, num_channels=768, num_heads=8,
                             num_self_attention_layers=18)


@torch.inference_mode()
def assert_equal_to_the_peer(folder: Path):
    file, model = np.load(folder / "io.npz"), from_pretrained(folder)
    ids, pad, logits = (torch.from_numpy(file[name]) for name in ("ids", "pad", "logits"))
    num_latents = logits.shape[1]
    assert pad.sum(1).tolist() == [0, (ids.shape[1] - num_latents) // 3, ids.shape[1] - num_latents]
    for ours, theirs in ((model(ids, num_latents, pad), logits), (model(ids[:1], num_latents), logits[:1]),
                         (model(ids[:, -5:], 3), torch.from_numpy(file["short"]))):
        assert theirs.std() > 0.05
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_outputs_of_krasserms_code(tmp_path, file):
    folder = shutil.copytree(GOLDEN / "krasserm" / "hf-clm", tmp_path / "model")
    if file == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    assert_equal_to_the_peer(folder)


@pytest.mark.skipif(PEER is None, reason="KRASSERM names no folder with krasserm's package")
@pytest.mark.parametrize("config", [dict(abs_pos_emb=False, output_bias=False, num_self_attention_rotary_layers=-1),
                                    dict(output_norm=False, num_heads=4)])
def test_krasserms_code_itself(tmp_path, config):
    script = GOLDEN / "krasserm" / "peer.py"
    result = run_script(script, PEER, tmp_path, json.dumps(CLM_BASE | dict(
        vocab_size=31, max_seq_len=48, max_latents=16, num_channels=64, num_heads=2, num_self_attention_layers=4,
        output_bias=True, abs_pos_emb=True) | config))
    assert result.returncode == 0, result.stderr
    assert_equal_to_the_peer(tmp_path)


def test_training_starts_from_a_whole_perceiver_ar(tmp_path):
    """Of published weights or a checkpoint; with as many latents as one likes."""
    golden = GOLDEN / "krasserm" / "hf-clm"
    small = dataclasses.asdict(read_pretrained(golden)[0])

    def started(source: Path, **changes) -> nn.Module:
        values = {"task": "causal_lm", "model": small | {"init_from": str(source)} | changes}
        config = from_dict(values | {"data": {"holds_ids": True}}, TASKS)
        task = TASKS["causal_lm"](config)
        model = task.build_model()
        assert not torch.equal(model.token_embedding.weight, weights["token_embedding.weight"])
        task.initialise(model)
        checkpoint.save({"model": model.state_dict(), "optimizer": {}, "step": 0, "config": to_dict(config)},
                        tmp_path / "last.pt")
        return model

    weights = from_pretrained(golden).state_dict()
    for model in (started(golden, num_latents=6), started(tmp_path / "last.pt", num_latents=7)):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for changes, message in ((dict(num_heads=4), "model.num_heads was 2, is 4"),
                             (dict(max_seq_len=20), "position_embedding.weight"),
                             (dict(init_from=str(GOLDEN / "masked-lm")), "model.vocab_size was None, is 19")):
        with pytest.raises(UserError, match=message):
            started(golden, **changes)


@pytest.mark.parametrize("fields, count", [(CLM_BASE, 453_950_720), (GIANT_MIDI, 134_840_832)])
def test_krasserms_models_have_the_published_sizes(fields, count):
    published = read_config(GOLDEN / "krasserm" / "hf-clm" / "config.json")["model_config"]
    with torch.device("meta"):
        fields = published | {"num_self_attention_rotary_layers": 1} | fields
        model = perceiver_ar({}, {"model_config": fields}, "deepmind").build()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# ----------------------------------------------------------------------------------------------------------------------
# The published weights


@pytest.mark.network
@torch.inference_mode()
def test_published_logits_of_the_masked_lm():
    """transformers' test of PerceiverForMaskedLM: [CLS], the text with " missing." masked, [SEP]."""
    text = b"This is an incomplete sentence where some words are missing."
    ids = torch.tensor([[4, *(byte + 6 for byte in text), 5]])
    ids[0, 52:61] = 3
    logits = from_pretrained("deepmind/language-perceiver", "transformers")(ids)[0]
    expected = torch.tensor([[-10.8609, -10.7651, -10.9187], [-12.1689, -11.9389, -12.1479],
                             [-12.1518, -11.9707, -12.2073]])
    torch.testing.assert_close(logits[:3, :3], expected, atol=1e-3, rtol=0)
    deepmind = from_pretrained("deepmind/language-perceiver")(ids)[0]
    assert bytes(token - 6 for token in deepmind[52:61].argmax(-1).tolist()) == b" missing."


@pytest.mark.network
@pytest.mark.parametrize("name, expected", [
    ("learned", [-1.1652, -0.1992, -0.7520]), ("conv", [-1.1186, 0.0554, 0.0897]),
    ("fourier", [-1.1295, -0.2832, 0.3226])])
@torch.inference_mode()
def test_published_logits_of_the_image_classifiers(tmp_path, name, expected):
    """transformers' tests: COCO's picture of two cats."""
    from PIL import Image
    torch.hub.download_url_to_file("http://images.cocodataset.org/val2017/000000039769.jpg", str(tmp_path / "cats.jpg"))
    image = Image.open(tmp_path / "cats.jpg").convert("RGB")
    pixels = transformers.PerceiverImageProcessor()(image, return_tensors="pt").pixel_values
    logits = from_pretrained(f"deepmind/vision-perceiver-{name}", "transformers")(pixels)
    torch.testing.assert_close(logits[0, :3], torch.tensor(expected), atol=1e-2, rtol=0)


@pytest.mark.network
@torch.inference_mode()
def test_published_weights_find_how_far_an_image_was_moved(tmp_path):
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor
    url = "https://storage.googleapis.com/perceiver_io/sintel_frame1.png"  # of DeepMind's colab, 1024x436
    torch.hub.download_url_to_file(url, str(tmp_path / "frame.png"))
    image = pil_to_tensor(Image.open(tmp_path / "frame.png").convert("RGB")) / 127.5 - 1
    frames = torch.stack((image[:, :368, :496], image[:, 3:371, 5:501]))
    flow = from_pretrained("deepmind/optical-flow-perceiver")(frames[None])
    torch.testing.assert_close(flow[0].flatten(0, 1).median(0).values, torch.tensor([-5.0, -3.0]), atol=0.3, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(GOLDEN / "image-learned", tmp_path / "model")
    return tmp_path / "model"


def error_of(*args) -> str:
    with pytest.raises(UserError) as error:
        from_pretrained(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_config(folder: Path, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_keys_that_do_not_fit_are_listed(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["perceiver.encoder.cross_attention.layernorm.bias"]
    weights["perceiver.encoder.self_attends.1.mlp.dense2.bias"] = torch.zeros(5)
    weights["perceiver.encoder.extra.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors")
    assert error_of(folder).endswith(
        "1 not used: perceiver.encoder.extra.weight; 1 missing: encoder.cross_attention.0.mlp.0.bias; "
        "1 of another shape: encoder.self_attention.0.1.mlp.3.bias (5, the model's is 32)")
    del weights["perceiver.embeddings.latents"]
    save_file(weights, folder / "model.safetensors")
    assert "model.safetensors lacks encoder.latents.weight" in error_of(folder)


def test_weights_for_a_model_with_other_classes(folder):
    config, state = read_pretrained(folder)
    config.num_classes = 3
    with pytest.raises(UserError, match=r"output_adapter.linear.weight \(10x32, the model's is 3x32\)"):
        load_weights(config.build(), state, "here")


@pytest.mark.parametrize("fields, message", [
    (dict(num_labels=12), "10 classes, config.json has num_labels=12"), (dict(hidden_act="relu"), "hidden_act='relu'"),
    (dict(num_self_attention_heads=5), "num_self_attention_heads=5 does not divide 32"),
    (dict(model_type="bert"), "model_type='bert'"), (dict(use_query_residual=False), "use_query_residual=False")])
def test_config_that_does_not_fit(folder, fields, message):
    change_config(folder, **fields)
    assert message in error_of(folder)


@pytest.mark.parametrize("fields, message", [
    (dict(), "model_config of config.json lacks self_attention_widening_factor"),
    (dict(model_config={}), "model_config of config.json lacks self_attention_widening_factor"),
    (dict(cross_attention_widening_factor=2), "cross_attention_widening_factor=2"),
    (dict(num_channels=8), "of another shape"), (dict(num_self_attention_layers=2), "not used: self_attention.2."),
    (dict(abs_pos_emb=False), "1 not used: position_embedding.weight"),
    (dict(num_heads=3), "num_channels=16 is not divisible by num_heads=3")])
def test_config_of_krasserms_that_does_not_fit(tmp_path, fields, message):
    folder = shutil.copytree(GOLDEN / "krasserm" / "hf-clm", tmp_path / "model")
    if not fields:
        (folder / "config.json").unlink()
    elif "model_config" in fields:
        change_config(folder, **fields)
    else:
        change_config(folder, model_config=read_config(folder / "config.json")["model_config"] | fields)
    assert message in error_of(folder)


def test_damaged_files(folder):
    weights = load_file(folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        assert "cut short or damaged" in error_of(folder)
    file = folder / "pytorch_model.bin"
    torch.save(weights, file)
    whole = file.read_bytes()
    for content in (b"", b"not weights", *(whole[:size] for size in (100, len(whole) // 2, len(whole) - 1))):
        file.write_bytes(content)
        assert "cut short or damaged" in error_of(file)
    torch.save({"model": weights}, file)
    assert "must be tensors by name" in error_of(file)
    torch.save({"a": torch.zeros(1)}, file)
    assert "holds no weights of a model known here" in error_of(file)
    (folder / "config.json").write_text("{")
    torch.save(weights, file)
    assert "cannot read" in error_of(file) and "config.json" in error_of(file)


def test_safetensors_is_optional(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "needs the package safetensors: pip install safetensors" in error_of(folder)


def test_names_and_variants(tmp_path, folder):
    assert "is no file, no folder and no Hugging Face name" in error_of("no such/place/here")
    assert "holds no pytorch_model.bin or model.safetensors" in error_of(tmp_path)
    assert "variant='hf' must be one of deepmind, transformers" in error_of(folder, "hf")


# ----------------------------------------------------------------------------------------------------------------------
# Downloads, from a server of our own


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves a folder as huggingface.co does; breaks off after `limit` bytes."""
    protocol_version = "HTTP/1.1"
    folder: Path
    limit: int | None = None
    continues: bool = True
    ranges: list[str | None]

    def do_GET(self):
        file = self.folder / self.path.removeprefix("/owner/name/resolve/main/")
        if not file.is_file():
            return self.send_error(404)
        self.ranges.append(self.headers["Range"])
        start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if self.continues else 0
        content = file.read_bytes()[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.limit])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    handler = type("FolderHub", (Hub,), {"folder": folder, "ranges": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
        yield handler
        server.shutdown()


def test_a_download_is_cached(hub):
    for _ in range(2):
        model = from_pretrained("owner/name")
    assert hub.ranges == [None, None]  # config.json and model.safetensors, once
    expected = np.load(GOLDEN / "image-learned" / "io.npz")
    assert_equal(model(torch.from_numpy(expected["images"]).float()).detach(), torch.from_numpy(expected["out"]))


@pytest.mark.parametrize("continues", [True, False])  # False: a server that sends everything again
def test_an_interrupted_download_is_continued(hub, continues):
    hub.limit, hub.continues = 100_000, continues
    for done in (100_000, 200_000):
        message = error_of("owner/name")
        assert f"after {done if continues else 100_000} of " in message and "run it again to continue" in message
    hub.limit = None
    from_pretrained("owner/name")
    assert hub.ranges == [None, None, "bytes=100000-", f"bytes={200_000 if continues else 100_000}-"]
    path = Path(torch.hub.get_dir()) / "perceiver" / "owner--name" / "model.safetensors"
    assert path.read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    assert not list(path.parent.glob("*.part"))


def test_no_network_and_no_such_model(hub, monkeypatch):
    assert "on huggingface.co it has no pytorch_model.bin or model.safetensors" in error_of("owner/other")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "downloading http://127.0.0.1:9/owner/other/resolve/main/config.json failed" in error_of("owner/other")
