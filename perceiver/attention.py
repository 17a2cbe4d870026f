"""Attention, and the code that makes it fast: choice of kernels, padded heads, key/value caches, small matrix products.

Letters in shapes:

    B batch    N queries    M keys    C channels    H heads
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint


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
    if scale is None:
        scale = q.shape[-1] ** -0.5
    unequal = q.is_cpu and q.shape[-1] != v.shape[-1]
    if unequal and n * m > 2**20:  # too many weights to hold: pad to equal widths, for the fast kernel
        width = max(q.shape[-1], v.shape[-1])
        padded = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        return attend(*padded, mask, causal, dropout, scale)[..., : v.shape[-1]]
    sdpa = attention_kernel(q, k, v, dropout)
    if mask is None:
        if causal and n == m and n <= 1024 and q.is_cpu and dropout == 0 and not unequal:
            return causal_self_attention(sdpa, q, k, v, scale)
        if causal and n < m:
            # `is_causal=True` would align the queries with the first keys. On CUDA, causal_lower_right selects the
            # flash kernel and takes no memory. But torch.compile cannot make it: it would break the graph.
            if q.is_cuda and not torch.compiler.is_compiling():
                mask = causal_lower_right(n, m)
            else:
                mask = q.new_ones(n, m, dtype=torch.bool).tril(m - n)
        return sdpa(q, k, v, mask, dropout, is_causal=causal and n == m, scale=scale)

    mask = mask[..., -m:]
    if causal:
        mask = mask & mask.new_ones(n, m).tril(m - n)
    # The softmax of a fully masked row is NaN: unmask the row, then zero its output.
    fully_masked = ~mask.any(-1, keepdim=True)
    visible = mask | fully_masked
    if mask.shape[-1] == 1:
        visible = None  # the mask hides all keys or none from a query
    x = sdpa(q, k, v, visible, dropout, scale=scale)
    return x.masked_fill(fully_masked, 0.0)


def attention_kernel(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Callable[..., Tensor]:
    """The function for `attend`: F.scaled_dot_product_attention, or on the CPU another one where it is better."""
    if not q.is_cpu:
        return F.scaled_dot_product_attention
    unequal = q.shape[-1] != v.shape[-1]
    if unequal and dropout == 0 and trains_on_cpu(q):  # keep no weights for the backward pass, like PyTorch's kernel
        return partial(checkpoint, plain_attention, use_reentrant=False, preserve_rng_state=False)
    # In bfloat16, plain matrix products take half the time of PyTorch's kernel. But they hold all weights.
    num_weights = q[..., 0].numel() * k.shape[-2]
    narrow = q.dtype == torch.bfloat16 and num_weights <= 2**25
    return plain_attention if unequal or narrow or dropout > 0 else F.scaled_dot_product_attention


def causal_self_attention(sdpa: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention with N = M on the CPU, by `sdpa`, which computes scores of keys that a query does not see.

    A quarter of the queries at a time skips many of these. For 512 positions, forward and backward passes take 0.7 of
    the time.
    """
    parts = []
    end = 0
    for part in q.chunk(4, dim=2):
        start = end
        end += part.shape[2]
        mask = q.new_ones(part.shape[2], end, dtype=torch.bool).tril(start)
        parts.append(sdpa(part, k[:, :, :end], v[:, :, :end], mask, 0.0, scale=scale))
    return torch.cat(parts, dim=2)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal=False, *, scale: float
) -> Tensor:
    """F.scaled_dot_product_attention for the CPU: with dropout, in bfloat16, or with values of another width than keys.

    PyTorch's own slow path also scales the keys and looks for fully masked rows. Without that, a training step of
    mnist.yaml takes nine tenths of the time. Like that path, this one holds all N x M weights.
    """
    with torch.autocast("cpu", enabled=False):  # autocast would convert the weights to float32, and back
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        scores = (q * scale) @ k.mT
        if is_causal:
            mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout) @ v


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
        # In bfloat16, the scores would lose more than the keys and values have lost. torch.compile converts on the way.
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = (keys.to(dtype) @ (q.to(dtype) * scale).mT)[..., 0]  # (B, H, num_read)
        if self.bias is not None:
            scores = scores + self.bias
        weights = scores.softmax(-1)
        x = weights[:, :, None] @ values.to(dtype).mT
        return x.to(q.dtype)


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
    *strides, last_stride = pairs.stride()
    in_memory = last_stride == 1 and all(stride % 2 == 0 for stride in strides)  # as complex numbers are
    if in_memory and x.dtype == cos.dtype and x.dtype.itemsize >= 4 and not torch.compiler.is_compiling():
        # A pair is a complex number, and a turn is a product. On a CPU, this takes a quarter of the time. bfloat16 has
        # no complex numbers, and torch.compile does not compile them.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    else:
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    turned = turned.flatten(-2).to(x.dtype)
    if num_rotary == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., num_rotary:]), dim=-1)


def sinusoids(positions: Tensor, num_channels: int, dtype: torch.dtype) -> Tensor:
    """Fixed embeddings (B, M, C) of positions (B, M): all sines, then all cosines (Google's Perceiver AR code).

    The C / 2 frequencies fall geometrically from 1 to 1 / 10,000, endpoints included. Angles are float64: in float32,
    the angle of position 131,072 would be wrong by a hundredth of a radian. Each call computes its embeddings, because
    a table for a context of that length would take half a gigabyte.
    """
    exponents = torch.linspace(0, -4, num_channels // 2, device=positions.device, dtype=torch.float64)
    blocks = []
    for block in positions.split(4096, dim=1):  # float64 needs much memory
        angles = block[..., None] * 10**exponents  # (B, 4096, C / 2)
        blocks.append(torch.cat((angles.sin().to(dtype), angles.cos().to(dtype)), dim=-1))
    return torch.cat(blocks, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Linear maps


class Linear(nn.Linear):
    """`nn.Linear` that takes less time and memory on the CPU (see `product` and `CPULinear`)."""

    def forward(self, x: Tensor, before: nn.Module | None = None) -> Tensor:
        """`before` is a cheap module to apply to x first, such as a LayerNorm or a GELU.

        In training on the CPU, the backward pass computes before(x) again, instead of keeping it.
        """
        return linear(x, self.weight, self.bias, before)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: nn.Module | None = None) -> Tensor:
    """The function of `Linear`."""
    if trains_on_cpu(x):
        parameters = () if before is None else before.parameters()
        return CPULinear.apply(before, x, weight, bias, *parameters)
    if before is not None:
        x = before(x)
    return product(x, weight, bias)


def to_autocast_dtype(x: Tensor) -> Tensor:
    """x in the dtype of autocast. Several linear maps of x would each convert it, and keep their own copy."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return x


def trains_on_cpu(x: Tensor) -> bool:
    return x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class CPULinear(torch.autograd.Function):
    """`linear` for training on the CPU.

    Under autocast, PyTorch would keep the weights in bfloat16 for the backward pass, which is as much as half of the
    parameters. This converts them again, and computes the result of `before` again. A training step of the masked
    language model needs 0.34 of the memory in bf16, and 0.85 in float32, for 3% more time.
    """

    @staticmethod
    def forward(ctx, before: nn.Module | None, x: Tensor, weight: Tensor, bias: Tensor | None, *parameters) -> Tensor:
        """`parameters` are those of `before`, so that they get their gradients."""
        ctx.before = before
        ctx.dtype = weight.dtype
        if torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32:
            ctx.dtype = torch.get_autocast_dtype("cpu")
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            if before is not None:
                x = before(x)
            if bias is not None:
                bias = bias.to(ctx.dtype)
            return product(x.to(ctx.dtype), weight.to(ctx.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs_weight, needs_bias = ctx.needs_input_grad[2:4]
        inputs = [x.detach().requires_grad_(ctx.needs_input_grad[1])]
        h = inputs[0]
        if ctx.before is not None:
            inputs += ctx.before.parameters()
            with torch.enable_grad():
                h = ctx.before(h)

        rows = grad.flatten(0, -2)  # (rows, out)
        grad_h = grad_weight = grad_bias = None
        with fast_products(grad):
            if h.requires_grad:
                grad_h = grad @ weight.to(ctx.dtype)
            if needs_weight:
                grad_weight = rows.mT @ h.detach().flatten(0, -2).to(ctx.dtype)
        if needs_bias:
            grad_bias = rows.sum(0)

        grads = [grad_h]
        if ctx.before is not None:
            needed = [tensor for tensor in inputs if tensor.requires_grad]
            found = iter(torch.autograd.grad(h, needed, grad_h.to(h.dtype)) if needed else ())
            grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
        return None, grads[0], grad_weight, grad_bias, *grads[1:]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, faster on the CPU in float32: by oneDNN, or for the few rows of a decoding step.

    Such a step takes as long as reading the weights, and MKL's matrix product reads them with one core. So this splits
    the weights into parts and multiplies them as a batch, which uses all cores. On 2 cores (AMD EPYC) this takes 0.3 of
    the time for 1 or 2 rows, and 0.6 for 3 to 32 rows, with x as the first factor. bfloat16 gains nothing.
    """
    if not x.is_cpu or x.dtype.itemsize < 4 or torch.compiler.is_exporting():  # exported: any number of rows
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if not 1 <= rows <= 32:
        with fast_products(x):
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


def fast_products(x: Tensor) -> AbstractContextManager:
    """Inside, products of matrices like x are as fast as they can be. Batches of small ones would be slower."""
    if x.dtype == torch.float32 and not torch.compiler.is_compiling() and has_fast_onednn():
        return onednn_products()
    return nullcontext()


@contextmanager
def onednn_products() -> Iterator[None]:
    """Inside, matrix products are oneDNN's. "bf16" would permit bfloat16, too; `has_fast_onednn` rules that out."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def has_fast_onednn() -> bool:
    """Whether oneDNN's products in float32 are exact, and faster than MKL's, which PyTorch takes.

    They are on AMD's CPUs with AVX-512: 205 instead of 175 GFLOP/s, on 2 cores. Training steps of large models take
    0.84 to 0.94 of the time. Intel's CPUs with AVX512_BF16 also have AVX512_FP16. Older versions of torch have no
    switch.
    """
    if not hasattr(torch.cpu, "get_capabilities") or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    capabilities = torch.cpu.get_capabilities()
    if not capabilities.get("avx512_bf16", False) or capabilities.get("avx512_fp16", False):
        return False
    x = torch.full((64, 64), 1 + 2**-12)  # bfloat16 would round it to 1
    with onednn_products():
        return bool((x @ x > 64).all())


# ----------------------------------------------------------------------------------------------------------------------
# Attention without projections
#
# Often one array is much longer than the other: inputs beside latents, or output queries beside latents. The
# projections of the longer array then take most of the time. They can move to the shorter array, because matrix
# products associate.
# For unprojected inputs X as keys and values, and for unprojected queries X:
#
#     softmax(q (X Wk^T)^T) (X Wv^T) = (softmax((q Wk) X^T) X) Wv^T
#     (softmax((X Wq^T) k^T) v) Wo^T = softmax(X (k Wq)^T) (v Wo^T)
#
# A column of ones in X makes biases a part of the weights. The scale and shift of the norm of X become a part as well,
# so X needs no gradient if the inputs need none. On 2 CPU cores, a training step of mnist.yaml takes half of the time.


@dataclass
class Unprojected:
    """Inputs that serve as keys and as values, and the projections that `Attention` moves to its queries and output."""

    x: Tensor  # (B, 1, M, W): normalized inputs, then ones
    key_weight: Tensor  # (H, C/H, W)
    value_weight: Tensor  # (H, C/H, W)


KeysValues = tuple[Tensor, Tensor] | Unprojected


def weight_with_bias(layer: nn.Module, num_heads: int, norm: nn.LayerNorm | None = None) -> Tensor:
    """The weights (H, C/H, W) of a linear map of inputs (..., Cin) with ones appended.

    Column Cin is the bias. Zeros pad W to a multiple of 8. The inputs lack the scale and shift of `norm`, if it is
    given.
    """
    weight = layer.weight
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    if norm is not None:
        bias = bias + (weight * norm.bias).sum(1)
        weight = weight * norm.weight
    weight = torch.cat((weight, bias[:, None]), dim=1)
    weight = F.pad(weight, (0, -weight.shape[1] % 8))
    return weight.unflatten(0, (num_heads, -1))


def with_ones(x: Tensor, width: int) -> Tensor:
    """x (B, M, C) with ones in the channels from C to `width`: (B, 1, M, width)."""
    ones = x.new_ones(*x.shape[:2], width - x.shape[-1])
    return torch.cat((x, ones), dim=-1)[:, None]


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
        kv_norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """x_q (B, N, Cq) and x_kv (B, M, Ckv) -> (B, N, Cq). x_kv may also be the result of `keys_values`.

        mask, causal  as in `attend`
        rotary        `rotary_angles`: the last M positions belong to the keys, the last N to the queries
        cache         the layer's cache in a decoding step; not together with mask
        kv_norm       LayerNorm of x_kv, which the attention applies. Default: x_kv is normalized already
        """
        options = (mask, causal, self.dropout if self.training else 0.0, self.qk_head_channels**-0.5)
        projected = rotary is not None or cache is not None  # these need projected queries and keys
        if isinstance(x_kv, Tensor):
            x_kv = self.keys_values(x_kv, kv_norm, num_queries=None if projected else x_q.shape[1])
        if isinstance(x_kv, Unprojected):
            return self.attend_to_unprojected(x_q, x_kv, *options)
        k, v = x_kv
        if not projected and self.moving_pays(x_q, k.shape[2]):
            return self.attend_from_unprojected(x_q, k, v, *options)

        q = self.project(self.q, x_q, k.shape[-1])
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary)
        x = attend(q, k, v, *options) if cache is None else cache.attend(q, k, v, scale=options[-1])
        x = x[..., : self.v_head_channels]  # (B, H, N, C/H), without the padding
        return self.out(x.transpose(1, 2).flatten(-2))

    def keys_values(
        self, x_kv: Tensor | Unprojected, norm: nn.LayerNorm | None = None, num_queries: int | None = None
    ) -> KeysValues:
        """What `forward` needs of x_kv (B, M, Ckv): keys and values (B, H, M, width of a head), or `Unprojected`.

        If x_kv is already `Unprojected`, for another attention to the same inputs, the result shares its inputs.

        norm         LayerNorm of x_kv. Default: x_kv is normalized already
        num_queries  N. If it is given, the inputs stay unprojected where that pays
        """
        shared = isinstance(x_kv, Unprojected)
        if shared or norm is not None and num_queries is not None and self.moving_pays(x_kv, num_queries):
            key_weight = weight_with_bias(self.k, self.num_heads, norm)
            value_weight = weight_with_bias(self.v, self.num_heads, norm)
            if shared:
                x = x_kv.x
            else:
                x = F.layer_norm(x_kv, norm.normalized_shape, eps=norm.eps)
                x = with_ones(x, key_weight.shape[-1])
            return Unprojected(x, key_weight, value_weight)
        if norm is not None:
            x_kv = norm(x_kv)
        x_kv = to_autocast_dtype(x_kv)
        qk_width, v_width = self.head_widths(x_kv.device)
        k = self.project(self.k, x_kv, qk_width)
        v = self.project(self.v, x_kv, v_width)
        return k, v

    def moving_pays(self, x: Tensor, num_others: int) -> bool:
        """Whether attention between x (B, M, C) and `num_others` other positions multiplies less with x unprojected."""
        length, channels = x.shape[1:]
        num_projected = self.q.out_features + self.v.out_features
        projected = num_projected * length * (channels + num_others)
        moved = num_projected * num_others * channels + 2 * self.num_heads * channels * num_others * length
        return length > num_others and moved < projected

    def attend_to_unprojected(self, x_q: Tensor, kv: Unprojected, *options) -> Tensor:
        """x_q (B, N, Cq) and inputs as keys and values -> (B, N, Cq). The options are those of `attend`."""
        q = self.project(self.q, x_q, self.qk_head_channels)
        q = q @ kv.key_weight  # (B, H, N, W)
        x_kv = kv.x.to(q.dtype).expand(-1, self.num_heads, -1, -1)
        x = attend(q, x_kv, x_kv, *options)
        x = x @ kv.value_weight.mT  # (B, H, N, C/H)
        return self.out(x.transpose(1, 2).flatten(-2))

    def attend_from_unprojected(self, x_q: Tensor, k: Tensor, v: Tensor, *options) -> Tensor:
        """Inputs x_q (B, N, Cq) as queries, and k and v of `keys_values` -> (B, N, Cq). The options are as before."""
        num_channels = x_q.shape[-1]
        k = k[..., : self.qk_head_channels] @ weight_with_bias(self.q, self.num_heads)  # (B, H, M, W)
        value_weight = self.out.weight.unflatten(1, (self.num_heads, -1)).movedim(0, 2)  # (H, C/H, Cq)
        v = v[..., : self.v_head_channels] @ value_weight
        v = F.pad(v, (0, k.shape[-1] - num_channels))  # fast kernels need equal widths
        q = with_ones(x_q, k.shape[-1]).to(k.dtype).expand(-1, self.num_heads, -1, -1)
        x = attend(q, k, v, *options)
        x = x[..., :num_channels].sum(1)  # over the heads
        return x if self.out.bias is None else x + self.out.bias

    def head_widths(self, device: torch.device) -> tuple[int, int]:
        """The padded number of channels in a head: of queries and keys, and of values.

        The fast kernels, which never hold the N x M scores, restrict these numbers. On CUDA they must be multiples of 8
        (the ImageNet model has one head of 261). On the CPU they must be equal. Zeros pad the heads and change no
        result. But much wider heads would take longer: DeepMind's language model has heads of 32 and 160 channels.
        """
        qk = math.ceil(self.qk_head_channels / 8) * 8
        v = math.ceil(self.v_head_channels / 8) * 8
        if device.type != "cuda" and max(qk, v) < 2 * min(qk, v):
            qk = v = max(qk, v)
        return qk, v

    def project(self, layer: nn.Linear, x: Tensor, width: int) -> Tensor:
        """layer(x), split into heads and padded with zeros to `width` channels: (B, M, C) -> (B, H, M, width)."""
        heads = (self.num_heads, -1)
        padding = width - layer.out_features // self.num_heads
        # Zeros in the weights cost products, zeros in the result cost a copy. For DeepMind's heads of 261 channels, the
        # weights are a fifth faster. For its language model, with 32 channels padded to 160, they take twice the time.
        if 0 < padding * x.shape[-1] <= 16 * width:
            weight = F.pad(layer.weight.unflatten(0, heads), (0, 0, 0, padding)).flatten(0, 1)
            bias = layer.bias
            if bias is not None:
                bias = F.pad(bias.unflatten(0, heads), (0, padding)).flatten()
            x = linear(x, weight, bias)
            padding = 0
        else:
            x = layer(x)
        x = x.unflatten(-1, heads).transpose(1, 2)
        return F.pad(x, (0, padding)) if padding else x

    def weights(self, x_q: Tensor, x_kv: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights (B, H, N, M), for pictures. Unlike `forward`, it holds all N x M: use few queries."""
        q = self.project(self.q, x_q, self.qk_head_channels)
        k = self.project(self.k, x_kv, self.qk_head_channels)
        scores = q @ k.mT * self.qk_head_channels**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0)  # zeros for fully masked queries
