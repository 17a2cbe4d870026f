"""Optimizers with their parameter groups, learning-rate schedules, and gradient clipping."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from perceiver.config import OptimConfig
from perceiver.model import CrossAttentionLayer, SelfAttentionLayer


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


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon) for weight matrices.

    It replaces the momentum of a matrix by a nearby matrix with orthogonal rows or columns. The update has the root
    mean square of AdamW's, and weight decay is AdamW's (arXiv 2502.16982, section 2.2). torch.optim.Muon does the same,
    but only in bfloat16, which is slow on most CPUs, and one matrix at a time.
    """

    def __init__(self, params, lr: float, lr_factor: float, momentum: float, weight_decay: float):
        """The learning rate is lr * lr_factor. A schedule that sets one `lr` for all parameters needs the factor."""
        options = {"lr": lr, "lr_factor": lr_factor, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self.update(params, group)

    def update(self, params: list[nn.Parameter], group: dict):
        """Updates matrices of one shape in place."""
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        means = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov momentum
        updates = orthogonalize_whole(torch.stack(updates)).to(params[0].dtype)
        lr = group["lr"] * group["lr_factor"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        rms = 0.2 * max(params[0].shape) ** 0.5  # AdamW's root mean square, 0.2, over that of an orthogonal matrix
        torch._foreach_add_(params, updates.unbind(), alpha=-lr * rms)


def orthogonalize(x: Tensor) -> Tensor:
    """Orthogonal factors, nearly, of matrices (B, M, N): U V^T for each matrix U S V^T, with singular values near 1.

    Five Newton-Schulz iterations with Jordan's coefficients bring the singular values between 0.7 and 1.2.
    """
    if x.is_cuda:
        x = x.bfloat16()  # the iterations bear it
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values are at most 1
    for _ in range(5):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        wide = torch.baddbmm(wide, polynomial, wide, beta=3.4445)
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def orthogonalize_whole(x: Tensor) -> Tensor:
    """`orthogonalize` for matrices that FSDP shards. Each rank gathers them, computes all, and keeps its part."""
    if not isinstance(x, DTensor):
        return orthogonalize(x)
    y = orthogonalize(x.full_tensor())
    return distribute_tensor(y, x.device_mesh, x.placements, src_data_rank=None)


class Optimizers:
    """Several optimizers for different parameters, with the methods of one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer | Optimizers:
    """The optimizer for the parameters that require gradients.

    Weight decay applies to tensors of two or more dimensions (weights, embeddings, latents, positions), not to biases
    and norms, as in DeepMind's ImageNet recipe. `muon` updates the matrices of layers, and AdamW the other parameters.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if config.name == "muon":
        matrices = [p for p in layer_matrices(model) if p.requires_grad]
        chosen = {id(p) for p in matrices}
        others = [p for p in params if id(p) not in chosen]
        muon = Muon(matrices, config.lr, config.muon_lr / config.lr, config.momentum, config.weight_decay)
        adamw = torch.optim.AdamW(decay_groups(others, config), config.lr, config.betas, config.eps, fused=True)
        return Optimizers(muon, adamw)
    groups = decay_groups(params, config)
    if config.name == "sgd":
        sharded = any(isinstance(p, DTensor) for p in params)  # these have no fused SGD
        return torch.optim.SGD(groups, config.lr, config.momentum, fused=not sharded)
    options = config.lr, config.betas, config.eps
    if config.name == "lamb":
        return Lamb(groups, *options)
    if config.name == "adam":
        return torch.optim.Adam(groups, *options, fused=True)
    return torch.optim.AdamW(groups, *options, fused=True)


def decay_groups(params: list[nn.Parameter], config: OptimConfig) -> list[dict]:
    """Parameter groups with and without weight decay."""
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear maps in attention and MLP layers."""
    layers = [m for m in model.modules() if isinstance(m, CrossAttentionLayer | SelfAttentionLayer)]
    return [m.weight for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]


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
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm * scale
    if max_norm is not None:
        scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, scale.to(grads[0].dtype))
    return norm
