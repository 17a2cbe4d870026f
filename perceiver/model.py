"""The models: attention, the two kinds of layers, and Perceiver AR with its key/value cache.

Letters used for shapes, as in the papers:

    B batch    M inputs (keys)    N latents (queries)    C channels    H heads    V vocabulary
    T context length of Perceiver AR    P length of its prefix, the M - N inputs that are no latents

Perceiver (arXiv 2103.03206), Perceiver IO (2107.14795) and Perceiver AR (2202.07765) are one idea: a few latents
attend to many inputs, once, and all depth is spent on the latents. So the cost of a layer does not depend on M, and
nothing of size M x M ever exists.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0):
    """Scaled dot-product attention of q (B, H, N, C/H) on k and v (B, H, M, C/H) -> (B, H, N, C/H).

    `mask` is boolean, broadcastable to (B, H, N, M), true where a query may look; a query that may look nowhere gets
    zeros, as in DeepMind's code. `causal` takes the queries for the last N of the M positions: query i sees the keys
    up to M - N + i.
    """
    n, m = q.shape[-2], k.shape[-2]
    causal = causal and n > 1  # a single query is the last position: it sees everything
    if mask is None:
        bias, square = None, causal and n == m
        if causal and not square:
            # `is_causal=True` would align the triangle to the first key, not to the last. On CUDA this bias picks the
            # flash kernel and costs no memory; elsewhere it is an (N, M) mask.
            bias = causal_lower_right(n, m) if q.is_cuda else q.new_ones(n, m, dtype=torch.bool).tril(m - n)
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=square)
    if causal:
        mask = mask & mask.new_ones(n, m).tril(m - n)
    blind = ~mask.any(-1, keepdim=True)  # an empty softmax would be NaN: look everywhere, then forget it
    return F.scaled_dot_product_attention(q, k, v, mask | blind, dropout).masked_fill(blind, 0.0)


def rotary_angles(positions: Tensor, num_channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, M, num_channels / 2) of the rotary encoding (arXiv 2104.09864) of positions (B, M).

    Pair i of channels turns by position * 10000^(-2i / num_channels). Angles are float32 at least: bfloat16 can't tell
    position 257 from 258.
    """
    exact = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, num_channels, 2, device=positions.device, dtype=exact)
    angles = positions[:, None, :, None] * 10_000.0 ** (-pairs / num_channels)  # (B, 1, M, num_channels / 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
    products with parts of the weights uses all cores: on two (AMD EPYC) a row takes 0.3 of the time. It no longer pays
    from 8 rows on, nor in bfloat16, which takes another path.
    """
    rows = x.numel() // x.shape[-1]
    if not x.is_cpu or not 1 <= rows <= 4 or x.dtype.itemsize < 4:
        return F.linear(x, weight, bias)
    parts = math.gcd(weight.shape[0], 16)
    columns = x.reshape(1, rows, -1).mT.expand(parts, -1, -1)  # (parts, in, rows)
    y = torch.bmm(weight.view(parts, -1, x.shape[-1]), columns)  # (parts, out / parts, rows)
    y = y.view(-1, rows).t().view(*x.shape[:-1], -1)
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

    def forward(self, x_q: Tensor, x_kv: Tensor, mask: Tensor | None = None, causal: bool = False,
                rotary_q=None, rotary_k=None, cache: Callable | None = None) -> Tensor:
        """x_q (B, N, Cq), x_kv (B, M, Ckv) -> (B, N, Cq). `cache` takes the new keys and values and returns those to
        attend to, with the mask that goes with them."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N or M, C/H)
                   for x in (self.q(x_q), self.k(x_kv), self.v(x_kv)))
        if rotary_q is not None:
            q, k = rotate(q, rotary_q), rotate(k, rotary_k)
        if cache is not None:
            k, v, mask = cache(k, v)
        x = attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)  # (B, H, N, C/H)
        return self.out(x.transpose(1, 2).flatten(-2))


class MLP(nn.Sequential):
    """LayerNorm and two linear maps with a GELU between them: (..., C) -> (..., C)."""

    def __init__(self, num_channels: int, widening_factor: int = 1, bias: bool = True):
        super().__init__(
            nn.LayerNorm(num_channels),
            Linear(num_channels, widening_factor * num_channels, bias=bias),
            nn.GELU(),
            Linear(widening_factor * num_channels, num_channels, bias=bias),
        )


class CrossAttentionLayer(nn.Module):
    """Queries attend to keys and values of another array, then an MLP; pre-norm, residual around both.

    `latent_keys` says how Perceiver AR's latents, the last of the keys, are normalised: "kv_norm" as all keys (Google's
    code), "q_norm" by the norm of the queries (krasserm's).
    """

    def __init__(self, num_q_channels: int, num_kv_channels: int, num_heads: int, widening_factor: int = 1,
                 mlp_bias: bool = True, residual_dropout: float = 0.0, latent_keys: str = "kv_norm", **attention):
        super().__init__()
        self.latent_keys = latent_keys
        self.q_norm = nn.LayerNorm(num_q_channels)
        self.kv_norm = nn.LayerNorm(num_kv_channels)
        self.attention = Attention(num_q_channels, num_kv_channels, num_heads, **attention)
        self.mlp = MLP(num_q_channels, widening_factor, mlp_bias)
        self.dropout = nn.Dropout(residual_dropout)

    def forward(self, x_q: Tensor, x_kv: Tensor, **kwargs) -> Tensor:
        """x_q (B, N, Cq), x_kv (B, M, Ckv) -> (B, N, Cq); the rest as `Attention.forward`."""
        q = self.q_norm(x_q)
        if self.latent_keys == "q_norm":
            kv = torch.cat((self.kv_norm(x_kv[:, : -x_q.shape[1]]), q), dim=1)
        else:
            kv = self.kv_norm(x_kv)
        x = x_q + self.dropout(self.attention(q, kv, **kwargs))
        return x + self.dropout(self.mlp(x))


class SelfAttentionLayer(nn.Module):
    """A Transformer layer on the latents; pre-norm."""

    def __init__(self, num_channels: int, num_heads: int, widening_factor: int = 1, mlp_bias: bool = True,
                 residual_dropout: float = 0.0, **attention):
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)
        self.attention = Attention(num_channels, num_channels, num_heads, **attention)
        self.mlp = MLP(num_channels, widening_factor, mlp_bias)
        self.dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        """(B, N, C) -> (B, N, C); the rest as `Attention.forward`."""
        h = self.norm(x)
        x = x + self.dropout(self.attention(h, h, **kwargs))
        return x + self.dropout(self.mlp(x))


def init_weights(model: nn.Module, std: float) -> None:
    """Linear and embedding weights normal with `std`, biases zero (krasserm's code and the Hugging Face port)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


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
    absolute_positions: bool = True  # add learned position embeddings; then rotary turns half of a head, else all of it
    num_rotary_layers: int = 1  # self-attention layers with rotary positions, from the first; -1: all
    latent_keys: str = "kv_norm"  # norm of the latents as keys: kv_norm (Google) or q_norm (krasserm)
    output_norm: bool = False  # LayerNorm before the output
    output_bias: bool = True  # bias of the output, which is tied to the token embedding
    cross_attention_dropout: float = 0.0  # share of prefix positions left out of a training step
    post_attention_dropout: float = 0.0  # of attention weights
    residual_dropout: float = 0.0  # of what attention and MLP add to the residual stream
    init_scale: float = 0.02  # standard deviation of the initial weights
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more compute

    def __post_init__(self):
        for name in ("vocab_size", "max_seq_len", "num_latents", "num_channels", "num_heads", "widening_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("cross_attention_dropout", "post_attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
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
        if self.latent_keys not in ("kv_norm", "q_norm"):
            raise ValueError(f"latent_keys={self.latent_keys!r} must be kv_norm or q_norm")

    @property
    def num_rotary_channels(self) -> int:
        """Channels of a head that rotary positions turn."""
        head_channels = self.num_channels // self.num_heads
        return head_channels // 2 if self.absolute_positions else head_channels


class PerceiverAR(nn.Module):
    """Perceiver AR (arXiv 2202.07765, section 3): an autoregressive model whose last N inputs are its latents.

    One causal cross-attention lets the latents see the whole context, causal self-attention layers do the rest, and
    each latent predicts the token after it. Linear maps carry biases where krasserm's code has them, so that its
    weights load: the cross-attention's output and, optionally, the logits.
    """

    def __init__(self, config: PerceiverARConfig):
        super().__init__()
        self.config = c = config
        layer = dict(widening_factor=c.widening_factor, mlp_bias=False, residual_dropout=c.residual_dropout,
                     qkv_bias=False, dropout=c.post_attention_dropout)
        self.token_embedding = nn.Embedding(c.vocab_size, c.num_channels)
        self.position_embedding = nn.Embedding(c.max_seq_len, c.num_channels) if c.absolute_positions else None
        self.cross_attention = CrossAttentionLayer(c.num_channels, c.num_channels, c.num_heads,
                                                   latent_keys=c.latent_keys, out_bias=True, **layer)
        self.self_attention = nn.ModuleList(SelfAttentionLayer(c.num_channels, c.num_heads, out_bias=False, **layer)
                                            for _ in range(c.num_self_attention_layers))
        self.output_norm = nn.LayerNorm(c.num_channels) if c.output_norm else nn.Identity()
        self.output_bias = nn.Parameter(torch.zeros(c.vocab_size)) if c.output_bias else None
        init_weights(self, c.init_scale)

    def num_kept(self, prefix_length: int) -> int:
        """How many of `prefix_length` positions a training step keeps under cross_attention_dropout."""
        return prefix_length - int(prefix_length * self.config.cross_attention_dropout)

    def forward(self, input_ids: Tensor, num_latents: int | None = None, pad_mask: Tensor | None = None,
                prefix_keep: Tensor | None = None, cache: "KVCache | None" = None) -> Tensor:
        """Logits (B, N', V) of the token after each of the last `num_latents` = N' of input_ids (B, M).

        num_latents  default min(M, N)
        pad_mask     (B, M), true at padding, which must be on the left: the first real token has position 0
        prefix_keep  (B, P') indices of the prefix positions to see; the others cost nothing. Default: in training
                     `num_kept(P)` random ones for every row, otherwise all
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

        if prefix_keep is None and self.training and self.num_kept(prefix_length) < prefix_length:
            scores = torch.rand(len(input_ids), prefix_length, device=input_ids.device)
            prefix_keep = scores.topk(self.num_kept(prefix_length)).indices  # (B, P'), in any order
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
        rotary = rotary_angles(positions, c.num_rotary_channels, x.dtype)
        rotary_latents = tuple(angles[:, :, -num_latents:] for angles in rotary)
        mask = None if pad_mask is None else ~pad_mask[:, None, None, :]  # (B, 1, 1, M)
        latent_mask = None if mask is None else mask[..., -num_latents:]

        x = self.run_layer(self.cross_attention, x[:, -num_latents:], x, mask=mask, causal=True,
                           rotary_q=rotary_latents, rotary_k=rotary, cache=cache and cache.update_cross)  # (B, N', C)
        for i, layer in enumerate(self.self_attention):
            angles = rotary_latents if c.num_rotary_layers == -1 or i < c.num_rotary_layers else None
            x = self.run_layer(layer, x, mask=latent_mask, causal=True, rotary_q=angles, rotary_k=angles,
                               cache=cache and cache.update_latents(i))
        return linear(self.output_norm(x), self.token_embedding.weight, self.output_bias)

    def run_layer(self, layer: nn.Module, *args, **kwargs) -> Tensor:
        if self.training and self.config.activation_checkpointing:
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)


class Slots:
    """Which slots of a layer's key/value buffers are in use, and where the next key of every sequence goes."""

    def __init__(self, batch_size: int, size: int, device: torch.device):
        self.size, self.device = size, device
        self.used = [0] * batch_size  # slots 0 .. used - 1 of each sequence

    def advance(self) -> None:
        """Takes one more slot of every sequence. A full sequence gives its last one again: it is due for a prefill."""
        start = [min(used, self.size - 1) for used in self.used]
        self.used = [slot + 1 for slot in start]
        self.limit = max(self.used)  # keys are read up to here
        self.new = torch.tensor(start, device=self.device)  # (B,)
        self.mask = None  # sequences of one length see all that is read
        if min(start) < max(start):
            self.mask = (torch.arange(self.limit, device=self.device) <= self.new[:, None])[:, None, None]  # (B,1,1,M)


class KVCache:
    """Keys and values of every layer for B sequences that are being continued, in buffers allocated once.

    A sequence owns one row. Its keys lie in the order of their positions and are stored rotated, so that nothing of
    them changes while tokens are appended. There are two ways to run the model with a cache:

        cache.prefill(rows, M, N'); model(ids (len(rows), M), N', cache=cache)    starts these rows anew
        cache.advance(); model(ids (B, 1), cache=cache)                           appends a token to every row

    Appending is exact, because of causality, as long as the first token and the first latent of the window stay where
    they are; when one of them moves, the row has to be prefilled (sampling.py decides when).
    """

    def __init__(self, model: PerceiverAR, batch_size: int):
        c, weight = model.config, model.token_embedding.weight

        def buffers(slots: int) -> tuple[Tensor, Tensor]:
            shape = (batch_size, c.num_heads, slots, c.num_channels // c.num_heads)
            return weight.new_zeros(shape), weight.new_zeros(shape)

        self.rows: list[int] | None = None  # the rows of a prefill, None when all rows advance
        self.all_rows = torch.arange(batch_size, device=weight.device)
        self.cross = buffers(c.max_seq_len)
        self.latents = [buffers(c.num_latents) for _ in range(c.num_self_attention_layers)]
        self.cross_slots = Slots(batch_size, c.max_seq_len, weight.device)
        self.latent_slots = Slots(batch_size, c.num_latents, weight.device)

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
        """Stores new keys and values (B, H, n, C/H); returns keys and values to attend to, and their mask."""
        if self.rows:
            for buffer, new in zip(buffers, (k, v)):
                buffer[self.rows, :, : new.shape[2]] = new
            return k, v, None
        for buffer, new in zip(buffers, (k, v)):
            if slots.mask is None:  # the same slot of every row: cheaper than indices, 5% of a token on the CPU
                buffer[:, :, slots.limit - 1 : slots.limit] = new
            else:
                buffer[self.all_rows, :, slots.new] = new[:, :, 0]
        k, v = (buffer[:, :, : slots.limit] for buffer in buffers)  # (B, H, limit, C/H)
        return k, v, slots.mask
