import numpy as np
import pytest
import torch

from conftest import GOLDEN
from perceiver.attention import rotary_angles, rotate, sinusoids
from perceiver.config import build
from perceiver.errors import UserError
from perceiver.model import PerceiverAR, PerceiverARConfig, draw_prefix_keep
from perceiver.pretrained import rename_key

SMALL = dict(vocab_size=19, max_seq_len=24, num_latents=8, num_channels=32, num_heads=4, num_self_attention_layers=2)


def small_model(**options) -> PerceiverAR:
    """A small model in float64. Its weights are so large that every part matters."""
    torch.manual_seed(0)
    if "architecture" not in options:
        options = {"init_scale": 0.3} | options
    model = PerceiverAR(PerceiverARConfig(**SMALL | options)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            torch.nn.init.normal_(parameter)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 19, shape, generator=torch.Generator().manual_seed(1))


def krasserm_weights(data) -> dict[str, torch.Tensor]:
    weights = {rename_key(key.removeprefix("param:")): torch.from_numpy(data[key].astype(np.float32))
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


GOOGLE = dict(architecture="google")
NGRAMS = dict(ngram_sizes=(2, 4), num_ngram_buckets=50)
# Replacements that turn Google's names into ours. Haiku numbers the modules of one kind: linear, linear_1, ...
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
    return weights


def test_equals_google(monkeypatch):
    """The rows have 24, 15 and 6 tokens; the last one has fewer than N. Google pads on the right, we pad on the left.

    The golden model has a table of positions instead of sinusoids. Sinusoids have tests of their own.
    """
    data = np.load(GOLDEN / "perceiver-ar-google" / "absolute.npz")
    weights = google_weights(data)
    table = weights.pop("position_embedding.weight")
    monkeypatch.setattr("perceiver.model.sinusoids", lambda positions, *_: table[positions])
    model = PerceiverAR(PerceiverARConfig(**SMALL, **GOOGLE)).eval()
    model.load_state_dict(weights)
    lengths = (data["ids"] > 0).sum(1)
    ids = torch.stack([torch.from_numpy(row).long().roll(24 - n) for row, n in zip(data["ids"], lengths.tolist())])
    with torch.no_grad():
        logits = model(ids, 8, ids == 0).numpy()
        alone = [model(row[None, -n:])[0].numpy() for row, n in zip(ids, lengths)]
    valid = data["latent_positions"] >= 0
    assert valid.sum(1).tolist() == [8, 8, 6]
    assert np.abs(logits - data["logits"])[valid].max() < 1e-4
    assert np.abs(np.concatenate(alone) - data["logits"][valid]).max() < 1e-4


def test_google_adds_sinusoids_that_count_from_one():
    model = small_model(**GOOGLE)
    seen = []
    model.cross_attention.kv_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens(2, 20))
    expected = model.token_embedding(tokens(2, 20)) + sinusoids(torch.arange(1, 21)[None], 32, torch.float64)
    assert torch.equal(seen[0], expected)


def test_google_starts_with_its_own_initialization():
    """The standard deviation is 1 for embeddings and 1 / sqrt(inputs) for linear maps. Outputs and biases are zero."""
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig(vocab_size=259, num_channels=128, num_self_attention_layers=1, **GOOGLE))
    assert model.token_embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    assert not model(tokens(1, 9)).any()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(module.in_features**-0.5, rel=0.05)
            assert not module.bias.any()


def test_the_default_model_has_the_published_size():
    with torch.device("meta"):
        model = PerceiverAR(PerceiverARConfig(vocab_size=262))
    assert sum(p.numel() for p in model.parameters()) == 30_563_078


KINDS = [dict(latent_keys="kv_norm"), dict(latent_keys="q_norm"), NGRAMS]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_token_changes_no_earlier_logit(options, absolute):
    model = small_model(absolute_positions=absolute, **options)
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


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("length", [24, 13, 5])
def test_left_padding_changes_nothing(options, absolute, length):
    """This holds even with fewer tokens than latents, when some latents are padding."""
    model = small_model(absolute_positions=absolute, num_rotary_layers=-1, **options)
    ids = tokens(2, 24)
    ids[1, 24 - length :] = ids[0, :length]
    pad_mask = torch.zeros(2, 24, dtype=torch.bool)
    pad_mask[1, : 24 - length] = True
    padded = model(ids, 8, pad_mask)
    n = min(8, length)
    assert torch.isfinite(padded).all()
    assert (padded[1, -n:] - model(ids[:1, :length], n)[0]).abs().max() < 1e-10
    assert (padded[0] - model(ids[:1], 8)[0]).abs().max() < 1e-10


@pytest.mark.parametrize("options", [dict(), NGRAMS])
def test_dropped_prefix_positions_are_as_if_masked(options):
    """The n-grams are those of the whole text, as when the model generates."""
    model = small_model(**options)
    ids, keep = tokens(2, 24), torch.tensor([[0, 3, 4, 9], [15, 2, 1, 7]])
    result = model(ids, 8, prefix_keep=keep)
    pad_mask = torch.ones(2, 24, dtype=torch.bool)
    pad_mask[:, 16:] = False
    pad_mask.scatter_(1, keep, False)
    mask = ~pad_mask[:, None, None, :]
    reference = forward_with_key_mask(model, ids, mask)
    assert (result - reference).abs().max() < 1e-10


def forward_with_key_mask(model, ids, mask):
    """The logits of the model, in a second, plain implementation: it computes all keys and masks some of them."""
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
    last = angles[..., 16:, :]
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
                                     dict(num_rotary_layers=3), GOOGLE | dict(output_norm=True),
                                     GOOGLE | dict(num_heads=3, num_channels=9)])
def test_impossible_configs_are_errors(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        PerceiverARConfig(**SMALL | options)


@pytest.mark.parametrize("options", [dict(cross_attention_dropout=1.0), dict(latent_keys="both"), dict(vocab_size=0),
                                     dict(architecture="openai"), dict(num_rotary_layers=-2), dict(z_loss=-1.0)])
def test_impossible_values_are_errors(options):
    with pytest.raises(UserError, match=next(iter(options))):
        build(PerceiverARConfig, SMALL | options)


def test_the_vocabulary_must_be_known():
    with pytest.raises(ValueError, match="vocab_size=None"):
        PerceiverARConfig().build()


def test_a_random_prefix_keeps_different_positions_in_every_row():
    kept = draw_prefix_keep(64, 20, 0.75, torch.Generator().manual_seed(0))
    assert kept.shape == (64, 5) and (kept.diff() > 0).all()
    assert len({tuple(row) for row in kept.tolist()}) > 60
    assert set(kept.flatten().tolist()) == set(range(20))
    assert torch.equal(kept, draw_prefix_keep(64, 20, 0.75, torch.Generator().manual_seed(0)))
    assert torch.equal(draw_prefix_keep(1, 7, 0.1), torch.arange(7)[None])  # 0.7 dropped positions round down to none


def test_memory_of_a_long_context_is_linear():
    """The context has 200,000 tokens, and there are 8 latents. A mask of context x context would take 40 GB."""
    model = PerceiverAR(PerceiverARConfig(**SMALL | dict(max_seq_len=200_000, num_channels=8, num_heads=1)))
    model(tokens(1, 200_000), 8).sum().backward()
    assert torch.isfinite(model.token_embedding.weight.grad).all()
