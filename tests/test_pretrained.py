"""Trained models: comparisons with DeepMind, the Hugging Face port and krasserm; downloads; damaged files."""
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import GOLDEN, ROOT, new_checkpoint, run_script
from perceiver import checkpoint, pretrained
from perceiver.config import Config, OptimConfig, from_dict, to_dict
from perceiver.errors import UserError
from perceiver.optim import build_optimizer, scale_and_clip
from perceiver.pretrained import (DEFAULTS, MODELS, from_pretrained, init_weights_from, load_model, load_weights,
                                  perceiver_ar, read_trained)
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
    """The port's inputs: frames (B, 2, 3, H, W) -> (B, 2, 27, H, W), 3x3 pixels around each pixel, zeros outside."""
    height, width = frames.shape[-2:]
    padded = nn.functional.pad(frames, (1, 1, 1, 1))
    return torch.cat([padded[..., row : row + height, column : column + width]
                      for row in range(3) for column in range(3)], dim=2)


def multimodal_port(**kwargs) -> nn.Module:
    return randomize(transformers.PerceiverForMultimodalAutoencoding(transformers.PerceiverConfig(**kwargs)))


def compare_subsets(port: nn.Module, model: nn.Module, inputs: dict, positions: dict):
    """Compares selected outputs. The port always computes the whole label, and joins the audio patches."""
    theirs = port(inputs, subsampled_output_points={"label": None} | positions).logits
    ours = model(inputs, output_positions={"label": None} | positions)
    assert_equal(ours["label"], theirs["label"])
    assert_equal(ours["image"], theirs["image"])
    assert_equal(ours["audio"].flatten(1), theirs["audio"])


def randomize(model: nn.Module) -> nn.Module:
    """Sets random weights. Activations keep their scale; biases and norms are far from 0 and 1."""
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
    """Saves config.json and the weights, with save_pretrained or with torch.save(state_dict). Returns the folder."""
    model.save_pretrained(folder)
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / file)
    return folder


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor):
    assert theirs.std() > 0.05  # not a comparison of zeros
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def sum_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy in the type of `logits`. Labels of -100 do not count."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def train_ours(model: nn.Module, batches: list[tuple], config: OptimConfig) -> list[float]:
    """The mean loss of each batch, before the training step on it. A batch is the model's arguments, then labels."""
    model.train()
    optimizer = build_optimizer(model, config)
    losses = []
    for *inputs, labels in batches:
        loss = sum_loss(model(*inputs), labels)
        loss.backward()
        scale = 1 / (labels != -100).sum().double()
        scale_and_clip(model.parameters(), scale, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss * scale).item())
    return losses


def train_port(port: nn.Module, batches: list[tuple], config: OptimConfig) -> list[float]:
    """The same with the port and torch's own clipping. Its arguments are ids, padding and labels."""
    port.train()
    groups = [{"params": [p for p in port.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in port.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.lr)
    losses = []
    for ids, pad, labels in batches:
        loss = port(ids, attention_mask=~pad, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(port.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_equal_training(ours: list[float], theirs: list[float]):
    assert np.mean(theirs[-5:]) < 0.95 * np.mean(theirs[:5])  # it learns
    np.testing.assert_allclose(ours, theirs, atol=1e-9, rtol=0)


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
    x, latents = model.encode(ids, pad)
    assert_equal(model.output_adapter(model.decoder(model.query_provider(x), latents, pad)), out)  # padded queries too


@torch.inference_mode()
def test_multimodal_outputs_of_deepminds_code():
    file, model = np.load(GOLDEN / "multimodal" / "io.npz"), from_pretrained(GOLDEN / "multimodal")
    inputs = {name: torch.from_numpy(file[name]).float() for name in ("image", "audio")}
    outputs = model(inputs | {"label": torch.randn(1, 12)})  # the label is masked: its values do not matter
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
    assert_equal(model(ids[1:2, :17]), port(ids, attention_mask=~pad).logits[1:2, :17])  # the same without padding


def test_masked_lm_trains_like_the_port(tmp_path):
    """In float64, with padding, weight decay, and clipping that acts."""
    port = masked_lm_port(**SMALL, d_model=24, qk_channels=16, v_channels=32, max_position_embeddings=40,
                          num_cross_attention_heads=2, attention_probs_dropout_prob=0.0)
    model = from_pretrained(save(port, tmp_path, "model.safetensors"), "transformers")
    text = np.frombuffer(Path(__file__).read_bytes()[: 25 * 3 * 40], np.uint8)
    labels = torch.from_numpy(text.astype(np.int64)).view(25, 3, 40) + 6
    ids = torch.where(torch.rand(labels.shape) < 0.2, 3, labels)  # 3 is the mask
    pad = torch.arange(40) >= torch.tensor([[40], [17], [29]])
    batches = [(x, pad, y.masked_fill(pad | (x != 3), -100)) for x, y in zip(ids, labels)]
    config = OptimConfig(lr=3e-3, weight_decay=0.1, max_grad_norm=1.0)
    assert_equal_training(train_ours(model.double(), batches, config), train_port(port.double(), batches, config))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@torch.inference_mode()
def test_image_classifiers_equal_the_port(tmp_path, kind, file):
    port = image_port(kind, **SMALL, num_blocks=2, num_cross_attention_heads=1, num_labels=11, image_size=32)
    model, images = from_pretrained(save(port, tmp_path, file), "transformers"), torch.randn(2, 3, 32, 32)
    assert_equal(model(images), port(images).logits)
    if kind != "image_learned":  # Fourier positions work for images of any size
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
    """The port leaves out the factor 20."""
    port = flow_port(**SMALL, num_blocks=2, num_cross_attention_heads=2, train_size=[20, 28])
    model, frames = from_pretrained(save(port, tmp_path, file), "transformers"), torch.rand(2, 2, 3, 20, 28) * 2 - 1
    assert_equal(model(frames), 20 * port(patches(frames)).logits)


@pytest.mark.slow
@torch.inference_mode()
def test_optical_flow_of_the_official_size_equals_the_port(tmp_path):
    """The frames are small, which takes a hundredth of the time. The positions have the official size."""
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
    """Without a config.json, the weights become the official model."""
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


@pytest.mark.parametrize("variant", pretrained.VARIANTS)
def test_official_models_have_the_published_sizes(variant):
    counts = []
    for make_config, official in list(MODELS.values())[:-1]:
        with torch.device("meta"):
            model = from_dict(make_config(DEFAULTS | official, variant), TASKS).model.build()
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    assert counts == [201_108_230, 19_858_855, 62_255_848, 48_646_522, 41_057_134, 48_440_627]


# ----------------------------------------------------------------------------------------------------------------------
# krasserm's Perceiver AR

PEER = os.environ.get("KRASSERM")  # the folder of krasserm's package, see golden/krasserm/peer.py
# From the config.json of the published models
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


def assert_trains_like_the_peer(folder: Path):
    """In float64, with the peer's dropped prefix positions, weight decay, and clipping that acts."""
    file, model = np.load(folder / "training.npz"), from_pretrained(folder)
    num_latents = model.config.num_latents
    batches = [(ids[:, :-1], num_latents, None, kept, ids[:, -num_latents:])
               for ids, kept in zip(*(torch.from_numpy(file[name]) for name in ("ids", "kept")))]
    config = OptimConfig(lr=3e-3, weight_decay=0.1, max_grad_norm=1.0)
    assert_equal_training(train_ours(model.double(), batches, config), file["losses"].tolist())


def test_trains_like_krasserms_code():
    assert_trains_like_the_peer(GOLDEN / "krasserm" / "hf-clm")


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
    assert_trains_like_the_peer(tmp_path)


@pytest.mark.parametrize("fields, count", [(CLM_BASE, 453_950_720), (GIANT_MIDI, 134_840_832)])
def test_krasserms_models_have_the_published_sizes(fields, count):
    config = json.loads((GOLDEN / "krasserm" / "hf-clm" / "config.json").read_text())
    config["model_config"] |= {"num_self_attention_rotary_layers": 1} | fields
    with torch.device("meta"):
        model = from_dict(perceiver_ar(config, "deepmind"), TASKS).model.build()
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
    url = "https://storage.googleapis.com/perceiver_io/sintel_frame1.png"  # from DeepMind's colab, 1024x436
    torch.hub.download_url_to_file(url, str(tmp_path / "frame.png"))
    image = pil_to_tensor(Image.open(tmp_path / "frame.png").convert("RGB")) / 127.5 - 1
    frames = torch.stack((image[:, :368, :496], image[:, 3:371, 5:501]))
    flow = from_pretrained("deepmind/optical-flow-perceiver")(frames[None])
    torch.testing.assert_close(flow[0].flatten(0, 1).median(0).values, torch.tensor([-5.0, -3.0]), atol=0.3, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# load_model


@pytest.mark.parametrize("name, task", [
    ("masked-lm", "masked_lm"), ("image-fourier", "image_classification"), ("image-learned", "image_classification"),
    ("image-conv", "image_classification"), ("optical-flow", "optical_flow"),
    ("multimodal", "multimodal_autoencoding"), ("krasserm/hf-clm", "causal_lm")])
def test_published_weights_have_a_task(name, task):
    """The source may be a folder or the file of the weights."""
    for source in (GOLDEN / name, str(GOLDEN / name / "model.safetensors")):
        found, model = load_model(source)
        assert found.name == found.config.task == task and isinstance(found, TASKS[task])
        assert not model.training and not any(module.training for module in model.modules())


def test_classes_of_published_weights(folder):
    assert load_model(folder)[0].class_names is None
    names = [f"class {number}" for number in range(10)]
    change_config(folder, id2label=dict(sorted((str(number), name) for number, name in enumerate(names))))
    assert load_model(folder)[0].class_names == names
    change_config(folder, id2label={str(number): f"LABEL_{number}" for number in range(10)})
    assert load_model(folder)[0].class_names is None
    imagenet = pretrained.published_class_names({"id2label": {}, "num_labels": 1000})
    assert (imagenet[0], imagenet[-1]) == ("tench", "toilet tissue")


def test_krasserms_music_and_tokenizer(tmp_path):
    folder = shutil.copytree(GOLDEN / "krasserm" / "hf-clm", tmp_path / "model")
    assert load_model(folder)[0].tokenizer is None
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 7, "b": 3}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_model(folder)[0].tokenizer.encode("b") == [3]
    change_config(folder, model_type="perceiver-ar-symbolic-audio-model")
    assert "model.vocab_size=19" in error_of(folder)  # now it is a model of music, which needs 389 tokens


def test_a_run_folder_stands_for_a_checkpoint(tmp_path):
    """The checkpoint is best.pt. It is last.pt if the run has not been evaluated yet."""
    run, inputs = tmp_path / "run", {"input": {"max_seq_len": 8, "num_input_channels": 16}}
    _, last = new_checkpoint(run / "checkpoints" / "last.pt", "text_classification", ["a", "b"],
                             inputs | {"num_classes": 2})
    for source in (run, str(run), run / "checkpoints" / "last.pt"):
        task, model = load_model(source)
        assert task.class_names == ["a", "b"] and not model.training
        assert equal_weights(model, last)
    _, best = new_checkpoint(run / "checkpoints" / "best.pt", "text_classification", ["a", "b"],
                             inputs | {"num_classes": 2, "num_latents": 5})
    assert equal_weights(load_model(run)[1], best)


def equal_weights(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_missing_model_is_not_looked_for_on_the_internet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "download", Mock(side_effect=AssertionError))
    (tmp_path / "experiments").mkdir()
    for source in ("runs/nothere", "experiments/nothere", "nothere", "nothere.pt", "./nothere", "/nothere/x",
                   "a/b/checkpoints/last.pt", "no such/place"):
        assert error_of(source) == f"{source} does not exist"
    assert "folder experiments holds no checkpoints/best.pt or checkpoints/last.pt or" in error_of("experiments")


def test_a_file_that_is_no_model(tmp_path):
    message = error_of(ROOT / "README.md")
    assert "README.md is damaged, or not a checkpoint" in message and "weights_only" not in message
    torch.save({"model": {}}, tmp_path / "other.pt")
    assert "is not a checkpoint of train.py" in error_of(tmp_path / "other.pt")


@pytest.mark.parametrize("file", ["model.bin", "model.pt"])
def test_lack_of_memory_is_not_reported_as_damage(tmp_path, monkeypatch, file):
    torch.save({}, tmp_path / file)
    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    monkeypatch.setattr(torch, "load", Mock(side_effect=RuntimeError(message)))
    told = error_of(tmp_path / file)
    assert "can't allocate memory" in told and "damaged" not in told


# ----------------------------------------------------------------------------------------------------------------------
# Training from other weights


def build(task: str, **model) -> tuple[Config, nn.Module]:
    """A config and a new model."""
    config = from_dict({"task": task, "model": model}, TASKS)
    return config, TASKS[task](config).build_model()


def save_checkpoint(path: Path, config: Config, model: nn.Module):
    state = TASKS[config.task](config).state_dict()
    checkpoint.save({"model": model.state_dict(), "optimizer": {}, "step": 1, "best_loss": 1.0,
                     "config": to_dict(config), "task": state}, path)


def test_training_starts_from_a_whole_perceiver_ar(tmp_path):
    """The source is published weights or a checkpoint. The number of latents may differ."""
    golden = GOLDEN / "krasserm" / "hf-clm"
    small = dataclasses.asdict(load_model(golden)[0].config.model)
    weights = from_pretrained(golden).state_dict()

    def started(source: Path, **changes) -> nn.Module:
        config, model = build("causal_lm", **small | changes)
        assert not torch.equal(model.token_embedding.weight, weights["token_embedding.weight"])
        init_weights_from(model, str(source), config)
        return model

    model = started(golden, num_latents=6)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    path = tmp_path / "last.pt"
    config, saved = build("causal_lm", **small)
    save_checkpoint(path, config, saved)
    assert equal_weights(started(path, num_latents=7, residual_dropout=0.5), saved)
    for source, changes, message in (
            (golden, dict(num_heads=4), "model.num_heads was 2, is 4"),
            (golden, dict(max_seq_len=20), "position_embedding.weight"),
            (GOLDEN / "masked-lm", {}, "is a model of task masked_lm; task causal_lm cannot use it")):
        with pytest.raises(UserError, match=message):
            started(source, **changes)


SMALL_IO = dict(num_latents=6, num_latent_channels=16, input={"max_seq_len": 20, "num_input_channels": 12},
                encoder={"num_cross_attention_heads": 2, "num_self_attention_heads": 2,
                         "num_self_attention_layers_per_block": 2},
                decoder={"num_cross_attention_heads": 2})


@pytest.fixture
def masked_lm(tmp_path) -> tuple[Path, nn.Module]:
    """A run folder with a checkpoint, and its model."""
    config, model = build("masked_lm", **SMALL_IO)
    save_checkpoint(tmp_path / "mlm" / "checkpoints" / "best.pt", config, model)
    return tmp_path / "mlm", model


def test_another_task_takes_input_adapter_and_encoder(masked_lm):
    run, source = masked_lm
    for path in (run, run / "checkpoints" / "best.pt"):
        config, model = build("text_classification", **SMALL_IO)
        fresh = {key: value.clone() for key, value in model.state_dict().items()}
        init_weights_from(model, str(path), config)
        assert equal_weights(model.input_adapter, source.input_adapter)
        assert equal_weights(model.encoder, source.encoder)
        for key, value in model.state_dict().items():
            if not key.startswith(("input_adapter", "encoder")):
                assert torch.equal(value, fresh[key]), key


def test_the_same_task_takes_all_but_other_classes(tmp_path):
    config, source = build("text_classification", **SMALL_IO, num_classes=3)
    save_checkpoint(tmp_path / "last.pt", config, source)
    config, model = build("text_classification", **SMALL_IO, num_classes=3)
    init_weights_from(model, str(tmp_path / "last.pt"), config)
    assert equal_weights(model, source)
    config, model = build("text_classification", **SMALL_IO, num_classes=4)
    fresh = model.output_adapter.linear.weight.clone()
    init_weights_from(model, str(tmp_path / "last.pt"), config)
    for part in ("input_adapter", "encoder", "query_provider", "decoder"):
        assert equal_weights(getattr(model, part), getattr(source, part))
    assert torch.equal(model.output_adapter.linear.weight, fresh)


def test_training_starts_from_published_weights():
    source = from_pretrained(GOLDEN / "image-fourier")
    published = to_dict(load_model(GOLDEN / "image-fourier")[0].config)["model"]
    config, model = build("image_classification", **published | {"num_classes": 3})
    init_weights_from(model, str(GOLDEN / "image-fourier"), config)
    assert equal_weights(model.encoder, source.encoder) and equal_weights(model.decoder, source.decoder)


def test_what_does_not_fit_is_named(masked_lm):
    run, _ = masked_lm

    def error_of_start(task: str = "text_classification", source: str | Path = run, **changes) -> str:
        config, model = build(task, **SMALL_IO | changes)
        with pytest.raises(UserError) as error:
            init_weights_from(model, str(source), config)
        return str(error.value)

    encoder, decoder = SMALL_IO["encoder"], SMALL_IO["decoder"]
    assert ("does not fit: model.encoder.num_self_attention_heads was 2, is 4"
            in error_of_start(encoder=encoder | {"num_self_attention_heads": 4}))
    assert re.search(r"\(encoder\) do not fit .* size mismatch for latents.weight", error_of_start(num_latents=5))
    changes = {"decoder": decoder | {"cross_attention_residual": False}}
    assert "model.decoder.cross_attention_residual was True, is False" in error_of_start("masked_lm", **changes)
    golden = GOLDEN / "krasserm" / "hf-clm"
    assert "is a model of task causal_lm; task masked_lm cannot use it" in error_of_start("masked_lm", golden)
    for missing in ("runs/mlm/checkpoints/best.pt", "nothing", "runs/nothing"):
        assert error_of_start(source=missing) == (
            f"model.init_from={missing} does not exist: train it first, or start without it (model.init_from=null)")


# ----------------------------------------------------------------------------------------------------------------------
# Downloads, with huggingface_hub replaced or without a network


@pytest.fixture
def hub(folder, tmp_path, monkeypatch) -> list[list[str]]:
    """Replaces huggingface.co by a hub with one model, owner/name. Returns a growing list of the requested files."""
    asked, cache = [], tmp_path / "cache"

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        if name != "owner/name":
            raise huggingface_hub.errors.RepositoryNotFoundError("404\n\nNot found.", response=Mock())
        asked.append(allow_patterns)
        cache.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, cache)
        return str(cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@torch.inference_mode()
def test_a_model_is_downloaded_with_its_config(hub, folder):
    """Only one of the two weight files is downloaded."""
    files, expected = ["config.json", "tokenizer.json"], np.load(GOLDEN / "image-learned" / "io.npz")
    model = from_pretrained("owner/name")
    assert_equal(model(torch.from_numpy(expected["images"]).float()), torch.from_numpy(expected["out"]))
    assert hub == [[*files, "pytorch_model.bin"], [*files, "model.safetensors"]]
    hub.clear()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert equal_weights(from_pretrained("owner/name"), model) and hub == [[*files, "pytorch_model.bin"]]


def test_no_such_model(hub, folder):
    assert "no such model on huggingface.co" in error_of("owner/other")
    for file in folder.iterdir():
        file.unlink()
    assert error_of("owner/name") == ("cannot download owner/name: it has no pytorch_model.bin or model.safetensors")


@pytest.mark.parametrize("error, message", [
    (huggingface_hub.errors.GatedRepoError("401\nNo.", response=Mock()), "you have no permission; ask for it at "
     "https://huggingface.co/owner/name and set HF_TOKEN"),
    (huggingface_hub.errors.LocalEntryNotFoundError("Got\nlost"), "cannot be reached, or HF_HUB_OFFLINE is set"),
    (TimeoutError("The read operation\n timed out"), "The read operation timed out"),
    (OSError(28, "No space left on device"), "No space left on device")])
def test_a_failed_download_is_one_line(monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    told = error_of("owner/name")
    assert told.startswith("cannot download owner/name: ") and message in told


def test_offline_mode_needs_a_cached_model(folder, tmp_path, monkeypatch):
    """Runs the real huggingface_hub on a cache in its layout."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "cannot be reached, or HF_HUB_OFFLINE is set" in error_of("owner/name")
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    assert equal_weights(from_pretrained("owner/name"), from_pretrained(folder))


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_optional_packages(folder, monkeypatch, package):
    source = folder if package == "safetensors" else "owner/name"
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs the package {package}: pip install {package}" in error_of(source)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes and damaged files


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
    message = error_of(folder)
    assert f"the weights in {folder} do not fit the model" in message
    assert 'Missing key(s) in state_dict: "encoder.cross_attention.0.mlp.0.bias".' in message
    assert 'Unexpected key(s) in state_dict: "perceiver.encoder.extra.weight".' in message
    assert re.search(r"size mismatch for encoder.self_attention.0.1.mlp.3.bias: .*\[5\].*\[32\]", message)
    del weights["perceiver.embeddings.latents"]
    save_file(weights, folder / "model.safetensors")
    assert 'Missing key(s) in state_dict: "encoder.latents.weight"' in error_of(folder)
    save_file({"perceiver.input_preprocessor.convnet_1x1.weight": torch.zeros(1)}, folder / "model.safetensors")
    assert 1500 < len(error_of(folder)) < 2500  # the list of weights is cut


def test_weights_for_a_model_with_other_classes(folder):
    task, state = read_trained(folder)
    task.config.model.num_classes = 3
    with pytest.raises(UserError, match=r"weights in here .*output_adapter.linear.weight: .*\[10, 32\].*\[3, 32\]"):
        load_weights(task.build_model(), state, "here")


@pytest.mark.parametrize("fields, message", [
    (dict(num_labels=12), "size mismatch for output_adapter.linear.weight"),
    (dict(hidden_act="relu"), "hidden_act='relu'"),
    (dict(num_self_attention_heads=5), "num_self_attention_heads=5 does not divide 32"),
    (dict(num_latents="many"), "config.json describes no known model: model.num_latents='many' must be int"),
    (dict(model_type="bert"), "model_type='bert' must be 'perceiver'"),
    (dict(use_query_residual=False), "use_query_residual=False")])
def test_config_that_does_not_fit(folder, fields, message):
    change_config(folder, **fields)
    assert message in error_of(folder)


@pytest.mark.parametrize("fields, message", [
    (dict(), "config.json lacks 'model_config'"),
    (dict(model_config={}), "config.json lacks 'cross_attention_widening_factor'"),
    (dict(cross_attention_widening_factor=2), "cross_attention_widening_factor=2"),
    (dict(num_channels=8), "size mismatch"), (dict(num_self_attention_layers=2), "Unexpected"),
    (dict(abs_pos_emb=False), 'Unexpected key(s) in state_dict: "position_embedding.weight"'),
    (dict(num_heads=3), "num_channels=16 is not divisible by num_heads=3")])
def test_config_of_krasserms_that_does_not_fit(tmp_path, fields, message):
    folder = shutil.copytree(GOLDEN / "krasserm" / "hf-clm", tmp_path / "model")
    if not fields:
        (folder / "config.json").unlink()
    elif "model_config" in fields:
        change_config(folder, **fields)
    else:
        model_config = json.loads((folder / "config.json").read_text())["model_config"]
        change_config(folder, model_config=model_config | fields)
    assert message in error_of(folder)


def test_damaged_files(folder):
    weights = load_file(folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        assert f"cannot read {folder}/model.safetensors: " in error_of(folder)
    file = folder / "pytorch_model.bin"
    torch.save(weights, file)
    whole = file.read_bytes()
    for content in (b"", b"not weights", *(whole[:size] for size in (100, len(whole) // 2, len(whole) - 1))):
        file.write_bytes(content)
        assert "cut short or damaged" in error_of(file)
    torch.save({"model": weights}, file)
    assert "holds no weights of a known model" in error_of(file)
    torch.save({"a": torch.zeros(1)}, file)
    assert "holds no weights of a known model" in error_of(file)
    torch.save(weights, file)
    for content in ("{", "[1]"):
        (folder / "config.json").write_text(content)
        assert f"cannot read {folder}/config.json: " in error_of(file)


def test_variants(folder):
    assert "variant='hf' must be one of deepmind, transformers" in error_of(folder, "hf")
