import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from perceiver.attention import (
    Attention,
    LayerCache,
    Linear,
    Unprojected,
    attend,
    has_fast_onednn,
    onednn_products,
    rotary_angles,
    rotate,
    sinusoids,
)
from perceiver.model import MLP


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    result = attend(q, k, v, mask)
    assert (result[:, :, 1] == 0).all() and (result[:, :, 0] != 0).all()
    result.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("n, m", [(3, 3), (3, 7), (1, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_queries_align_with_the_last_keys(n, m, masked):
    """Query i sees keys 0 .. M - N + i. It attends to them as if there were no other keys."""
    q, k, v = torch.randn(2, 1, n, 4), torch.randn(2, 1, m, 4), torch.randn(2, 1, m, 4)
    mask = torch.ones(2, 1, 1, m, dtype=torch.bool)
    mask[1, ..., 0] = not masked
    result = attend(q, k, v, mask if masked else None, causal=True)
    for i in range(n):
        seen = m - n + i + 1
        expected = attend(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], mask[..., :seen])
        torch.testing.assert_close(result[:, :, i : i + 1], expected)


@pytest.mark.parametrize("mask, causal", [(False, False), (True, False), (True, True), (False, True)])
def test_dropout_hides_the_same_weights_in_every_column_of_the_values(mask, causal):
    """With the identity as values, the result is the attention weights after dropout."""
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    mask = torch.rand(2, 1, 1, 5) < 0.7 if mask else None
    weights = attend(q, k, torch.eye(5).expand(2, 3, 5, 5), mask, causal)
    dropped = attend(q, k, torch.eye(5).expand(2, 3, 5, 5), mask, causal, dropout=0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    assert 0.5 < (kept.sum() / (weights != 0).sum()) < 0.95


@pytest.mark.parametrize("n, m, causal", [(5, 9, False), (5, 9, True), (9, 9, True), (1000, 1100, True)])
@pytest.mark.parametrize("qk, value", [(4, 12), (12, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_and_values_of_unequal_widths(n, m, causal, qk, value, masked):
    """Few weights take plain products, many take the fast kernel with padded heads."""
    q, k, v = (torch.randn(1, 2, *shape, dtype=torch.float64) for shape in ((n, qk), (m, qk), (m, value)))
    visible = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else torch.ones(n, m, dtype=torch.bool)
    mask = None
    if masked:
        mask = torch.rand(1, 1, 1, m) < 0.7
        mask[..., 0] = True
        visible = visible & mask
    expected = (q @ k.mT / qk**0.5).masked_fill(~visible, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, mask, causal), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Attention without projections


def plain_attention(layer: Attention, norm: nn.LayerNorm, x_q, x_kv, mask=None, dropout=0.0):
    """The definition of attention, projections first. Fully masked queries get zeros."""
    heads = (layer.num_heads, -1)
    x_kv = norm(x_kv)
    q = layer.q(x_q).unflatten(-1, heads).transpose(1, 2)
    k = layer.k(x_kv).unflatten(-1, heads).transpose(1, 2)
    v = layer.v(x_kv).unflatten(-1, heads).transpose(1, 2)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    x = F.dropout(weights, dropout) @ v
    return layer.out(x.transpose(1, 2).flatten(-2))


def long_and_short(long: str, num_heads=1, bias=True, num_others=3, dtype=torch.float64):
    """Attention whose keys ("inputs") or queries ("queries") are many, with its norm: (layer, norm, x_q, x_kv)."""
    torch.manual_seed(0)
    layer = Attention(13, 11, num_heads, 24, 16, qkv_bias=bias, out_bias=bias).to(dtype)
    norm = nn.LayerNorm(11).to(dtype)
    for parameter in [*layer.parameters(), *norm.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    n, m = (num_others, 70) if long == "inputs" else (70, num_others)
    x_q = torch.randn(2, n, 13, dtype=dtype, requires_grad=True)
    x_kv = torch.randn(2, m, 11, dtype=dtype, requires_grad=True)
    return layer, norm, x_q, x_kv


@pytest.mark.parametrize("long", ["inputs", "queries"])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_without_projections_is_exact(long, num_heads, bias, dropout, masked, monkeypatch):
    """Output and all gradients equal the definition, to rounding in float64."""
    layer, norm, x_q, x_kv = long_and_short(long, num_heads, bias)
    layer.dropout = dropout
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, x_kv.shape[1]) < 0.6
        mask[1] = False  # fully masked: the output is the bias
    inputs = [x_q, x_kv, *layer.parameters(), *norm.parameters()]

    def run(attention):
        torch.manual_seed(1)
        y = attention()
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    moved = []
    for name in ("attend_to_unprojected", "attend_from_unprojected"):
        method = getattr(Attention, name)
        monkeypatch.setattr(Attention, name, lambda *args, f=method, name=name: moved.append(name) or f(*args))
    results = run(lambda: layer(x_q, x_kv, mask, kv_norm=norm))
    assert moved == ["attend_to_unprojected" if long == "inputs" else "attend_from_unprojected"]
    for result, expected in zip(results, run(lambda: plain_attention(layer, norm, x_q, x_kv, mask, dropout))):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("long", ["inputs", "queries"])
@pytest.mark.parametrize("autocast", [True, False])
def test_attention_without_projections_rounds_no_more_in_bfloat16(long, autocast, monkeypatch):
    layer, norm, x_q, x_kv = long_and_short(long, num_others=16, dtype=torch.float32)
    exact = plain_attention(layer.double(), norm.double(), x_q.double(), x_kv.double())
    dtype = torch.float32 if autocast else torch.bfloat16
    layer.to(dtype), norm.to(dtype)

    def error(pays):
        monkeypatch.setattr(Attention, "moving_pays", lambda self, x, num_others: pays and x.shape[1] == 70)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            y = layer(x_q.to(dtype), x_kv.to(dtype), kv_norm=norm)
        return ((y - exact).norm() / exact.norm()).item()

    assert error(True) < 1.5 * error(False) < 0.05


def test_inputs_without_gradients_get_none():
    layer, norm, x_q, x_kv = long_and_short("inputs")
    kv = layer.keys_values(x_kv.detach(), norm, num_queries=3)
    assert isinstance(kv, Unprojected) and not kv.x.requires_grad and kv.key_weight.requires_grad


@pytest.mark.parametrize("long", ["inputs", "queries"])
@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("num_others", [1, 3, 20, 60])
def test_attention_takes_the_way_with_fewer_operations(long, num_heads, num_others, monkeypatch):
    def operations():
        layer, norm, x_q, x_kv = long_and_short(long, num_heads, num_others=num_others)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.to("meta")(x_q.to("meta"), x_kv.to("meta"), kv_norm=norm.to("meta"))
        return counter.get_total_flops()

    chosen = operations()
    ways = []
    for pays in (False, True):
        monkeypatch.setattr(Attention, "moving_pays", lambda self, x, num_others, pays=pays: pays and x.shape[1] == 70)
        ways.append(operations())
    assert chosen <= 1.1 * min(ways)  # the padding of the heads does not count in the choice


def test_positions_of_keys_need_projected_keys():
    layer, norm, x_q, x_kv = long_and_short("inputs")
    angles = rotary_angles(torch.arange(70)[None], 4, torch.float64)
    result = layer(x_q, x_kv, rotary=angles, kv_norm=norm)
    q = rotate(layer.q(x_q)[:, None], angles)
    k = rotate(layer.k(norm(x_kv))[:, None], angles)
    expected = layer.out(((q @ k.mT / 24**0.5).softmax(-1) @ layer.v(norm(x_kv))[:, None])[:, 0])
    torch.testing.assert_close(result, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding and positions


def test_a_decoding_step_in_bfloat16_rounds_no_more_than_its_cache():
    """The keys and values are bfloat16, the scores and weights are not: the error is that of the result's rounding."""
    torch.manual_seed(0)
    q, k, v = (4 * torch.randn(2, 4, length, 64, dtype=torch.bfloat16) for length in (1, 300, 300))
    cache = LayerCache(k.clone(), v.mT.clone(), at=(slice(None), slice(299, 300)), num_read=300)
    result = cache.attend(q, k[:, :, -1:], v[:, :, -1:], scale=64**-0.5)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert ((result - exact).norm() / exact.norm()).item() < 2**-8


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="num_heads=3 does not divide 16, the num_v_channels"):
        Attention(8, 8, 3, 12, 16)


def test_rotary_scores_depend_on_distance_alone():
    x = torch.randn(1, 1, 2, 8, dtype=torch.float64)
    scores = []
    for shift in (0, 1000):
        q, k = rotate(x, rotary_angles(torch.tensor([[3, 10]]) + shift, 8, torch.float64))[0, 0]
        scores.append(q @ k)
    assert abs(scores[0] - scores[1]) < 1e-9


@pytest.mark.parametrize("num_rotary, width", [(8, 8), (4, 8), (4, 7)])
@pytest.mark.parametrize("transposed", [True, False])
def test_rotation_equals_its_definition(num_rotary, width, transposed):
    """The ways for complex numbers, for other memory layouts and for torch.compile agree with the rotation matrix."""
    x = torch.randn(2, 5, 3, width).transpose(1, 2) if transposed else torch.randn(2, 3, width, 5).mT
    angles = rotary_angles(torch.arange(5)[None], num_rotary, torch.float32)
    expected = x.clone()
    for pair in range(num_rotary // 2):
        cos, sin = angles[:, 0, 0, :, pair]
        a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
        expected[..., 2 * pair] = a * cos - b * sin
        expected[..., 2 * pair + 1] = a * sin + b * cos
    torch.testing.assert_close(rotate(x, angles), expected)
    torch.testing.assert_close(torch.compile(rotate, backend="eager", fullgraph=True)(x, angles), expected)


def test_positions_are_exact_in_bfloat16():
    """Angles computed in bfloat16 would be equal for positions 256 and 257."""
    cos, _ = rotary_angles(torch.tensor([[256, 257]]), 2, torch.bfloat16)
    expected = torch.tensor([256.0, 257.0]).cos()
    assert (cos[0, 0, :, 0].float() - expected).abs().max() < 0.01


def test_sinusoids_are_exact_at_the_end_of_a_long_context():
    """Compares with math.sin and math.cos of Python floats."""
    features = sinusoids(torch.tensor([[1, 77, 131_072]]), 64, torch.float32)
    for row, position in zip(features[0].tolist(), (1, 77, 131_072)):
        angles = [position * math.exp(-math.log(10_000) * i / 31) for i in range(32)]
        assert row == pytest.approx([f(angle) for f in (math.sin, math.cos) for angle in angles], abs=1e-6)


def test_long_sinusoids_equal_those_of_their_parts():
    positions = torch.arange(10_000)[None]
    whole = sinusoids(positions, 6, torch.float32)
    parts = [sinusoids(positions[:, start : start + 1000], 6, torch.float32) for start in range(0, 10_000, 1000)]
    assert torch.equal(whole, torch.cat(parts, dim=1))


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("outputs", [1, 7, 48, 262])
@pytest.mark.parametrize("bias", [True, False])
def test_our_linear_equals_pytorchs(rows, outputs, bias):
    layer = Linear(10, outputs, bias).double()
    x = torch.randn(rows, 3, 10, dtype=torch.float64)[:, 1:2]  # strided, like a slice of a larger tensor
    assert (layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)).abs().max() < 1e-12


def gradients(y, *tensors):
    torch.manual_seed(1)
    return torch.autograd.grad(y, tensors, torch.randn(y.shape).to(y.dtype))


@pytest.mark.parametrize("rows", [1, 20, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("before", [nn.LayerNorm(10), nn.GELU(), nn.Identity()])
def test_gradients_of_our_linear_equal_pytorchs(rows, bias, before):
    before = deepcopy(before).double()
    layer = Linear(10, 48, bias).double()
    x = torch.randn(2, rows, 10, dtype=torch.float64, requires_grad=True)
    tensors = (x, *layer.parameters(), *before.parameters())
    expected = F.linear(before(x), layer.weight, layer.bias)
    y = layer(x, before)
    assert (y - expected).abs().max() < 1e-12
    for a, b in zip(gradients(y, *tensors), gradients(expected, *tensors), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_our_linear_computes_only_gradients_that_are_needed():
    norm, layer = nn.LayerNorm(10), Linear(10, 48)
    x = torch.randn(2, 20, 10)
    norm.weight.requires_grad = layer.weight.requires_grad = False
    layer(x, norm).sum().backward()
    assert x.grad is norm.weight.grad is layer.weight.grad is None
    assert norm.bias.grad.abs().sum() > 0 and (layer.bias.grad == 40).all()


def test_our_linear_under_autocast_equals_pytorchs():
    norm, layer = nn.LayerNorm(10), Linear(10, 48)
    x = torch.randn(2, 20, 10, requires_grad=True)
    tensors = (x, *layer.parameters(), *norm.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, norm)
        expected = F.linear(norm(x), layer.weight, layer.bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    for tensor, a, b in zip(tensors, gradients(y, *tensors), gradients(expected, *tensors)):
        assert a.dtype == tensor.dtype
        assert (a - b).abs().max() <= 0.01 * b.abs().max()


@pytest.mark.parametrize("autocast", [True, False])
def test_training_keeps_neither_weights_nor_what_is_cheap_to_compute(autocast):
    """Of an MLP, only the inputs and what enters the activation."""
    mlp = MLP(64, 4)
    x = torch.randn(2, 30, 64, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = mlp(x)
    parameters = {parameter.data_ptr() for parameter in mlp.parameters()}
    shapes = sorted(tuple(tensor.shape) for place, tensor in kept.items() if place not in parameters)
    assert shapes == [(2, 30, 64), (2, 30, 256)]
    y.float().sum().backward()


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this version of torch has no switch")
def test_onednns_products_are_float32(monkeypatch):
    """`linear` takes them only where they are fast. Here it must; a CPU without AVX-512 then falls back to MKL."""
    seen = []
    monkeypatch.setattr("perceiver.attention.has_fast_onednn", lambda: True)
    monkeypatch.setattr("perceiver.attention.onednn_products", lambda: seen.append(1) or onednn_products())
    layer = Linear(100, 48)
    exact = deepcopy(layer).double()
    x = torch.randn(4, 30, 100, requires_grad=True)
    x_exact = x.detach().double().requires_grad_()
    tensors = (layer(x), *gradients(layer(x), x, *layer.parameters()))
    assert len(seen) == 3  # two forward passes and a backward pass
    expected = (exact(x_exact), *gradients(exact(x_exact), x_exact, *exact.parameters()))
    for a, b in zip(tensors, expected, strict=True):
        assert (a - b).abs().max() < 3e-6 * b.abs().max()
    assert len(seen) == 3  # float64 does without
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # the switch is back


@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": True, "avx512_fp16": True}])
def test_onednn_is_not_taken_on_other_cpus(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert not has_fast_onednn.__wrapped__()


def test_onednn_is_not_taken_if_it_rounds_to_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr("perceiver.attention.onednn_products", lambda: torch.autocast("cpu", torch.bfloat16))
    assert not has_fast_onednn.__wrapped__()


@pytest.mark.parametrize("n, m, causal", [(100, 100, True), (60, 200, True), (60, 200, False)])
def test_attention_in_bfloat16_rounds_little_more_than_pytorchs(n, m, causal):
    """On the CPU it has plain products, which also round the scores."""
    q, k, v = (torch.randn(2, 4, length, 64).bfloat16() for length in (n, m, m))
    exact = attend(q.double(), k.double(), v.double(), causal=causal)
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else None
    error = (attend(q, k, v, causal=causal) - exact).abs().mean()
    assert error < 2.5 * (F.scaled_dot_product_attention(q, k, v, mask) - exact).abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v, causal=causal), attend(q, k.float(), v.float(), causal=causal))
