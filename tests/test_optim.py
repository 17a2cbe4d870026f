import math

import pytest
import torch

from perceiver.config import OptimConfig
from perceiver.model import PerceiverAR, PerceiverARConfig
from perceiver.optim import build_optimizer, learning_rate, scale_and_clip
from test_model import SMALL


def test_only_matrices_decay():
    model = PerceiverAR(PerceiverARConfig(**SMALL, output_norm=True))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name or "bias" in name or "mlp.0" in name else 0.1), name


def test_learning_rate():
    config = OptimConfig(lr=1.0, warmup_steps=10, min_lr_fraction=0.1)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    config.decay_steps = 60
    assert learning_rate(35, 110, config) == pytest.approx(0.55) and learning_rate(100, 110, config) == 0.1


@pytest.mark.parametrize("max_norm", [None, 100.0, 0.5])
def test_gradients_are_scaled_then_clipped(max_norm):
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(1))]
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    norm = scale_and_clip(params, torch.tensor(0.5, dtype=torch.float64), max_norm)
    assert norm.item() == pytest.approx(2.5)
    expected = min(2.5, max_norm or math.inf)
    assert math.hypot(params[0].grad.norm(), params[1].grad.norm()) == pytest.approx(expected, rel=1e-5)
