"""Optimizers with their parameter groups, learning-rate schedules, and gradient clipping."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from perceiver.config import OptimConfig


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962, algorithm 2) as in optax, which Perceiver IO's recipes use (DeepMind's train/utils.py).

    Adam's update with bias correction, plus weight decay, times a trust ratio: the norm of the parameter tensor over
    the norm of its update. The ratio has no bounds. It is 1 if one norm is 0, as for zero biases in the first step.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "step": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p: nn.Parameter, group: dict):
        """Updates one parameter tensor in place."""
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        mean = state["exp_avg"]
        mean_square = state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        mean.lerp_(p.grad, 1 - beta1)
        mean_square.mul_(beta2)
        mean_square.addcmul_(p.grad, p.grad, value=1 - beta2)

        bias_correction1 = 1 - beta1 ** group["step"]
        bias_correction2 = 1 - beta2 ** group["step"]
        root = (mean_square / bias_correction2).sqrt()
        update = mean / bias_correction1 / (root + group["eps"])
        update.add_(p, alpha=group["weight_decay"])
        norm = p.norm()
        update_norm = update.norm()
        both = (norm > 0) & (update_norm > 0)
        trust_ratio = torch.where(both, norm / update_norm, 1.0)
        p.add_(update * trust_ratio, alpha=-group["lr"])


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer for the parameters that require gradients.

    Weight decay applies to tensors of two or more dimensions (weights, embeddings, latents, positions), not to biases
    and norms, as in DeepMind's ImageNet recipe.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum, fused=True)
    options = config.lr, config.betas, config.eps
    if config.name == "lamb":
        return Lamb(groups, *options)
    if config.name == "adam":
        return torch.optim.Adam(groups, *options, fused=True)
    return torch.optim.AdamW(groups, *options, fused=True)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then `config.schedule`, then its last value."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    end = config.decay_steps or max_steps
    if config.schedule == "step":
        passed = sum(step >= milestone * end for milestone in config.milestones)
        return config.lr * 0.1**passed
    start = warmup
    if config.schedule == "constant_cosine":
        start = max(warmup, end / 2)
    progress = (step - start) / max(1, end - start)
    progress = min(1.0, max(0.0, progress))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 down to 0
    final = config.min_lr_fraction
    return config.lr * (final + (1 - final) * cosine)


@torch.no_grad()
def scale_and_clip(params: Iterable[nn.Parameter], scale: Tensor, max_norm: float | None) -> Tensor:
    """Multiplies all gradients by `scale`, then clips their norm to `max_norm`. Returns the norm before clipping.

    One multiplication does both. Everything runs on the device: the host does not wait.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) * scale
    if max_norm is not None:
        scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, scale.to(grads[0].dtype))
    return norm
