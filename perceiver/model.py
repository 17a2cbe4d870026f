"""The models: attention, the two kinds of layers, Perceiver and Perceiver IO, Perceiver AR with its key/value cache.

Letters used for shapes, as in the papers:

    B batch    M inputs (keys)    N latents (queries)    C channels    H heads    V vocabulary
    D channels of the latents    O outputs    F channels of their queries    E channels of the outputs
    T context length of Perceiver AR    P length of its prefix, the M - N inputs that are no latents

Perceiver (arXiv 2103.03206), Perceiver IO (2107.14795) and Perceiver AR (2202.07765) are one idea: a few latents
attend to many inputs, once, and all depth is spent on the latents. So the cost of a layer does not depend on M, and
nothing of size M x M ever exists.
"""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0,
           scale: float | None = None) -> Tensor:
    """Scaled dot-product attention of q (B, H, N, C/H) on k and v (B, H, M, C/H) -> (B, H, N, C/H).

    `mask` is boolean, broadcastable to (B, H, N, M), true where a query may look; a query that may look nowhere gets
    zeros, as in DeepMind's code. `causal` takes the queries for the last N of the M positions: query i sees the keys
    up to M - N + i. `scale` is that of the scores, by default 1 / sqrt(channels of q).
    """
    n, m = q.shape[-2], k.shape[-2]
    causal = causal and n > 1  # a single query is the last position: it sees everything
    if mask is None:
        bias, square = None, causal and n == m
        if causal and not square:
            # `is_causal=True` would align the triangle to the first key, not to the last. On CUDA this bias picks the
            # flash kernel and costs no memory; elsewhere it is an (N, M) mask.
            bias = causal_lower_right(n, m) if q.is_cuda else q.new_ones(n, m, dtype=torch.bool).tril(m - n)
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=square, scale=scale)
    if causal:
        mask = mask & mask.new_ones(n, m).tril(m - n)
    blind = ~mask.any(-1, keepdim=True)  # an empty softmax would be NaN: look everywhere, then forget it
    keys = None if mask.shape[-1] == 1 else mask | blind  # one entry for all keys: no key is treated differently
    return F.scaled_dot_product_attention(q, k, v, keys, dropout, scale=scale).masked_fill(blind, 0.0)


def attend_once(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`attend` for a single query, with `bias` (B, 1, M) added to the scores: two products of matrix and vector.

    With v stored as (B, H, C/H, M) both read along the rows of their matrix, which compiles to loops at the speed of
    memory (CPU: keys at 37 GB/s where values in the other order come at 17).
    """
    scores = (k @ (q * scale).mT)[..., 0]  # (B, H, M)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype)
    return weights[:, :, None] @ v  # (B, H, 1, C/H)


def rotary_angles(positions: Tensor, num_channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, M, num_channels / 2) of the rotary encoding (arXiv 2104.09864) of positions (B, M).

    Pair i of channels turns by position * 10000^(-2i / num_channels). Angles are float32 at least: bfloat16 can't tell
    position 257 from 258.
    """
    exact = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, num_channels, 2, device=positions.device, dtype=exact)
    angles = positions[:, None, :, None] * 10_000.0 ** (-pairs / num_channels)  # (B, 1, M, num_channels / 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def sinusoids(positions: Tensor, num_channels: int, dtype: torch.dtype) -> Tensor:
    """Fixed embeddings (B, M, C) of positions (B, M): all sines, then all cosines (Perceiver AR, Google's code).

    The C / 2 frequencies go geometrically from 1 to 1 / 10,000, both included. Angles are float64: in float32, position
    131,072 would be off by a hundredth of a radian. They are computed when needed: a table of such a context would take
    half a gigabyte for good.
    """
    exponents = torch.linspace(0, -4, num_channels // 2, device=positions.device, dtype=torch.float64)
    angles = positions[..., None] * 10**exponents  # (B, M, C / 2)
    return torch.cat((angles.sin().to(dtype), angles.cos().to(dtype)), dim=-1)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the leading channels of x (B, H, M, C/H), in pairs (0, 1), (2, 3), ..., by `rotary_angles`."""
    cos, sin = angles
    turned, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, M, pairs) each
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((turned, rest), dim=-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, faster for the few rows of a decoding step on the CPU.

    Such a step takes as long as reading the weights does, and MKL's matrix product reads them with one core. A batch of
    products with parts of the weights uses all cores: on two (AMD EPYC) a row takes 0.3 of the time, and up to 32 rows,
    which want to be on the other side of the product, take 0.6. Not so in bfloat16, which goes another way.
    """
    rows = x.numel() // x.shape[-1]
    if not x.is_cpu or not 1 <= rows <= 32 or x.dtype.itemsize < 4:
        return F.linear(x, weight, bias)
    parts = math.gcd(weight.shape[0], 16)
    weights, x_rows = weight.view(parts, -1, x.shape[-1]), x.reshape(1, rows, -1)
    if rows <= 2:
        y = torch.bmm(weights, x_rows.mT.expand(parts, -1, -1)).view(-1, rows).t()  # (parts, out / parts, rows)
    else:
        y = torch.bmm(x_rows.expand(parts, -1, -1), weights.mT).transpose(0, 1)  # (rows, parts, out / parts)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head attention of one array on another (Perceiver IO, appendix A).

    Channels not given follow DeepMind's rule: queries and keys have the key/value input's, values the keys', and the
    output the query input's.
    """

    def __init__(self, num_q_channels: int, num_kv_channels: int, num_heads: int, num_qk_channels: int | None = None,
                 num_v_channels: int | None = None, qkv_bias: bool = True, out_bias: bool = True, dropout: float = 0.0):
        super().__init__()
        num_qk_channels = num_qk_channels or num_kv_channels
        num_v_channels = num_v_channels or num_qk_channels
        for name, channels in (("qk", num_qk_channels), ("v", num_v_channels)):
            if channels % num_heads:
                raise ValueError(f"num_{name}_channels={channels} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.q = Linear(num_q_channels, num_qk_channels, bias=qkv_bias)
        self.k = Linear(num_kv_channels, num_qk_channels, bias=qkv_bias)
        self.v = Linear(num_kv_channels, num_v_channels, bias=qkv_bias)
        self.out = Linear(num_v_channels, num_q_channels, bias=out_bias)

    def head_widths(self, device: torch.device) -> tuple[int, int]:
        """Channels of a head's queries and keys, and of its values, as the attention kernels get them.

        The kernels that never hold the N x M scores are choosy: on CUDA, channels must come in multiples of 8 (the
        ImageNet model has one head of 261), on the CPU queries and values must have equally many. So heads are filled
        up with zeros, which changes no result.
        """
        qk, v = ((linear.out_features // self.num_heads + 7) // 8 * 8 for linear in (self.k, self.v))
        return (qk, v) if device.type == "cuda" else (max(qk, v), max(qk, v))

    def project(self, layer: nn.Linear, x: Tensor, width: int) -> Tensor:
        """x (B, M, C) -> (B, H, M, width): what `layer` makes of it, by heads, each followed by zeros."""
        fill = width - layer.out_features // self.num_heads
        if fill:  # done to the weights: filling up all that they make is a fifth slower and takes memory
            weight = F.pad(layer.weight.unflatten(0, (self.num_heads, -1)), (0, 0, 0, fill)).flatten(0, 1)
            bias = layer.bias
            if bias is not None:
                bias = F.pad(bias.unflatten(0, (self.num_heads, -1)), (0, fill)).flatten()
            x = F.linear(x, weight, bias)
        else:
            x = layer(x)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, x_kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M, width of a head) of x_kv (B, M, Ckv)."""
        qk_width, v_width = self.head_widths(x_kv.device)
        return self.project(self.k, x_kv, qk_width), self.project(self.v, x_kv, v_width)

    def forward(self, x_q: Tensor, x_kv: Tensor | tuple[Tensor, Tensor], mask: Tensor | None = None,
                causal: bool = False, rotary_q=None, rotary_k=None, cache: Callable | None = None) -> Tensor:
        """x_q (B, N, Cq), x_kv (B, M, Ckv) or its `keys_values` -> (B, N, Cq). `cache` takes the new keys and values
        and returns those to attend to, with the bias of `attend_once` for a single query."""
        k, v = x_kv if isinstance(x_kv, tuple) else self.keys_values(x_kv)
        q = self.project(self.q, x_q, k.shape[-1])
        if rotary_q is not None:
            q, k = rotate(q, rotary_q), rotate(k, rotary_k)
        scale = (self.q.out_features // self.num_heads) ** -0.5
        if cache is not None:
            k, v, bias = cache(k, v)
        if cache is not None and q.shape[2] == 1:
            x = attend_once(q, k, v, bias, scale)
        else:
            x = attend(q, k, v, mask, causal, self.dropout if self.training else 0.0, scale)  # (B, H, N, width)
        x = x[..., : self.v.out_features // self.num_heads]
        return self.out(x.transpose(1, 2).flatten(-2))

    def weights(self, x_q: Tensor, x_kv: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much each query attends to each key, (B, H, N, M): all in memory, so for a few queries, to look at."""
        head_channels = self.q.out_features // self.num_heads
        q, k = self.project(self.q, x_q, head_channels), self.project(self.k, x_kv, head_channels)
        scores = (q @ k.mT).float() * head_channels**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0)  # zeros for a query that may look nowhere


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


# The exact GELU is that of krasserm's code and of the Hugging Face port, the other one that of DeepMind's code, and
# squared ReLU (arXiv 2109.08668) that of Google's Perceiver AR.
ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "squared_relu": SquaredReLU}


class MLP(nn.Sequential):
    """LayerNorm and two linear maps with one of ACTIVATIONS between them: (..., C) -> (..., C)."""

    def __init__(self, num_channels: int, widening_factor: int = 1, bias: bool = True, activation: str = "gelu"):
        super().__init__(
            nn.LayerNorm(num_channels),
            Linear(num_channels, widening_factor * num_channels, bias=bias),
            ACTIVATIONS[activation](),
            Linear(widening_factor * num_channels, num_channels, bias=bias),
        )


class CrossAttentionLayer(nn.Module):
    """Queries attend to keys and values of another array, then an MLP; pre-norm, residual around both.

    `query_residual=False` leaves out the residual around the attention: right for decoders whose queries mean something
    else than the outputs (Perceiver IO, appendix E.1). `latent_keys` says how Perceiver AR's latents, the last of the
    keys, are normalised: "kv_norm" as all keys (Google's code), "q_norm" by the norm of the queries (krasserm's).
    """

    def __init__(self, num_q_channels: int, num_kv_channels: int, num_heads: int, widening_factor: int = 1,
                 mlp_bias: bool = True, activation: str = "gelu", residual_dropout: float = 0.0,
                 query_residual: bool = True, latent_keys: str = "kv_norm", **attention):
        super().__init__()
        self.query_residual = query_residual
        self.latent_keys = latent_keys
        self.q_norm = nn.LayerNorm(num_q_channels)
        self.kv_norm = nn.LayerNorm(num_kv_channels)
        self.attention = Attention(num_q_channels, num_kv_channels, num_heads, **attention)
        self.mlp = MLP(num_q_channels, widening_factor, mlp_bias, activation)
        self.dropout = nn.Dropout(residual_dropout)

    def keys_values(self, x_kv: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` makes of x_kv (B, M, Ckv) first, to be given to it instead when it is called repeatedly."""
        return self.attention.keys_values(self.kv_norm(x_kv))

    def forward(self, x_q: Tensor, x_kv: Tensor | tuple[Tensor, Tensor], **kwargs) -> Tensor:
        """x_q (B, N, Cq), x_kv (B, M, Ckv) or its `keys_values` -> (B, N, Cq); the rest as `Attention.forward`."""
        q = self.q_norm(x_q)
        if self.latent_keys == "q_norm":
            x_kv = torch.cat((self.kv_norm(x_kv[:, : -x_q.shape[1]]), q), dim=1)
        elif not isinstance(x_kv, tuple):
            x_kv = self.kv_norm(x_kv)
        x = self.dropout(self.attention(q, x_kv, **kwargs))
        if self.query_residual:
            x = x_q + x
        return x + self.dropout(self.mlp(x))


class SelfAttentionLayer(nn.Module):
    """A Transformer layer on the latents; pre-norm."""

    def __init__(self, num_channels: int, num_heads: int, widening_factor: int = 1, mlp_bias: bool = True,
                 activation: str = "gelu", residual_dropout: float = 0.0, **attention):
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)
        self.attention = Attention(num_channels, num_channels, num_heads, **attention)
        self.mlp = MLP(num_channels, widening_factor, mlp_bias, activation)
        self.dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        """(B, N, C) -> (B, N, C); the rest as `Attention.forward`."""
        h = self.norm(x)
        x = x + self.dropout(self.attention(h, h, **kwargs))
        return x + self.dropout(self.mlp(x))


def init_weights(model: nn.Module, std: float | None) -> None:
    """Weights of linear maps, convolutions and tables normal with `std`, biases zero (krasserm's code and the Hugging
    Face port). Latents and trained positions are tables too, so they start small.

    Without `std` that of tables is 1 and that of maps 1 / sqrt(inputs), as in Google's code, which also cuts the tails.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            fan_in = 1 if isinstance(module, nn.Embedding) else module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5 if std is None else std)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


def run_layer(layer: nn.Module, checkpointing: bool, *args, **kwargs) -> Tensor:
    """layer(*args, **kwargs); in training with `checkpointing`, the backward pass computes it again instead of keeping
    what is inside."""
    if checkpointing and layer.training:
        return checkpoint(layer, *args, use_reentrant=False, **kwargs)
    return layer(*args, **kwargs)


def check_positive(config, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def check_choice(config, name: str, choices: Iterable[str]) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}={getattr(config, name)!r} must be one of {', '.join(choices)}")


def check_dropout(config, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be in [0, 1)")


# ----------------------------------------------------------------------------------------------------------------------
# Perceiver and Perceiver IO


@dataclass
class CrossAttentionConfig:
    """What the cross-attentions of encoders and decoders have in common."""
    num_cross_attention_heads: int = 8  # H
    num_cross_attention_qk_channels: int | None = None  # of queries and keys; null: as many as what is attended to has
    num_cross_attention_v_channels: int | None = None  # of values; null: as many as the keys
    cross_attention_widening_factor: int = 1  # hidden channels of the MLP / its channels
    activation: str = "gelu_tanh"  # of MLPs: gelu_tanh (DeepMind's code and weights) or gelu (exact; others' code)
    dropout: float = 0.0  # of attention weights
    residual_dropout: float = 0.0  # of what attention and MLP add to the residual stream
    init_scale: float = 0.02  # standard deviation of the initial weights
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more compute

    def __post_init__(self):
        check_positive(self, *(name for name, value in vars(self).items() if type(value) is int))
        check_dropout(self, "dropout", "residual_dropout")
        check_choice(self, "activation", ACTIVATIONS)
        if self.init_scale <= 0:
            raise ValueError(f"init_scale={self.init_scale} must be positive")

    def cross_attention(self, num_q_channels: int, num_kv_channels: int, **kwargs) -> CrossAttentionLayer:
        return CrossAttentionLayer(
            num_q_channels, num_kv_channels, self.num_cross_attention_heads, self.cross_attention_widening_factor,
            num_qk_channels=self.num_cross_attention_qk_channels, num_v_channels=self.num_cross_attention_v_channels,
            activation=self.activation, dropout=self.dropout, residual_dropout=self.residual_dropout, **kwargs)


@dataclass
class PerceiverEncoderConfig(CrossAttentionConfig):
    num_cross_attention_layers: int = 1  # one before each of the first self-attention blocks
    first_cross_attention_layer_shared: bool = False  # the first has the weights that all others have
    num_self_attention_blocks: int = 1  # times that the block is run, always with the same weights
    num_self_attention_layers_per_block: int = 6  # each with its own weights
    first_self_attention_block_shared: bool = True  # the first has the weights that all others have
    num_self_attention_heads: int = 8  # H
    num_self_attention_qk_channels: int | None = None  # of queries and keys; null: the latents'
    num_self_attention_v_channels: int | None = None  # of values; null: as many as the keys
    self_attention_widening_factor: int = 1  # hidden channels of an MLP / its channels

    def __post_init__(self):
        super().__post_init__()
        if self.num_cross_attention_layers > self.num_self_attention_blocks:
            raise ValueError(f"num_cross_attention_layers={self.num_cross_attention_layers} exceeds "
                             f"num_self_attention_blocks={self.num_self_attention_blocks}; there is one before a block")

    def self_attention(self, num_channels: int) -> SelfAttentionLayer:
        return SelfAttentionLayer(
            num_channels, self.num_self_attention_heads, self.self_attention_widening_factor,
            num_qk_channels=self.num_self_attention_qk_channels, num_v_channels=self.num_self_attention_v_channels,
            activation=self.activation, dropout=self.dropout, residual_dropout=self.residual_dropout)


class PerceiverEncoder(nn.Module):
    """Inputs to latents: of Perceiver (arXiv 2103.03206, section 3) and of Perceiver IO (2107.14795, section 3.1).

    Learned latents attend to the inputs, then a block of self-attention layers runs on them; that repeats. Perceiver
    attends to the inputs several times, Perceiver IO once. Weights are shared among all cross-attentions and among all
    blocks, but for the first of each, if so configured.
    """

    def __init__(self, config: PerceiverEncoderConfig, num_latents: int, num_latent_channels: int,
                 num_input_channels: int):
        super().__init__()
        self.config = c = config
        self.latents = nn.Embedding(num_latents, num_latent_channels)
        # Lists of one set of weights, or of two: the first's and all others'.
        self.cross_attention = nn.ModuleList(
            c.cross_attention(num_latent_channels, num_input_channels)
            for _ in range(min(c.num_cross_attention_layers, 1 if c.first_cross_attention_layer_shared else 2)))
        self.self_attention = nn.ModuleList(
            nn.ModuleList(c.self_attention(num_latent_channels) for _ in range(c.num_self_attention_layers_per_block))
            for _ in range(min(c.num_self_attention_blocks, 1 if c.first_self_attention_block_shared else 2)))
        init_weights(self, c.init_scale)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """x (B, M, C) -> latents (B, N, D). `pad_mask` (B, M) is true at inputs that are not to be looked at."""
        c = self.config
        mask = None if pad_mask is None else ~pad_mask[:, None, None, :]  # (B, 1, 1, M)
        latents = self.latents.weight.expand(len(x), -1, -1)  # (B, N, D)
        last_cross, last_block = len(self.cross_attention) - 1, len(self.self_attention) - 1
        for i in range(c.num_self_attention_blocks):
            if i < c.num_cross_attention_layers:
                layer = self.cross_attention[min(i, last_cross)]
                if i == last_cross < c.num_cross_attention_layers - 1:
                    x = layer.keys_values(x)  # once for all layers that share these weights
                latents = run_layer(layer, c.activation_checkpointing, latents, x, mask=mask)
            for layer in self.self_attention[min(i, last_block)]:
                latents = run_layer(layer, c.activation_checkpointing, latents)
        return latents

    def attention_map(self, x: Tensor, latents: Tensor | list[int], pad_mask: Tensor | None = None) -> Tensor:
        """Where `latents`, given by number, look in x (B, M, C): weights (B, H, len(latents), M) of the first
        cross-attention, which sum to 1 over M. `forward` never has them; they are computed here, for a picture."""
        layer, mask = self.cross_attention[0], None if pad_mask is None else ~pad_mask[:, None, None, :]
        return layer.attention.weights(layer.q_norm(self.latents.weight[None, latents]), layer.kv_norm(x), mask)


@dataclass
class PerceiverDecoderConfig(CrossAttentionConfig):
    cross_attention_residual: bool = True  # add the queries to what they read
    num_query_channels: int | None = None  # F, of trained queries; null: the latents', or those of tied embeddings


class PerceiverDecoder(nn.Module):
    """Latents to outputs (Perceiver IO, section 3.2): each query reads the latents, independently of all others."""

    def __init__(self, config: PerceiverDecoderConfig, num_latent_channels: int, num_query_channels: int):
        super().__init__()
        self.config = config
        self.cross_attention = config.cross_attention(num_query_channels, num_latent_channels,
                                                      query_residual=config.cross_attention_residual)
        init_weights(self, config.init_scale)

    def forward(self, queries: Tensor, latents: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """queries (B, O, F), latents (B, N, D) -> (B, O, F). Queries where `pad_mask` (B, O) is true read nothing, as
        in DeepMind's code."""
        mask = None if pad_mask is None else ~pad_mask[:, None, :, None]  # (B, 1, O, 1)
        return run_layer(self.cross_attention, self.config.activation_checkpointing, queries, latents, mask=mask)


class PerceiverIO(nn.Module):
    """Perceiver IO (arXiv 2107.14795): any inputs to any outputs.

    The parts of a modality are modules that go with these; adapters.py has some:

        input_adapter(inputs) -> (B, M, C)
        query_provider(adapted inputs (B, M, C), output_positions) -> queries (B, O, F)
        output_adapter(decoded queries (B, O, F)) -> outputs
    """

    def __init__(self, input_adapter: nn.Module, encoder: PerceiverEncoder, query_provider: nn.Module,
                 decoder: PerceiverDecoder, output_adapter: nn.Module):
        super().__init__()
        self.input_adapter = input_adapter
        self.encoder = encoder
        self.query_provider = query_provider
        self.decoder = decoder
        self.output_adapter = output_adapter

    def forward(self, inputs: Tensor, pad_mask: Tensor | None = None, output_positions: Tensor | None = None,
                query_pad_mask: Tensor | None = None) -> Tensor:
        """inputs, as the input adapter takes them -> outputs, as the output adapter makes them.

        pad_mask          (B, M), true at inputs that are padding: they are not looked at
        output_positions  (O') or (B, O'), which outputs to compute; they are what they are among all. Default: all
        query_pad_mask    (B, O), true at outputs of no interest: they read nothing
        """
        return self.decode(*self.encode(inputs, pad_mask), output_positions, query_pad_mask)

    def encode(self, inputs: Tensor, pad_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """inputs -> adapted inputs (B, M, C) and latents (B, N, D), to be given to `decode`, as often as need be."""
        x = self.input_adapter(inputs)
        return x, self.encoder(x, pad_mask)

    def decode(self, x: Tensor, latents: Tensor, output_positions: Tensor | None = None,
               query_pad_mask: Tensor | None = None) -> Tensor:
        queries = self.query_provider(x, output_positions)  # (B, O, F)
        return self.output_adapter(self.decoder(queries, latents, query_pad_mask))


class Perceiver(nn.Module):
    """The original Perceiver (arXiv 2103.03206): the mean of the latents is what the output is made of."""

    def __init__(self, input_adapter: nn.Module, encoder: PerceiverEncoder, output_adapter: nn.Module):
        super().__init__()
        self.input_adapter = input_adapter
        self.encoder = encoder
        self.output_adapter = output_adapter

    def forward(self, inputs: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """inputs, as the input adapter takes them -> outputs; `pad_mask` (B, M) as of PerceiverIO."""
        latents = self.encoder(self.input_adapter(inputs), pad_mask)  # (B, N, D)
        return self.output_adapter(latents.mean(1, keepdim=True))  # the adapter gets (B, 1, D)


# ----------------------------------------------------------------------------------------------------------------------
# Perceiver AR


@dataclass
class PerceiverARConfig:
    vocab_size: int = 262  # 262 for bytes
    max_seq_len: int = 4096  # T: the longest window the model sees
    num_latents: int = 512  # N: the last positions, those that predict; the other T - N are the prefix
    num_channels: int = 512  # C: of embeddings and latents
    num_heads: int = 8  # H: in all attention layers
    num_self_attention_layers: int = 8  # on the latents, after the one cross-attention
    widening_factor: int = 4  # hidden channels of an MLP / num_channels
    absolute_positions: bool = True  # add position embeddings; then rotary turns half of a head, else all of it
    sinusoidal_positions: bool = False  # absolute positions are fixed sinusoids, not learned
    rotary: bool = True  # in the cross-attention and the first self-attention layers
    num_rotary_layers: int = 1  # self-attention layers with rotary positions, from the first; -1: all
    latent_keys: str = "kv_norm"  # norm of the latents as keys: kv_norm (Google) or q_norm (krasserm)
    output_norm: bool = False  # LayerNorm before the output
    output_bias: bool = True  # bias of the output
    tied_output: bool = True  # the output's weights are those of the token embedding; else its own, zero at first
    latent_projection: bool = False  # the latents start as a linear map of the embedded inputs, else as they are
    bias: bool = False  # biases in all linear maps; else in those of krasserm's code
    activation: str = "gelu"  # of MLPs: gelu or squared_relu (Google)
    cross_attention_dropout: float = 0.0  # share of prefix positions left out of a training step
    post_attention_dropout: float = 0.0  # of attention weights
    residual_dropout: float = 0.0  # of what attention and MLP add to the residual stream
    init_scale: float | None = 0.02  # standard deviation of the initial weights; null: 1 / sqrt(inputs), embeddings 1
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more compute
    z_loss: float = 0.0  # training: weight of log(Z)^2, Z the denominator of the output's softmax
    # Weights to start training from: as `from_pretrained`, or a checkpoint of train.py
    init_from: str | None = field(default=None, kw_only=True)

    def __post_init__(self):
        check_positive(self, "vocab_size", "max_seq_len", "num_latents", "num_channels", "num_heads", "widening_factor")
        check_dropout(self, "cross_attention_dropout", "post_attention_dropout", "residual_dropout")
        if self.num_latents > self.max_seq_len:
            raise ValueError(f"num_latents={self.num_latents} exceeds max_seq_len={self.max_seq_len}; "
                             "latents are the last positions of the context")
        if self.num_channels % self.num_heads:
            raise ValueError(f"num_channels={self.num_channels} is not divisible by num_heads={self.num_heads}")
        if self.num_rotary_channels % 2:
            raise ValueError(f"num_channels={self.num_channels} and num_heads={self.num_heads} leave an odd number of "
                             f"rotary channels, {self.num_rotary_channels}, in a head; they turn in pairs")
        if self.num_self_attention_layers < 0 or not -1 <= self.num_rotary_layers <= self.num_self_attention_layers:
            raise ValueError(f"num_rotary_layers={self.num_rotary_layers} must be -1 or at most "
                             f"num_self_attention_layers={self.num_self_attention_layers}")
        if self.sinusoidal_positions and (self.num_channels % 2 or not self.absolute_positions):
            raise ValueError("sinusoidal_positions=True needs an even number of channels and absolute_positions=True, "
                             f"not num_channels={self.num_channels}, absolute_positions={self.absolute_positions}")
        check_choice(self, "latent_keys", ("kv_norm", "q_norm"))
        check_choice(self, "activation", ACTIVATIONS)
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss} must not be negative")

    @property
    def num_rotary_channels(self) -> int:
        """Channels of a head that rotary positions turn."""
        head_channels = self.num_channels // self.num_heads if self.rotary else 0
        return head_channels // 2 if self.absolute_positions else head_channels

    def num_kept(self, prefix_length: int) -> int:
        """How many of `prefix_length` positions a training step keeps under cross_attention_dropout."""
        return prefix_length - int(prefix_length * self.cross_attention_dropout)

    def build(self) -> "PerceiverAR":
        return PerceiverAR(self)


class PerceiverAR(nn.Module):
    """Perceiver AR (arXiv 2202.07765, section 3): an autoregressive model whose last N inputs are its latents.

    One causal cross-attention lets the latents see the whole context, causal self-attention layers do the rest, and
    each latent predicts the token after it. By default the model is krasserm's: linear maps carry biases where its code
    has them, the cross-attention's output and, optionally, the logits. configs/copy.yaml is Google's model.
    """

    def __init__(self, config: PerceiverARConfig):
        super().__init__()
        self.config = c = config
        layer = dict(widening_factor=c.widening_factor, mlp_bias=c.bias, residual_dropout=c.residual_dropout,
                     qkv_bias=c.bias, dropout=c.post_attention_dropout, activation=c.activation)
        learned_positions = c.absolute_positions and not c.sinusoidal_positions
        self.token_embedding = nn.Embedding(c.vocab_size, c.num_channels)
        self.position_embedding = nn.Embedding(c.max_seq_len, c.num_channels) if learned_positions else None
        self.latent_projection = Linear(c.num_channels, c.num_channels) if c.latent_projection else nn.Identity()
        self.cross_attention = CrossAttentionLayer(c.num_channels, c.num_channels, c.num_heads,
                                                   latent_keys=c.latent_keys, out_bias=True, **layer)
        self.self_attention = nn.ModuleList(SelfAttentionLayer(c.num_channels, c.num_heads, out_bias=c.bias, **layer)
                                            for _ in range(c.num_self_attention_layers))
        self.output_norm = nn.LayerNorm(c.num_channels) if c.output_norm else nn.Identity()
        self.output_weight = None if c.tied_output else nn.Parameter(torch.zeros(c.vocab_size, c.num_channels))
        self.output_bias = nn.Parameter(torch.zeros(c.vocab_size)) if c.output_bias else None
        init_weights(self, c.init_scale)

    def forward(self, input_ids: Tensor, num_latents: int | None = None, pad_mask: Tensor | None = None,
                prefix_keep: Tensor | None = None, cache: "KVCache | None" = None) -> Tensor:
        """Logits (B, N', V) of the token after each of the last `num_latents` = N' of input_ids (B, M).

        num_latents  default min(M, N)
        pad_mask     (B, M), true at padding, which must be on the left: the first real token has position 0
        prefix_keep  (B, P') indices of the prefix positions to see; the others cost nothing. Default: in training
                     `config.num_kept(P)` random ones for every row, otherwise all
        cache        the layers' earlier keys and values, which the new ones join; see `KVCache`

        Raises ValueError if M exceeds max_seq_len or num_latents is not between 1 and min(M, N).
        """
        c, length = self.config, input_ids.shape[1]
        num_latents = min(length, c.num_latents) if num_latents is None else num_latents
        if length > c.max_seq_len:
            raise ValueError(f"{length} tokens are more than max_seq_len={c.max_seq_len}")
        if not 1 <= num_latents <= min(length, c.num_latents):
            raise ValueError(f"num_latents={num_latents} must be between 1 and {min(length, c.num_latents)} "
                             f"for {length} tokens")
        prefix_length = length - num_latents

        positions = torch.arange(length, device=input_ids.device)[None]  # (1, M)
        if cache is not None:
            positions = cache.positions(length)  # (1 or B, M)
        if pad_mask is not None:
            positions = (positions - pad_mask.sum(1, keepdim=True)).clamp(min=0)  # (B, M)

        if prefix_keep is None and self.training and c.num_kept(prefix_length) < prefix_length:
            scores = torch.rand(len(input_ids), prefix_length, device=input_ids.device)
            prefix_keep = scores.topk(c.num_kept(prefix_length)).indices  # (B, P'), in any order
        if prefix_keep is not None:
            # Dropped positions leave before the embedding, so that they cost nothing from here on.
            latents = torch.arange(prefix_length, length, device=input_ids.device).expand(len(input_ids), -1)
            kept = torch.cat((prefix_keep, latents), dim=1)  # (B, P' + N')
            input_ids = input_ids.gather(1, kept)
            positions = positions.expand(len(kept), -1).gather(1, kept)
            pad_mask = None if pad_mask is None else pad_mask.gather(1, kept)

        x = self.token_embedding(input_ids)  # (B, M, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        elif c.sinusoidal_positions:
            x = x + sinusoids(positions + 1, c.num_channels, x.dtype)  # Google's first token has position 1
        rotary = rotary_latents = None
        if c.rotary:
            rotary = rotary_angles(positions, c.num_rotary_channels, x.dtype)
            rotary_latents = tuple(angles[:, :, -num_latents:] for angles in rotary)
        mask = None if pad_mask is None else ~pad_mask[:, None, None, :]  # (B, 1, 1, M)
        latent_mask = None if mask is None else mask[..., -num_latents:]

        latents = self.latent_projection(x[:, -num_latents:])  # (B, N', C)
        x = run_layer(self.cross_attention, c.activation_checkpointing, latents, x, mask=mask, causal=True,
                      rotary_q=rotary_latents, rotary_k=rotary, cache=cache and cache.update_cross)  # (B, N', C)
        for i, layer in enumerate(self.self_attention):
            angles = rotary_latents if c.num_rotary_layers == -1 or i < c.num_rotary_layers else None
            x = run_layer(layer, c.activation_checkpointing, x, mask=latent_mask, causal=True, rotary_q=angles,
                          rotary_k=angles, cache=cache and cache.update_latents(i))
        weight = self.token_embedding.weight if self.output_weight is None else self.output_weight
        return linear(self.output_norm(x), weight, self.output_bias)


class Slots:
    """Which slots of a layer's key/value buffers are in use, and where the next key of every sequence goes."""

    def __init__(self, batch_size: int, size: int, like: Tensor, static: bool):
        self.size, self.like, self.static = size, like, static
        self.used = [0] * batch_size  # slots 0 .. used - 1 of each sequence

    def advance(self) -> None:
        """Takes one more slot of every sequence. A full sequence gives its last one again: it is due for a prefill."""
        start = [min(used, self.size - 1) for used in self.used]
        self.used = [slot + 1 for slot in start]
        self.new = torch.tensor(start, device=self.like.device)  # (B,)
        self.limit = max(self.used)  # keys are read up to here
        if self.static:
            self.limit = min(self.size, max(512, 1 << (self.limit - 1).bit_length()))
        self.bias = None  # sequences of one length see all that is read
        if self.static or min(start) < max(start):
            unseen = torch.arange(self.limit, device=self.like.device) > self.new[:, None]
            self.bias = self.like.new_zeros(unseen.shape).masked_fill(unseen, -torch.inf)[:, None]  # (B, 1, M)


class KVCache:
    """Keys and values of every layer for B sequences that are being continued, in buffers allocated once.

    A sequence owns one row. Its keys lie in the order of their positions and are stored rotated, in the dtype of the
    weights, so that nothing of them changes while tokens are appended. There are two ways to run a model with a cache:

        cache.prefill(rows, M, N'); model(ids (len(rows), M), N', cache=cache)    starts these rows anew
        cache.advance(); model(ids (B, 1), cache=cache)                           appends a token to every row

    Appending is exact, because of causality, as long as the first token and the first latent of the window stay where
    they are; when one of them moves, the row has to be prefilled (sampling.py decides when).

    With `static`, what differs from one appended token to the next is in tensors alone (slots, masks), for
    torch.compile and CUDA graphs; how many keys are read, 512 or the next power of two, changes a few times at most.
    Without it no unused key is read, nor a mask made for sequences of one length.
    """

    def __init__(self, model: PerceiverAR, batch_size: int, static: bool = False):
        c, weight = model.config, model.token_embedding.weight

        def buffers(slots: int) -> tuple[Tensor, Tensor]:
            qk, v = model.cross_attention.attention.head_widths(weight.device)
            rows = batch_size, c.num_heads
            pair = weight.new_zeros(*rows, slots, qk), weight.new_zeros(*rows, v, slots)
            if static and weight.is_cuda:  # or else a CUDA graph would copy the buffers to addresses of its own
                for buffer in pair:
                    torch._dynamo.mark_static_address(buffer)
            return pair

        self.rows: list[int] | None = None  # the rows of a prefill, None when all rows advance
        self.all_rows = torch.arange(batch_size, device=weight.device)
        self.cross = buffers(c.max_seq_len)
        self.latents = [buffers(c.num_latents) for _ in range(c.num_self_attention_layers)]
        self.cross_slots = Slots(batch_size, c.max_seq_len, weight, static)
        self.latent_slots = Slots(batch_size, c.num_latents, weight, static)

    def prefill(self, rows: list[int], num_tokens: int, num_latents: int) -> None:
        """The next forward starts `rows` anew, with `num_tokens` tokens each of which the last are latents."""
        self.rows = rows
        for row in rows:
            self.cross_slots.used[row], self.latent_slots.used[row] = num_tokens, num_latents

    def advance(self) -> None:
        """The next forward appends one token, a latent, to every row."""
        self.rows = None
        self.cross_slots.advance()
        self.latent_slots.advance()

    def positions(self, length: int) -> Tensor:
        """Positions in their windows (1 or B, length) of the next forward's tokens."""
        return self.all_rows.new_ones(length).cumsum(0)[None] - 1 if self.rows else self.cross_slots.new[:, None]

    def update_cross(self, k: Tensor, v: Tensor):
        return self.update(self.cross, self.cross_slots, k, v)

    def update_latents(self, layer: int) -> Callable:
        return lambda k, v: self.update(self.latents[layer], self.latent_slots, k, v)

    def update(self, buffers: tuple[Tensor, Tensor], slots: Slots, k: Tensor, v: Tensor):
        """Stores new keys and values (B, H, n, C/H); returns those to attend to, and the bias of `attend_once`."""
        keys, values = buffers  # (B, H, slots, C/H), (B, H, C/H, slots)
        if self.rows:
            keys[self.rows, :, : k.shape[2]], values[self.rows, ..., : v.shape[2]] = k, v.mT
            return k, v, None
        if slots.bias is None:  # the same slot of every row: cheaper than indices, 5% of a token on the CPU
            slot = slice(slots.limit - 1, slots.limit)
            keys[:, :, slot], values[..., slot] = k, v.mT
        else:
            keys[self.all_rows, :, slots.new], values[self.all_rows, ..., slots.new] = k[:, :, 0], v[:, :, 0]
        return keys[:, :, : slots.limit], values[..., : slots.limit].mT, slots.bias
