"""Perceiver and Perceiver IO: comparisons with krasserm's code and with plain formulas, and properties."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from conftest import GOLDEN, ROOT
from perceiver.adapters import ClassificationOutput, LinearOutput, TrainableQueries
from perceiver.attention import Attention, Unprojected
from perceiver.config import build
from perceiver.errors import UserError
from perceiver.model import (CrossAttentionLayer, Perceiver, PerceiverDecoder, PerceiverDecoderConfig, PerceiverEncoder,
                             PerceiverEncoderConfig, PerceiverIO)
from perceiver.tasks.images import ImageClassifierConfig, ImageInputConfig
from perceiver.tasks.masked_lm import MaskedLMConfig, TokenInputConfig
from perceiver.tasks.text_classification import TextClassifierConfig


def randomize(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Sets random weights far from their initial values, so that biases and norms matter too."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def encoder(num_latents: int = 6, num_latent_channels: int = 16, num_input_channels: int = 11, **kwargs):
    config = PerceiverEncoderConfig(**dict(num_cross_attention_heads=1, num_self_attention_heads=2,
                                           num_self_attention_layers_per_block=2) | kwargs)
    return randomize(PerceiverEncoder(config, num_latents, num_latent_channels, num_input_channels))


def masked_lm() -> PerceiverIO:
    config = MaskedLMConfig(6, 16, PerceiverEncoderConfig(2), PerceiverDecoderConfig(2, cross_attention_residual=False),
                            TokenInputConfig(num_input_channels=12, max_seq_len=20, vocab_size=30))
    return randomize(config.build())


# ----------------------------------------------------------------------------------------------------------------------
# Comparisons with other implementations


KRASSERM = {  # parts of krasserm's names, and their replacements
    "param:": "", "0.latent_provider._query": "encoder.latents.weight", "0.cross_attn_1.": "encoder.cross_attention.0.",
    "0.cross_attn_n.": "encoder.cross_attention.1.", "0.self_attn_1.": "encoder.self_attention.0.",
    "0.self_attn_n.": "encoder.self_attention.1.", "1.output_query_provider._query": "query_provider.table.weight",
    "1.output_adapter.": "output_adapter.", "1.cross_attn.": "decoder.cross_attention.", ".0.module.": ".",
    ".1.module.": ".mlp.", ".q_proj.": ".q.", ".k_proj.": ".k.", ".v_proj.": ".v.", ".o_proj.": ".out."}


def test_repeated_cross_attention_equals_krasserm():
    file = np.load(GOLDEN / "krasserm" / "io-repeated-cross-attention.npz")
    ours = {}
    for key in file:
        name = key
        for theirs, our in KRASSERM.items():
            name = name.replace(theirs, our)
        if key.startswith("param:"):
            ours[name] = torch.from_numpy(file[key]).float()
    config = ImageClassifierConfig(
        6, 32, PerceiverEncoderConfig(1, num_cross_attention_layers=2, num_self_attention_blocks=3,
                                      num_self_attention_layers_per_block=2, num_self_attention_heads=4,
                                      first_self_attention_block_shared=False, activation="gelu"),
        PerceiverDecoderConfig(2, num_cross_attention_qk_channels=24, num_query_channels=24, activation="gelu"), 7,
        ImageInputConfig((12, 10, 1), num_frequency_bands=5))
    model = config.build().eval()
    model.load_state_dict(ours)
    images = torch.from_numpy(file["images"]).float().movedim(-1, 1)
    torch.testing.assert_close(model(images), torch.from_numpy(file["logits"]), atol=1e-5, rtol=0)


def encoder_config(**kwargs) -> PerceiverEncoderConfig:
    return PerceiverEncoderConfig(**dict(num_cross_attention_heads=1, num_self_attention_blocks=8) | kwargs)


COUNTS = {
    "masked LM": (201_108_230, MaskedLMConfig(
        256, 1280, PerceiverEncoderConfig(8, 256, 1280, num_self_attention_layers_per_block=26,
                                          num_self_attention_qk_channels=256, num_self_attention_v_channels=1280),
        PerceiverDecoderConfig(8, 256, 768, cross_attention_residual=False))),
    "Fourier": (48_440_627, ImageClassifierConfig(512, 1024, encoder_config(), PerceiverDecoderConfig(1), 1000)),
    "learned": (62_255_848, ImageClassifierConfig(
        512, 1024, encoder_config(), PerceiverDecoderConfig(1), 1000,
        ImageInputConfig(features="conv1x1", num_feature_channels=256, positions="trainable"))),
    "conv": (48_646_522, ImageClassifierConfig(512, 1024, encoder_config(), PerceiverDecoderConfig(1), 1000,
                                               ImageInputConfig(features="conv"))),
    "Perceiver": (44_912_254, ImageClassifierConfig(
        512, 1024, encoder_config(num_cross_attention_layers=8), None, 1000)),
    "Perceiver, one cross-attention": (42_135_859, ImageClassifierConfig(512, 1024, encoder_config(), None, 1000)),
    "Perceiver, first one shared": (42_135_859, ImageClassifierConfig(512, 1024, encoder_config(
        num_cross_attention_layers=8, first_cross_attention_layer_shared=True), None, 1000)),
    "MNIST": (907_212, ImageClassifierConfig(
        32, 128, encoder_config(num_cross_attention_layers=2, num_self_attention_blocks=3,
                                num_self_attention_layers_per_block=3, first_self_attention_block_shared=False),
        PerceiverDecoderConfig(1), 10, ImageInputConfig((28, 28, 1), num_frequency_bands=32))),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_published_models(name):
    count, config = COUNTS[name]
    with torch.device("meta"):
        model = config.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("qk, v", [(15, 15), (6, 33), (48, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_of_any_width_equal_the_plain_formula(qk, v, masked):
    attention = randomize(Attention(10, 13, 3, qk, v))
    x_q, x_kv = torch.randn(2, 5, 10), torch.randn(2, 7, 13)
    mask = torch.rand(2, 1, 5, 7) < 0.6 if masked else torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 2] = not masked  # a fully masked query gets zeros
    q, k, value = (linear(x).unflatten(-1, (3, -1)).transpose(1, 2)
                   for linear, x in ((attention.q, x_q), (attention.k, x_kv), (attention.v, x_kv)))
    weights = (q @ k.mT / (qk / 3) ** 0.5).masked_fill(~mask, -1e30).softmax(-1) * mask.any(-1, keepdim=True)
    expected = attention.out((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x_q, x_kv, mask if masked else None), expected)
    torch.testing.assert_close(attention.weights(x_q, x_kv, mask), weights)


# ----------------------------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("num_heads", [1, 11])
@pytest.mark.parametrize("first_cross_shared, first_block_shared", [(True, True), (False, False), (False, True)])
def test_encoder_runs_the_layers_in_order_with_shared_weights(
    first_cross_shared, first_block_shared, num_heads, monkeypatch
):
    """With one head, inputs stay unprojected; with 11, they are projected."""
    model = encoder(num_cross_attention_heads=num_heads, num_cross_attention_layers=3, num_self_attention_blocks=4,
                    first_cross_attention_layer_shared=first_cross_shared,
                    first_self_attention_block_shared=first_block_shared)
    x = torch.randn(2, 9, 11)
    cross = [model.cross_attention[0]] + [model.cross_attention[-1]] * 2
    blocks = [model.self_attention[0]] + [model.self_attention[-1]] * 3
    assert len(set(cross)) == 2 - first_cross_shared and len(set(blocks)) == 2 - first_block_shared
    expected = model.latents.weight.expand(2, -1, -1)
    for i, block in enumerate(blocks):
        if i < 3:
            expected = cross[i](expected, x)
        for layer in block:
            expected = layer(expected)
    calls = []
    keys_values = Attention.keys_values

    def count(self, x_kv, *args, **kwargs):
        calls.append("inputs" if x_kv is x else "shared" if isinstance(x_kv, Unprojected) else "latents")
        return keys_values(self, x_kv, *args, **kwargs)

    monkeypatch.setattr(Attention, "keys_values", count)
    torch.testing.assert_close(model(x), expected)
    num_weights = len(model.cross_attention)  # shared layers compute keys and values once
    assert calls.count("inputs") == (1 if num_heads == 1 else num_weights)
    assert calls.count("inputs") + calls.count("shared") == num_weights


@pytest.mark.parametrize("num_cross_attention_layers", [1, 3])
def test_activation_checkpointing_changes_nothing(num_cross_attention_layers):
    x, gradients = torch.randn(2, 9, 11), []
    for checkpointing in (False, True):
        model = encoder(num_cross_attention_layers=num_cross_attention_layers, num_self_attention_blocks=3,
                        activation_checkpointing=checkpointing).train()
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_padding_is_masked():
    model, ids = masked_lm(), torch.randint(30, (2, 20))
    pad_mask = torch.arange(20) >= torch.tensor([[20], [13]])  # (2, 20)
    other = torch.where(pad_mask, torch.randint(30, (2, 20)), ids)
    logits = model(ids, pad_mask)
    torch.testing.assert_close(model(other, pad_mask), logits)
    torch.testing.assert_close(model(ids[1:, :13]), logits[1:, :13])  # a shorter input has fewer outputs
    assert not torch.allclose(model(other)[1], logits[1])


def test_all_padding_gives_finite_outputs_and_gradients():
    model, ids = masked_lm(), torch.randint(30, (2, 20))
    pad_mask = torch.tensor([[False] * 20, [True] * 20])
    logits = model(ids, pad_mask)
    logits.sum().backward()
    assert logits.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(model((ids + 1) % 30, pad_mask)[1], logits[1])


def test_selected_outputs_equal_those_of_all_outputs():
    model, ids = masked_lm(), torch.randint(30, (2, 20))
    logits = model(ids)
    for positions in (torch.tensor([7]), torch.tensor([3, 19, 0, 3])):
        torch.testing.assert_close(model(ids, output_positions=positions), logits[:, positions])
    positions = torch.tensor([[1, 2], [18, 5]])
    torch.testing.assert_close(model(ids, output_positions=positions), logits[torch.arange(2)[:, None], positions])


def test_masked_queries_read_zeros():
    decoder = randomize(PerceiverDecoder(PerceiverDecoderConfig(2, cross_attention_residual=False), 16, 12))
    queries, latents = torch.randn(2, 5, 12), torch.randn(2, 6, 16)
    mask = torch.tensor([[False, True, False, False, True], [True] * 5])
    out, layer = decoder(queries, latents, mask), decoder.cross_attention
    torch.testing.assert_close(out[~mask], decoder(queries, latents)[~mask])
    bias = layer.attention.out.bias
    torch.testing.assert_close(out[mask], (bias + layer.mlp(bias)).expand(7, -1))


def test_query_residual():
    for residual in (True, False):
        layer = randomize(CrossAttentionLayer(12, 16, 2, query_residual=residual))
        x = torch.randn(2, 5, 12)
        nn.init.zeros_(layer.mlp[-1].weight), nn.init.zeros_(layer.mlp[-1].bias)
        nn.init.zeros_(layer.attention.out.weight), nn.init.zeros_(layer.attention.out.bias)
        torch.testing.assert_close(layer(x, torch.randn(2, 3, 16)), x * residual)


def test_perceiver_outputs_come_from_the_mean_of_the_latents():
    core, x = encoder(), torch.randn(2, 9, 11)
    model = Perceiver(nn.Identity(), core, ClassificationOutput(16, 3))
    torch.testing.assert_close(model(x), model.output_adapter.linear(core(x).mean(1)))


def test_attention_map_holds_the_weights_of_the_first_cross_attention():
    model, x = encoder(num_input_channels=12, num_cross_attention_heads=2), torch.randn(2, 9, 12)
    pad_mask = torch.arange(9) >= torch.tensor([[9], [5]])
    weights = model.attention_map(x, pad_mask)[:, :, [4, 1]]  # (2, 2, 2, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 2))
    assert (weights[1, :, :, 5:] == 0).all()
    layer, latents = model.cross_attention[0], model.latents.weight.expand(2, -1, -1)
    v = layer.attention.v(layer.kv_norm(x)).unflatten(-1, (2, -1)).transpose(1, 2)  # (B, H, M, C/H)
    read = layer.attention.out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(
        read, layer.attention(layer.q_norm(latents), layer.kv_norm(x), ~pad_mask[:, None, None])[:, [4, 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = randomize(COUNTS["MNIST"][1].build(), std=0.1)
    images = torch.randn(2, 1, 28, 28)
    with torch.autocast("cpu", dtype):
        logits = model(images)
    torch.testing.assert_close(logits.float(), model(images), atol=0.1, rtol=0.1)


def test_transfer_of_a_masked_lm_encoder():
    source = masked_lm()
    config = TextClassifierConfig(6, 16, PerceiverEncoderConfig(2), PerceiverDecoderConfig(2), 3,
                                  TokenInputConfig(num_input_channels=12, max_seq_len=20, vocab_size=30))
    model, ids = config.build().eval(), torch.randint(30, (2, 20))
    model.input_adapter.load_state_dict(source.input_adapter.state_dict())
    model.encoder.load_state_dict(source.encoder.state_dict())
    torch.testing.assert_close(model.encoder(model.input_adapter(ids)), source.encoder(source.input_adapter(ids)))
    assert model(ids).shape == (2, 3)


def test_any_query_and_output():
    core = encoder()
    model = PerceiverIO(nn.Identity(), core, TrainableQueries(4, 10),
                        PerceiverDecoder(PerceiverDecoderConfig(2), 16, 10), LinearOutput(10, 3))
    assert model(torch.randn(2, 9, 11)).shape == (2, 4, 3)
    assert model.decoder(torch.randn(2, 1000, 10), core(torch.randn(2, 9, 11))).shape == (2, 1000, 10)


def test_initial_weights_have_the_configured_scale():
    for scale in (0.02, 0.1):
        config = ImageClassifierConfig(64, 128, PerceiverEncoderConfig(1, init_scale=scale),
                                       PerceiverDecoderConfig(1, init_scale=scale), 10, ImageInputConfig((9, 9, 3)))
        for name, parameter in config.build().named_parameters():
            if parameter.ndim > 1:
                assert parameter.std().item() == pytest.approx(scale, rel=0.3), name
            elif "bias" in name:
                assert not parameter.any(), name


def test_memory_never_holds_all_scores():
    """512 latents and 2^20 inputs have 2 GB of scores. The heads have 5 and 15 channels, which kernels do not support
    without padding. One forward has a mask."""
    script = """
import resource, torch
from perceiver.model import PerceiverEncoder, PerceiverEncoderConfig
config = PerceiverEncoderConfig(1, 5, 15, num_self_attention_layers_per_block=1)
model, x = PerceiverEncoder(config, 512, 16, 6), torch.randn(1, 2**20, 6)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pad_mask = torch.arange(2**20)[None] > 10**6
with torch.no_grad():
    model(x)
    model(x, pad_mask)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
                          cwd=ROOT)
    assert int(done.stdout or 10**9) < 500, done.stderr  # MiB


@pytest.mark.parametrize("cls, values, message", [
    (PerceiverEncoderConfig, dict(num_cross_attention_heads=0), "num_cross_attention_heads=0 must be at least 1"),
    (PerceiverEncoderConfig, dict(num_cross_attention_layers=2), "num_cross_attention_layers=2 exceeds "
     "num_self_attention_blocks=1"),
    (PerceiverDecoderConfig, dict(num_query_channels=0), "num_query_channels=0"),
    (PerceiverDecoderConfig, dict(activation="relu"), "activation='relu' must be one of gelu, gelu_tanh"),
    (PerceiverDecoderConfig, dict(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
    (PerceiverDecoderConfig, dict(init_scale=0.0), "init_scale=0.0 must be positive"),
    (MaskedLMConfig, dict(decoder=dict(num_query_channels=64)), "decoder.num_query_channels=64"),
    (MaskedLMConfig, dict(num_latents=0), "num_latents=0 must be at least 1"),
    (MaskedLMConfig, dict(decoder=None), "decoder=None"),
])
def test_config_errors_name_key_and_value(cls, values, message):
    with pytest.raises(UserError, match=message):
        build(cls, values)


@pytest.mark.parametrize("config, message", [
    (ImageClassifierConfig(512, 1024), "encoder.num_cross_attention_heads=8 does not divide 261"),
    (TextClassifierConfig(6, 20), "encoder.num_self_attention_heads=8 does not divide 20"),
    (TextClassifierConfig(6, 32, decoder=PerceiverDecoderConfig(3)), "decoder.num_cross_attention_heads=3"),
])
def test_heads_that_do_not_divide_channels(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        config.build()
