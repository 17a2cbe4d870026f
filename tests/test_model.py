import math

import numpy as np
import pytest
import torch

from conftest import GOLDEN
from perceiver.model import Linear, PerceiverAR, PerceiverARConfig, attend, rotary_angles, rotate, sinusoids
from perceiver.pretrained import our_key

SMALL = dict(vocab_size=19, max_seq_len=24, num_latents=8, num_channels=32, num_heads=4, num_self_attention_layers=2)


def small_model(**options) -> PerceiverAR:
    """In float64, with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig(**SMALL | {"init_scale": 0.3} | options)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            torch.nn.init.normal_(parameter)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 19, shape, generator=torch.Generator().manual_seed(1))


def krasserm_weights(data) -> dict[str, torch.Tensor]:
    weights = {our_key("perceiver_ar", key.removeprefix("param:")): torch.from_numpy(data[key].astype(np.float32))
               for key in data.files if key.startswith("param:")}
    return {key: value for key, value in weights.items() if key}


@pytest.mark.parametrize("file, options", [
    ("ar-absolute", {}),
    ("ar-rotary-only", dict(absolute_positions=False, output_norm=True, output_bias=False, num_rotary_layers=-1)),
])
def test_equals_krasserm(file, options):
    data = np.load(GOLDEN / "krasserm" / f"{file}.npz")
    model = PerceiverAR(PerceiverARConfig(**SMALL, latent_keys="q_norm", **options)).eval()
    model.load_state_dict(krasserm_weights(data))
    ids = torch.from_numpy(data["ids"])
    with torch.no_grad():
        assert np.abs(model(ids, 8).numpy() - data["logits"]).max() < 1e-4
        assert np.abs(model(ids[:, :13], 4).numpy() - data["logits_first13_prefix9"]).max() < 1e-4


GOOGLE = dict(sinusoidal_positions=True, rotary=False, bias=True, activation="squared_relu", latent_projection=True,
              output_norm=True, tied_output=False)
# Google's names, first of modules and then of parameters; Haiku counts the modules of one kind
HAIKU = [("perceiver_ar/~/", ""), ("perceiver_ar/", ""), ("embed:embeddings", "token_embedding.weight"),
         ("embed_1:embeddings", "position_embedding.weight"), ("cross_attention/layer_norm_2", "cross_attention.mlp.0"),
         ("self_attention_1/", "self_attention.1."), ("self_attention/", "self_attention.0."),
         ("cross_attention/layer_norm_1", "cross_attention.kv_norm"),
         ("cross_attention/layer_norm", "cross_attention.q_norm"), ("cross_attention/", "cross_attention."),
         ("layer_norm_1", "mlp.0"), (".layer_norm", ".norm"), ("layer_norm", "output_norm"),
         ("attention/linear_1", "attention.k"), ("attention/linear_2", "attention.v"),
         ("attention/linear_3", "attention.out"), ("attention/linear", "attention.q"), ("dense/linear_1", "mlp.3"),
         ("dense/linear", "mlp.1"), ("linear", "latent_projection"), ("logits:w", "output_weight"),
         ("logits:b", "output_bias"), (":w", ".weight"), (":scale", ".weight"), (":b", ".bias"), (":offset", ".bias")]


def google_weights(data) -> dict[str, torch.Tensor]:
    weights = {}
    for key in data.files:
        if not key.startswith("param:"):
            continue
        name, values = key.removeprefix("param:"), data[key].astype(np.float32)
        for theirs, ours in HAIKU:
            name = name.replace(theirs, ours)
        weights[name] = torch.from_numpy(values.T if key.endswith(":w") else values)
    weights["position_embedding.weight"] = weights["position_embedding.weight"][1:]  # their first position is 1
    return weights


def test_equals_google():
    """Rows of 24, 15 and 6 tokens, theirs padded on the right and ours on the left; the last with fewer than N.

    The golden weights come with a table of positions in the place of sinusoids, which have a test of their own.
    """
    data = np.load(GOLDEN / "perceiver-ar-google" / "absolute.npz")
    model = PerceiverAR(PerceiverARConfig(**SMALL, **GOOGLE | dict(sinusoidal_positions=False))).eval()
    model.load_state_dict(google_weights(data))
    lengths = (data["ids"] > 0).sum(1)
    ids = torch.stack([torch.from_numpy(row).long().roll(24 - n) for row, n in zip(data["ids"], lengths.tolist())])
    with torch.no_grad():
        logits = model(ids, 8, ids == 0).numpy()
        alone = [model(row[None, -n:])[0].numpy() for row, n in zip(ids, lengths)]
    valid = data["latent_positions"] >= 0
    assert valid.sum(1).tolist() == [8, 8, 6]
    assert np.abs(logits - data["logits"])[valid].max() < 1e-4
    assert np.abs(np.concatenate(alone) - data["logits"][valid]).max() < 1e-4


def test_sinusoids_are_exact_at_the_end_of_a_long_context():
    """Against math.sin of Python floats."""
    features = sinusoids(torch.tensor([[1, 77, 131_072]]), 64, torch.float32)
    for row, position in zip(features[0].tolist(), (1, 77, 131_072)):
        angles = [position * math.exp(-math.log(10_000) * i / 31) for i in range(32)]
        assert row == pytest.approx([f(angle) for f in (math.sin, math.cos) for angle in angles], abs=1e-6)


def test_sinusoidal_positions_are_not_in_the_weights_and_count_from_one():
    """A table of them in the place of learned positions makes the same model."""
    fixed, table = (small_model(**GOOGLE | dict(sinusoidal_positions=fixed)) for fixed in (True, False))
    assert table.state_dict().keys() - fixed.state_dict().keys() == {"position_embedding.weight"}
    positions = sinusoids(torch.arange(1, 25)[None], 32, torch.float64)[0]
    table.load_state_dict(fixed.state_dict() | {"position_embedding.weight": positions})
    assert (fixed(tokens(2, 20)) - table(tokens(2, 20))).abs().max() < 1e-12


def test_recipe_has_the_published_size():
    with torch.device("meta"):
        model = PerceiverAR(PerceiverARConfig())
    assert sum(p.numel() for p in model.parameters()) == 30_563_078


@pytest.mark.parametrize("latent_keys", ["kv_norm", "q_norm"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_token_changes_no_earlier_logit(latent_keys, absolute):
    model = small_model(latent_keys=latent_keys, absolute_positions=absolute)
    ids = tokens(2, 24)
    before = model(ids, 8)
    for changed in range(16, 24):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 19
        after = model(other, 8)
        latent = changed - 16
        assert torch.equal(before[:, :latent], after[:, :latent])
        assert (before[:, latent:] != after[:, latent:]).any(-1).all()


def test_the_prefix_is_seen_by_every_latent():
    model = small_model()
    ids = tokens(1, 24)
    for changed in range(16):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 19
        assert (model(ids, 8) != model(other, 8)).any(-1).all()


@pytest.mark.parametrize("latent_keys", ["kv_norm", "q_norm"])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("length", [24, 13, 5])
def test_left_padding_changes_nothing(latent_keys, absolute, length):
    """Also with fewer tokens than latents, where padding reaches into the latents."""
    model = small_model(latent_keys=latent_keys, absolute_positions=absolute, num_rotary_layers=-1)
    ids = tokens(2, 24)
    ids[1, 24 - length :] = ids[0, :length]
    pad_mask = torch.zeros(2, 24, dtype=torch.bool)
    pad_mask[1, : 24 - length] = True
    padded = model(ids, 8, pad_mask)
    n = min(8, length)
    assert torch.isfinite(padded).all()
    assert (padded[1, -n:] - model(ids[:1, :length], n)[0]).abs().max() < 1e-10
    assert (padded[0] - model(ids[:1], 8)[0]).abs().max() < 1e-10


def test_dropped_prefix_positions_are_as_if_masked():
    model = small_model()
    ids, keep = tokens(2, 24), torch.tensor([[0, 3, 4, 9], [15, 2, 1, 7]])
    result = model(ids, 8, prefix_keep=keep)
    pad_mask = torch.ones(2, 24, dtype=torch.bool)
    pad_mask[:, 16:] = False
    pad_mask.scatter_(1, keep, False)
    mask = ~pad_mask[:, None, None, :]
    reference = forward_with_key_mask(model, ids, mask)
    assert (result - reference).abs().max() < 1e-10


def forward_with_key_mask(model, ids, mask):
    """The model written out once more, plainly: all keys computed, then masked; softmax by hand."""
    c = model.config
    positions = torch.arange(ids.shape[1])[None]
    x = model.token_embedding(ids) + model.position_embedding(positions)
    angles = rotary_angles(positions, c.num_rotary_channels, x.dtype)

    def attention(module, q_in, kv_in, q_angles, k_angles, allowed):
        q, k, v = (f(y).unflatten(-1, (c.num_heads, -1)).transpose(1, 2)
                   for f, y in ((module.q, q_in), (module.k, kv_in), (module.v, kv_in)))
        if q_angles is not None:
            q, k = rotate(q, q_angles), rotate(k, k_angles)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
        return module.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    latents, layer = x[:, 16:], model.cross_attention
    allowed = mask & torch.ones(8, 24, dtype=torch.bool).tril(16)
    last = tuple(a[:, :, 16:] for a in angles)
    latents = latents + attention(layer.attention, layer.q_norm(latents), layer.kv_norm(x), last, angles, allowed)
    latents = latents + layer.mlp(latents)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    for i, layer in enumerate(model.self_attention):
        h = layer.norm(latents)
        turned = last if i < c.num_rotary_layers else None
        latents = latents + attention(layer.attention, h, h, turned, turned, causal)
        latents = latents + layer.mlp(latents)
    return latents @ model.token_embedding.weight.T + model.output_bias


def test_prefix_dropout_removes_work_in_training_only():
    model = small_model(cross_attention_dropout=0.75)
    seen = []
    model.cross_attention.kv_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    ids = tokens(2, 24)
    assert torch.equal(model(ids, 8), model(ids, 8))
    model.train()
    assert not torch.equal(model(ids, 8), model(ids, 8))
    assert seen == [24, 24, 4 + 8, 4 + 8]


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = small_model(activation_checkpointing=checkpointing, residual_dropout=0.1, post_attention_dropout=0.1)
        model.train()
        torch.manual_seed(3)
        model(tokens(2, 24), 8).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("length, num_latents", [(25, 8), (24, 9), (4, 5), (4, 0)])
def test_impossible_shapes_are_errors(length, num_latents):
    with pytest.raises(ValueError, match="num_latents|max_seq_len"):
        small_model()(tokens(1, length), num_latents)


@pytest.mark.parametrize("options", [dict(num_latents=25), dict(num_heads=5), dict(num_channels=12),
                                     dict(num_rotary_layers=3), dict(cross_attention_dropout=1.0),
                                     dict(latent_keys="both"), dict(vocab_size=0), dict(activation="relu"),
                                     dict(sinusoidal_positions=True, absolute_positions=False), dict(z_loss=-1.0)])
def test_impossible_configs_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PerceiverARConfig(**SMALL | options)


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    result = attend(q, k, v, mask)
    assert (result[:, :, 1] == 0).all() and (result[:, :, 0] != 0).all()
    result.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_memory_of_a_long_context_is_linear():
    """One layer with 8 latents on 200,000 tokens: a context x context mask would take 40 GB."""
    model = PerceiverAR(PerceiverARConfig(**SMALL | dict(max_seq_len=200_000, num_channels=8, num_heads=1)))
    model(tokens(1, 200_000), 8).sum().backward()
    assert torch.isfinite(model.token_embedding.weight.grad).all()


def test_rotary_scores_depend_on_distance_alone():
    x = torch.randn(1, 1, 2, 8, dtype=torch.float64)
    scores = []
    for shift in (0, 1000):
        q, k = rotate(x, rotary_angles(torch.tensor([[3, 10]]) + shift, 8, torch.float64))[0, 0]
        scores.append(q @ k)
    assert abs(scores[0] - scores[1]) < 1e-9


def test_positions_are_exact_in_bfloat16():
    """Angles made in bfloat16 would be the same for positions 256 and 257."""
    cos, _ = rotary_angles(torch.tensor([[256, 257]]), 2, torch.bfloat16)
    expected = torch.tensor([256.0, 257.0]).cos()
    assert (cos[0, 0, :, 0].float() - expected).abs().max() < 0.01


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("outputs", [1, 7, 48, 262])
@pytest.mark.parametrize("bias", [True, False])
def test_the_products_of_decoding_are_those_of_a_linear_map(rows, outputs, bias):
    layer = Linear(10, outputs, bias).double()
    x = torch.randn(rows, 3, 10, dtype=torch.float64)[:, 1:2]  # strided, as a part of something larger is
    assert (layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)).abs().max() < 1e-12
