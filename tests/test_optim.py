import math

import pytest
import torch

from perceiver.config import OptimConfig
from perceiver.model import PerceiverAR, PerceiverARConfig
from perceiver.optim import Lamb, build_optimizer, layer_matrices, learning_rate, orthogonalize, scale_and_clip
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


def test_other_schedules():
    def rates(**kwargs):
        config = OptimConfig(lr=1.0, warmup_steps=4, **kwargs)
        rates = [learning_rate(step, 120, config) for step in range(121)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        return rates

    assert set(rates(schedule="constant")[4:]) == {1.0}
    half = rates(schedule="constant_cosine")
    assert set(half[4:61]) == {1.0} and half[90] == pytest.approx(0.5) and half[120] == pytest.approx(0.0)
    assert all(a > b for a, b in zip(half[60:], half[61:]))
    steps = rates(schedule="step", milestones=(0.7, 0.85, 0.95))  # the original Perceiver: epochs 84, 102, 114 of 120
    for epoch, rate in ((4, 1.0), (83, 1.0), (84, 0.1), (101, 0.1), (102, 0.01), (113, 0.01), (114, 1e-3), (120, 1e-3)):
        assert steps[epoch] == pytest.approx(rate)


def lamb(p, grads, lr, b1, b2, eps, decay):
    """LAMB for one tensor in plain Python, after algorithm 2 of the paper."""
    p, m, v = list(p), [0.0] * len(p), [0.0] * len(p)
    for t, grad in enumerate(grads, start=1):
        update = []
        for i, g in enumerate(grad):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            update.append(m[i] / (1 - b1**t) / (math.sqrt(v[i] / (1 - b2**t)) + eps) + decay * p[i])
        norm, update_norm = (math.sqrt(sum(x * x for x in values)) for values in (p, update))
        ratio = norm / update_norm if norm > 0 and update_norm > 0 else 1.0
        p = [x - lr * ratio * u for x, u in zip(p, update)]
    return p


def lamb_model() -> torch.nn.Linear:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    torch.nn.init.normal_(model.weight, std=5)  # a large trust ratio
    torch.nn.init.zeros_(model.bias)
    return model


def test_lamb_is_the_papers_formula():
    config = OptimConfig(name="lamb", lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    model, start = lamb_model(), lamb_model()
    optimizer = build_optimizer(model, config)
    grads = {name: torch.randn(4, *p.shape).double() for name, p in model.named_parameters()}
    grads["bias"][3] = 0
    for step in range(4):
        if step == 2:  # resumes from the saved state
            state = optimizer.state_dict()
            optimizer = build_optimizer(model, config)
            optimizer.load_state_dict(state)
        for name, p in model.named_parameters():
            p.grad = grads[name][step].clone()
        optimizer.step()
    for name, p in start.named_parameters():
        decay = 0.1 if name == "weight" else 0.0
        expected = lamb(p.flatten().tolist(), grads[name].flatten(1).tolist(), 0.1, 0.9, 0.99, 1e-6, decay)
        assert getattr(model, name).flatten().tolist() == pytest.approx(expected, rel=1e-12), name


def test_lamb_does_not_change_parameters_without_gradients():
    model = lamb_model()
    model.bias.requires_grad = False
    optimizer = build_optimizer(model, OptimConfig(name="lamb"))
    optimizer.step()
    assert isinstance(optimizer, Lamb) and torch.equal(model.weight, lamb_model().weight)
    model.weight.grad = torch.zeros(2, 3).double()
    optimizer.step()
    assert torch.equal(model.weight, lamb_model().weight) and model.bias not in optimizer.state


MUON = OptimConfig(name="muon", lr=0.003, muon_lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, momentum=0.95)


def train_with_muon(steps: int, save_at: int | None = None):
    """A model after steps of Muon with random gradients. At step `save_at`, a new optimizer takes over the state."""
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig(**SMALL))
    optimizer = build_optimizer(model, MUON)
    for step in range(steps):
        if step == save_at:
            state = optimizer.state_dict()
            optimizer = build_optimizer(model, MUON)
            optimizer.load_state_dict(state)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = MUON.lr / (1 + step)
        optimizer.step()
    return model


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_equals_pytorchs_muon_and_adamw(monkeypatch):
    """torch.optim.Muon computes in bfloat16; here it keeps float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig(**SMALL))
    matrices = layer_matrices(model)
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    assert len(matrices) == 6 * (1 + len(model.self_attention)) and {p.ndim for p in matrices} == {2}
    muon = torch.optim.Muon(matrices, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer, lr in ((muon, 0.02), (adamw, 0.003)):
            for group in optimizer.param_groups:
                group["lr"] = lr / (1 + step)
            optimizer.step()
    expected = dict(model.named_parameters())
    for name, parameter in train_with_muon(3).named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)


def test_muon_resumes_exactly():
    expected = train_with_muon(4).state_dict()
    for name, parameter in train_with_muon(4, save_at=2).state_dict().items():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("shape", [(2, 5, 5), (1, 3, 8), (2, 8, 3)])
def test_orthogonalized_matrices_have_singular_values_near_1(shape):
    x = torch.randn(shape, dtype=torch.float64)
    y = orthogonalize(x)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    singular = torch.linalg.svdvals(y)
    assert singular.min() > 0.6 and singular.max() < 1.3
    diagonal = u.mT @ y @ v.mT  # y has the singular vectors of x
    torch.testing.assert_close(diagonal, torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name, first, second", [("adamw", 0.89, 0.7811), ("adam", 0.9, 0.8), ("sgd", 0.79, 0.4771)])
def test_other_optimizers(name, first, second):
    """Two steps of a parameter that starts at 1, with gradient 2 and weight decay 0.1. Adam's steps have length lr."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.1, momentum=0.5))
    for expected in (first, second):
        model.weight.grad = torch.full((1, 1), 2.0)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("max_norm", [None, 100.0, 0.5])
def test_gradients_are_scaled_then_clipped(max_norm):
    params = [torch.nn.Parameter(values) for values in (torch.zeros(3), torch.zeros(2, 2), torch.ones(1))]
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    norm = scale_and_clip(params, torch.tensor(0.5, dtype=torch.float64), max_norm)
    assert norm.item() == pytest.approx(2.5)
    expected = min(2.5, max_norm or math.inf)
    assert math.hypot(params[0].grad.norm(), params[1].grad.norm()) == pytest.approx(expected, rel=1e-5)
