"""The optimizer's parameter groups and the learning-rate schedule."""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from perceiver.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices (weights, embeddings, position tables) and leaves biases and norms alone, as
    DeepMind's ImageNet recipe does."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Of step 0, 1, ...: linear warm-up, then half a cosine down to min_lr_fraction, and that from there on."""
    end = config.decay_steps or max_steps
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, end - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
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
