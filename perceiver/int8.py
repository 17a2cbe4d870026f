"""8-bit weights, which make the decoding of a single sequence faster on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear map with 8-bit weights and a scale for every output: a decoding step reads a quarter of the bytes.

    It is faster only for a single row under torch.compile: the compiled loop converts each weight when it reads it.
    Otherwise `forward` first converts all weights.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.out_features = layer.out_features
        self.bias = layer.bias
        weight = layer.weight.detach()
        largest = weight.abs().amax(1, keepdim=True)
        scale = largest.clamp(min=torch.finfo(weight.dtype).tiny) / 127
        self.register_buffer("scale", scale)  # (out, 1)
        self.register_buffer("weight_int8", (weight / scale).round().to(torch.int8))  # (out, in)

    @property
    def weight(self) -> Tensor:
        """The weights (out, in) in floating point."""
        return self.weight_int8 * self.scale

    def forward(self, x: Tensor, before: nn.Module | None = None) -> Tensor:
        """`before` is a module to apply to x first."""
        if before is not None:
            x = before(x)
        if x.numel() > x.shape[-1]:  # several rows
            return F.linear(x, self.weight, self.bias)
        products = self.weight_int8 * x.flatten()
        y = products.sum(1) * self.scale[:, 0]
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def quantize(model: nn.Module):
    """Replaces every nn.Linear of the model by an `Int8Linear`. Embeddings, norms and the output stay as they are."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, Int8Linear(layer))
