import math

import pytest
import torch

from perceiver.attention import Attention, Linear, attend, rotary_angles, rotate, sinusoids


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


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("outputs", [1, 7, 48, 262])
@pytest.mark.parametrize("bias", [True, False])
def test_our_linear_equals_pytorchs(rows, outputs, bias):
    layer = Linear(10, outputs, bias).double()
    x = torch.randn(rows, 3, 10, dtype=torch.float64)[:, 1:2]  # strided, like a slice of a larger tensor
    assert (layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)).abs().max() < 1e-12
