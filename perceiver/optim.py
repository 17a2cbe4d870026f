"""Optimizers with their parameter groups, and learning-rate schedules."""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from perceiver.config import OptimConfig


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962) as Perceiver IO's recipes have it, from optax (DeepMind's train/utils.py).

    Adam's update with bias correction, plus decay, scaled for each tensor to the norm of the parameters. Biases and
    norms too get that trust ratio; build_optimizer only spares them the decay. It is 1 where either norm is 0, as of
    biases in the first step, and has no bounds.
    """

    def __init__(self, params, lr: float, betas: tuple[float, ...] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            grads = [p.grad for p in params]
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            group["step"] += 1
            beta1, beta2 = group["betas"]

            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            updates = torch._foreach_div(means, 1 - beta1 ** group["step"])
            roots = torch._foreach_div(squares, 1 - beta2 ** group["step"])
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(updates, roots)
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            norms = zip(torch._foreach_norm(params), torch._foreach_norm(updates))
            torch._foreach_mul_(updates, [torch.where((p > 0) & (u > 0), p / u, 1.0) for p, u in norms])
            torch._foreach_add_(params, updates, alpha=-group["lr"])


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Decays matrices (weights, embeddings, latents, position tables) and leaves biases and norms alone, as DeepMind's
    ImageNet recipe does. Parameters that do not require gradients stay out."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    adam = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "lamb":
        return Lamb(groups, **adam)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name](groups, **adam, fused=True)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Of step 0, 1, ...: linear warm-up, then `config.schedule`, whose end value stays from there on.

    A cosine is half of one, from lr down to min_lr_fraction.
    """
    end = config.decay_steps or max_steps
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.step_factor ** sum(step >= at * end for at in config.step_at)
    start = config.warmup_steps if config.schedule == "cosine" else max(config.warmup_steps, end / 2)
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_fraction + (1 - config.min_lr_fraction) * cosine)


@torch.no_grad()
def scale_and_clip(params: Iterable[nn.Parameter], scale: Tensor, max_norm: float | None) -> Tensor:
    """Multiplies all gradients by `scale` and clips their norm to `max_norm`; returns the norm before clipping.

    One pass over the gradients, on the device: the host does not wait.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) * scale
    if max_norm is not None:
        scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, scale.to(grads[0].dtype))
    return norm
