"""Attention, and the code that makes it fast: choice of kernels, padded heads, key/value caches, small matrix products.

Letters in shapes:

    B batch    N queries    M keys    C channels    H heads
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

KeysValues = tuple[Tensor, Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal=False, dropout=0.0, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention of q (B, H, N, C/H) on k and v (B, H, M, C/H) -> (B, H, N, C/H).

    mask    boolean, true where a query sees a key; broadcastable to (B, H, N, M). If it has more than M columns, the
            last M count. Fully masked queries return zeros, as in DeepMind's code
    causal  queries align with the last N keys: query i sees keys 0 .. M - N + i
    scale   factor of the scores, by default 1 / sqrt(channels of a query)
    """
    n = q.shape[-2]
    m = k.shape[-2]
    causal = causal and n > 1  # a single query is the last position: it sees all keys
    if mask is None:
        if causal and n < m:
            # `is_causal=True` would align the queries with the first keys. On CUDA, causal_lower_right selects the
            # flash kernel and takes no memory; on a CPU it would only break the graph of torch.compile.
            if q.is_cuda:
                mask = causal_lower_right(n, m)
            else:
                mask = q.new_ones(n, m, dtype=torch.bool).tril(m - n)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal and n == m, scale=scale)

    mask = mask[..., -m:]
    if causal:
        mask = mask & mask.new_ones(n, m).tril(m - n)
    # The softmax of a fully masked row is NaN: unmask the row, then zero its output.
    fully_masked = ~mask.any(-1, keepdim=True)
    visible = mask | fully_masked
    if mask.shape[-1] == 1:
        visible = None  # the mask hides all keys or none from a query
    x = F.scaled_dot_product_attention(q, k, v, visible, dropout, scale=scale)
    return x.masked_fill(fully_masked, 0.0)


def mask_of_padding(pad_mask: Tensor | None) -> Tensor | None:
    """The mask (B, 1, 1, M) for `attend` from `pad_mask` (B, M), which is true at padding."""
    return None if pad_mask is None else ~pad_mask[:, None, None, :]


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


@dataclass
class LayerCache:
    """The cached keys and values of one layer, and the part of them that one decoding step uses (see decoding.py).

    The cache has B rows, one for each sequence, with S positions each.
    """

    keys: Tensor  # (B, H, S, C/H)
    values: Tensor  # (B, H, C/H, S)
    at: tuple  # index into (B, S): rows and positions of the new keys
    num_read: int | None = None  # the query reads the first num_read keys; None: a prefill, which reads only new keys
    bias: Tensor | None = None  # (B, 1, num_read), -inf beyond the end of a row; None: all rows are full

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Stores k and v (rows, H, M, C/H), then attends with q (rows, H, N, C/H) -> (rows, H, N, C/H).

        Every step but a prefill has a single query. Its two products read the keys and the values row by row. They
        compile to loops at the speed of memory (37 GB/s on a CPU; 17 GB/s in the other order).
        """
        self.keys.movedim(2, 1)[self.at] = k.movedim(2, 1)
        self.values.movedim(3, 1)[self.at] = v.movedim(2, 1)
        if self.num_read is None:
            return attend(q, k, v, causal=True, scale=scale)
        keys = self.keys[:, :, : self.num_read]
        values = self.values[..., : self.num_read]
        scores = (keys @ (q * scale).mT)[..., 0]  # (B, H, num_read)
        if self.bias is not None:
            scores = scores + self.bias
        weights = scores.softmax(-1).to(values.dtype)
        return weights[:, :, None] @ values.mT


# ----------------------------------------------------------------------------------------------------------------------
# Positions


def rotary_angles(positions: Tensor, num_channels: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines (2, B, 1, M, num_channels / 2) of rotary positions (arXiv 2104.09864), for positions (B, M).

    Pair i of channels turns by position * 10000^(-2i / num_channels). Angles are float32 or wider: in bfloat16,
    positions 256 and 257 are equal.
    """
    angle_dtype = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, num_channels, 2, device=positions.device, dtype=angle_dtype)
    frequencies = 10_000.0 ** (-pairs / num_channels)
    angles = positions[:, None, :, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the first channels of x (B, H, M, C/H), in pairs (0, 1), (2, 3), ..., by `rotary_angles`.

    `angles` may have more than M positions: x has the last M of them.
    """
    length = x.shape[2]
    cos, sin = angles[..., -length:, :]
    num_rotary = 2 * cos.shape[-1]
    pairs = x[..., :num_rotary].unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    turned = turned.flatten(-2).to(x.dtype)
    return torch.cat((turned, x[..., num_rotary:]), dim=-1)


def sinusoids(positions: Tensor, num_channels: int, dtype: torch.dtype) -> Tensor:
    """Fixed embeddings (B, M, C) of positions (B, M): all sines, then all cosines (Google's Perceiver AR code).

    The C / 2 frequencies fall geometrically from 1 to 1 / 10,000, endpoints included. Angles are float64: in float32,
    the angle of position 131,072 would be wrong by a hundredth of a radian. Each call computes its embeddings, because
    a table for a context of that length would take half a gigabyte.
    """
    exponents = torch.linspace(0, -4, num_channels // 2, device=positions.device, dtype=torch.float64)
    angles = positions[..., None] * 10**exponents  # (B, M, C / 2)
    return torch.cat((angles.sin().to(dtype), angles.cos().to(dtype)), dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# Linear maps


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, faster for the few rows of a decoding step on the CPU.

    Such a step takes as long as reading the weights, and MKL's matrix product reads them with one core. So `linear`
    splits the weights into parts and multiplies them as a batch, which uses all cores. On 2 cores (AMD EPYC) this takes
    0.3 of the time for 1 or 2 rows, and 0.6 for 3 to 32 rows, with x as the first factor. bfloat16 gains nothing.
    """
    rows = x.numel() // x.shape[-1]
    if not x.is_cpu or not 1 <= rows <= 32 or x.dtype.itemsize < 4:
        return F.linear(x, weight, bias)
    parts = math.gcd(len(weight), 16)
    weights = weight.view(parts, -1, x.shape[-1])  # (parts, out / parts, in)
    x_rows = x.reshape(rows, -1).expand(parts, -1, -1)
    if rows <= 2:
        y = torch.bmm(weights, x_rows.mT).mT
    else:
        y = torch.bmm(x_rows, weights.mT)
    y = y.transpose(0, 1)  # (rows, parts, out / parts)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """`nn.Linear` that computes with the function `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


# ----------------------------------------------------------------------------------------------------------------------
# The module


class Attention(nn.Module):
    """Multi-head attention of queries from one array on keys and values from another (Perceiver IO, appendix A)."""

    def __init__(
        self,
        num_q_channels: int,
        num_kv_channels: int,
        num_heads: int,
        num_qk_channels: int | None = None,
        num_v_channels: int | None = None,
        qkv_bias=True,
        out_bias=True,
        dropout=0.0,
        name="num",
    ):
        """num_qk_channels  of queries and keys; default: num_kv_channels, as in DeepMind's code
        num_v_channels   of values; default: num_qk_channels
        dropout          of attention weights
        name             prefix of option names in the error message

        Raises ValueError if num_heads does not divide num_qk_channels and num_v_channels.
        """
        super().__init__()
        num_qk_channels = num_qk_channels or num_kv_channels
        num_v_channels = num_v_channels or num_qk_channels
        for kind, channels in (("qk", num_qk_channels), ("v", num_v_channels)):
            if channels % num_heads:
                raise ValueError(f"{name}_heads={num_heads} does not divide {channels}, the {name}_{kind}_channels")
        self.num_heads = num_heads
        self.dropout = dropout
        self.q = Linear(num_q_channels, num_qk_channels, qkv_bias)
        self.k = Linear(num_kv_channels, num_qk_channels, qkv_bias)
        self.v = Linear(num_kv_channels, num_v_channels, qkv_bias)
        self.out = Linear(num_v_channels, num_q_channels, out_bias)
        self.qk_head_channels = num_qk_channels // num_heads
        self.v_head_channels = num_v_channels // num_heads

    def forward(
        self,
        x_q: Tensor,
        x_kv: Tensor | KeysValues,
        mask: Tensor | None = None,
        causal=False,
        rotary: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x_q (B, N, Cq) and x_kv (B, M, Ckv) -> (B, N, Cq). x_kv may also be the result of `keys_values`.

        mask, causal  as in `attend`
        rotary        `rotary_angles`: the last M positions belong to the keys, the last N to the queries
        cache         the layer's cache in a decoding step; not together with mask
        """
        k, v = x_kv if isinstance(x_kv, tuple) else self.keys_values(x_kv)
        q = self.project(self.q, x_q, k.shape[-1])
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary)
        scale = self.qk_head_channels**-0.5
        if cache is not None:
            x = cache.attend(q, k, v, scale)
        else:
            dropout = self.dropout if self.training else 0.0
            x = attend(q, k, v, mask, causal, dropout, scale)
        x = x[..., : self.v_head_channels]  # (B, H, N, C/H), without the padding
        return self.out(x.transpose(1, 2).flatten(-2))

    def keys_values(self, x_kv: Tensor) -> KeysValues:
        """Keys and values (B, H, M, width of a head) of x_kv (B, M, Ckv)."""
        qk_width, v_width = self.head_widths(x_kv.device)
        k = self.project(self.k, x_kv, qk_width)
        v = self.project(self.v, x_kv, v_width)
        return k, v

    def head_widths(self, device: torch.device) -> tuple[int, int]:
        """The padded number of channels in a head: of queries and keys, and of values.

        The fast kernels, which never hold the N x M scores, restrict these numbers. On CUDA they must be multiples of 8
        (the ImageNet model has one head of 261). On the CPU they must be equal. Zeros pad the heads and change no
        result.
        """
        qk = math.ceil(self.qk_head_channels / 8) * 8
        v = math.ceil(self.v_head_channels / 8) * 8
        if device.type != "cuda":
            qk = v = max(qk, v)
        return qk, v

    def project(self, layer: nn.Linear, x: Tensor, width: int) -> Tensor:
        """layer(x), split into heads and padded with zeros to `width` channels: (B, M, C) -> (B, H, M, width)."""
        heads = (self.num_heads, -1)
        padding = width - layer.out_features // self.num_heads
        if padding:
            # Padding the weights is a fifth faster than padding the result, and takes less memory.
            weight = F.pad(layer.weight.unflatten(0, heads), (0, 0, 0, padding)).flatten(0, 1)
            bias = layer.bias
            if bias is not None:
                bias = F.pad(bias.unflatten(0, heads), (0, padding)).flatten()
            x = F.linear(x, weight, bias)
        else:
            x = layer(x)
        return x.unflatten(-1, heads).transpose(1, 2)

    def weights(self, x_q: Tensor, x_kv: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights (B, H, N, M), for pictures. Unlike `forward`, it holds all N x M: use few queries."""
        q = self.project(self.q, x_q, self.qk_head_channels)
        k = self.project(self.k, x_kv, self.qk_head_channels)
        scores = q @ k.mT * self.qk_head_channels**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0)  # zeros for fully masked queries
