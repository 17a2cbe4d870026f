"""The models: Perceiver, Perceiver IO and Perceiver AR, and the two kinds of layers they consist of.

Perceiver (arXiv 2103.03206), Perceiver IO (2107.14795) and Perceiver AR (2202.07765) share one idea. A few latents
attend to many inputs, once or a few times, and all other layers run on the latents. The cost of those layers does not
depend on the number of inputs, and no array of size M x M ever exists.

Letters in shapes, as in the papers:

    B batch    M inputs (keys)    N latents (queries)    C channels    H heads    V vocabulary
    D channels of the latents    O outputs    F channels of their queries    E channels of the outputs
    T context length of Perceiver AR    P length of its prefix, the M - N inputs that are not latents

attention.py holds the attention itself, adapters.py inputs and outputs, decoding.py the generation of tokens.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver.attention import (
    Attention,
    KeysValues,
    LayerCache,
    Linear,
    Unprojected,
    linear,
    mask_of_padding,
    rotary_angles,
    sinusoids,
    to_autocast_dtype,
)

# Types of config fields with their rules. config.py checks the rules when it reads a config.
# Options marked "compatibility" exist only to run the weights of other code.
Count = Annotated[int, "[1, inf)"]
Layers = Annotated[int, "[1, 1000]"]  # a config of a stranger must not ask for layers without end
Scale = Annotated[float, "(0, inf)"]
Share = Annotated[float, "[0, 1)"]
NgramSizes = tuple[Annotated[int, "[2, inf)"], ...]

# ----------------------------------------------------------------------------------------------------------------------
# Layers


class SquaredReLU(nn.Module):
    """max(x, 0)^2 (arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS = {
    "gelu": nn.GELU,  # exact: krasserm's code and the Hugging Face port
    "gelu_tanh": lambda: nn.GELU("tanh"),  # DeepMind's code
    "squared_relu": SquaredReLU,  # Google's Perceiver AR
}


class MLP(nn.Sequential):
    """LayerNorm and two linear maps with an activation between them: (..., C) -> (..., C)."""

    def __init__(self, num_channels: int, widening_factor=1, bias=True, activation="gelu"):
        num_hidden = widening_factor * num_channels
        super().__init__(
            nn.LayerNorm(num_channels),
            Linear(num_channels, num_hidden, bias),
            ACTIVATIONS[activation](),
            Linear(num_hidden, num_channels, bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        norm, widen, activation, narrow = self
        hidden = widen(x, before=norm)
        return narrow(hidden, before=activation)


class CrossAttentionLayer(nn.Module):
    """Queries of one array attend to another array; an MLP follows. Pre-norm, with residuals around both."""

    def __init__(
        self,
        num_q_channels: int,
        num_kv_channels: int,
        num_heads: int,
        widening_factor=1,
        bias=True,
        activation="gelu",
        residual_dropout=0.0,
        query_residual=True,
        latent_keys="kv_norm",
        **attention,
    ):
        """bias            of the MLP and the maps to queries, keys and values; the attention's output always has one
        query_residual  false removes the residual around the attention: right for decoders whose queries and outputs
                        differ in meaning (Perceiver IO, appendix E.1)
        latent_keys     as in PerceiverARConfig
        attention       more options of `Attention`
        """
        super().__init__()
        self.query_residual = query_residual
        self.latent_keys = latent_keys
        self.q_norm = nn.LayerNorm(num_q_channels)
        self.kv_norm = nn.LayerNorm(num_kv_channels)
        self.attention = Attention(num_q_channels, num_kv_channels, num_heads, qkv_bias=bias, **attention)
        self.mlp = MLP(num_q_channels, widening_factor, bias, activation)
        self.dropout = nn.Dropout(residual_dropout)

    def forward(self, x_q: Tensor, x_kv: Tensor | KeysValues, **kwargs) -> Tensor:
        """x_q (B, N, Cq) and x_kv (B, M, Ckv) -> (B, N, Cq). x_kv may also be the result of `Attention.keys_values`.

        The keywords are those of `Attention.forward`.
        """
        q = self.q_norm(x_q)
        kv_norm = self.kv_norm
        if self.latent_keys == "q_norm":
            num_latents = x_q.shape[1]
            prefix = self.kv_norm(x_kv[:, :-num_latents])
            x_kv = torch.cat((prefix, q), dim=1)
            kv_norm = None
        x = self.dropout(self.attention(q, x_kv, kv_norm=kv_norm, **kwargs))
        if self.query_residual:
            x = x_q + x
        return x + self.dropout(self.mlp(x))


class SelfAttentionLayer(nn.Module):
    """A Transformer layer on the latents; pre-norm."""

    def __init__(
        self,
        num_channels: int,
        num_heads: int,
        widening_factor=1,
        bias=True,
        activation="gelu",
        residual_dropout=0.0,
        **attention,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)
        self.attention = Attention(num_channels, num_channels, num_heads, qkv_bias=bias, out_bias=bias, **attention)
        self.mlp = MLP(num_channels, widening_factor, bias, activation)
        self.dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        """(B, N, C) -> (B, N, C). The keywords are those of `Attention.forward`."""
        h = to_autocast_dtype(self.norm(x))
        x = x + self.dropout(self.attention(h, h, **kwargs))
        return x + self.dropout(self.mlp(x))


def init_weights(model: nn.Module, std: float | None):
    """Draws the weights of linear maps, convolutions and embeddings from a normal distribution; biases become zero.

    `std` is its standard deviation, as in krasserm's code and the Hugging Face port. None: 1 for embeddings and
    1 / sqrt(inputs) for the others, as in Google's code, which also cuts the tails. Latents and trained positions are
    embeddings too.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            num_inputs = 1
        elif isinstance(module, nn.Linear | nn.Conv2d):
            num_inputs = module.weight[0].numel()
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            continue
        nn.init.normal_(module.weight, std=num_inputs**-0.5 if std is None else std)


class TokenEmbedding(nn.Embedding):
    """Tokens (B, M) -> (B, M, C): the vector of each token, plus one for each n-gram that ends with it.

    An n-gram is n successive tokens. A hash of them selects its vector from a table of `num_buckets`; there is a table
    for each n in `ngram_sizes`. So different n-grams may share a vector. These vectors tell the model of bytes about
    words (Byte Latent Transformer, arXiv 2412.09871, section 3.2.1). They start at 0.
    """

    MULTIPLIER = 1_000_000_007  # of the polynomial hash: a prime, larger than any vocabulary

    def __init__(self, vocab_size: int, num_channels: int, ngram_sizes: tuple[int, ...], num_buckets: int):
        super().__init__(vocab_size, num_channels)
        self.ngram_sizes = ngram_sizes
        self.num_buckets = num_buckets
        self.ngrams = None
        if ngram_sizes:
            self.ngrams = nn.Parameter(torch.zeros(len(ngram_sizes) * num_buckets, num_channels))

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """`positions` (B, M') selects the tokens to embed; default: all. The n-grams are those of the whole input."""
        indices = self.ngram_indices(input_ids)
        if positions is not None:
            input_ids = input_ids.gather(1, positions)
            indices = [index.gather(1, positions) for index in indices]
        x = super().forward(input_ids)
        for index in indices:
            x = x + F.embedding(index, self.ngrams)
        return x

    def ngram_indices(self, input_ids: Tensor) -> list[Tensor]:
        """For each size, the index (B, M) of the vector of the n-gram that ends with each token.

        Tokens before the first one count as 0.
        """
        indices = []
        for table, size in enumerate(self.ngram_sizes):
            hashed = torch.zeros_like(input_ids)
            for distance in range(size):
                earlier = F.pad(input_ids, (distance, 0))[:, : input_ids.shape[1]]
                hashed = self.MULTIPLIER * hashed + earlier  # int64 wraps around
            indices.append(hashed % self.num_buckets + table * self.num_buckets)
        return indices


def run_layer(layer: nn.Module, config, *args, **kwargs) -> Tensor:
    """layer(*args, **kwargs). With `activation_checkpointing`, the backward pass recomputes the layer's activations."""
    if config.activation_checkpointing and layer.training:
        return checkpoint(layer, *args, use_reentrant=False, **kwargs)
    return layer(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Perceiver and Perceiver IO


@dataclass
class CrossAttentionConfig:
    """Options that encoders and decoders share."""

    num_cross_attention_heads: Count = 8  # H
    num_cross_attention_qk_channels: Count | None = None  # of queries and keys; null: channels of the key/value input
    num_cross_attention_v_channels: Count | None = None  # of values; null: channels of the keys
    cross_attention_widening_factor: Count = 1  # hidden channels of the MLP / its channels
    activation: Literal["gelu", "gelu_tanh"] = "gelu_tanh"  # of MLPs: exact GELU, or DeepMind's approximation
    dropout: Share = 0.0  # of attention weights
    residual_dropout: Share = 0.0  # of attention and MLP outputs, before they join the residual stream
    init_scale: Scale = 0.02  # standard deviation of the initial weights
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more compute

    def cross_attention(self, num_q_channels: int, num_kv_channels: int, **kwargs) -> CrossAttentionLayer:
        return CrossAttentionLayer(
            num_q_channels,
            num_kv_channels,
            self.num_cross_attention_heads,
            self.cross_attention_widening_factor,
            num_qk_channels=self.num_cross_attention_qk_channels,
            num_v_channels=self.num_cross_attention_v_channels,
            activation=self.activation,
            dropout=self.dropout,
            residual_dropout=self.residual_dropout,
            **kwargs,
        )


@dataclass
class PerceiverEncoderConfig(CrossAttentionConfig):
    num_cross_attention_layers: Layers = 1  # one before each self-attention block, from the first block on
    first_cross_attention_layer_shared: bool = False  # the first shares the weights of the others; compatibility
    num_self_attention_blocks: Layers = 1  # blocks of layers; they share their weights
    num_self_attention_layers_per_block: Layers = 6  # each with its own weights
    first_self_attention_block_shared: bool = True  # the first shares the weights of the others
    num_self_attention_heads: Count = 8  # H
    num_self_attention_qk_channels: Count | None = None  # of queries and keys; null: channels of the latents
    num_self_attention_v_channels: Count | None = None  # of values; null: channels of the keys
    self_attention_widening_factor: Count = 1  # hidden channels of an MLP / its channels

    def __post_init__(self):
        if self.num_cross_attention_layers > self.num_self_attention_blocks:
            raise ValueError(
                f"num_cross_attention_layers={self.num_cross_attention_layers} exceeds "
                f"num_self_attention_blocks={self.num_self_attention_blocks}; each runs before a block of its own"
            )

    def self_attention_block(self, num_channels: int) -> nn.ModuleList:
        return nn.ModuleList(
            SelfAttentionLayer(
                num_channels,
                self.num_self_attention_heads,
                self.self_attention_widening_factor,
                num_qk_channels=self.num_self_attention_qk_channels,
                num_v_channels=self.num_self_attention_v_channels,
                activation=self.activation,
                dropout=self.dropout,
                residual_dropout=self.residual_dropout,
                name="encoder.num_self_attention",
            )
            for _ in range(self.num_self_attention_layers_per_block)
        )


class PerceiverEncoder(nn.Module):
    """Inputs to latents (Perceiver, section 3; Perceiver IO, section 3.1).

    Learned latents attend to the inputs, then a block of self-attention layers runs on them. Both may repeat: Perceiver
    attends several times, Perceiver IO once. All cross-attentions share their weights, and so do all blocks; the first
    of each may have its own.
    """

    def __init__(
        self, config: PerceiverEncoderConfig, num_latents: int | None, num_latent_channels: int, num_input_channels: int
    ):
        """num_latents=None: no learned latents; each call of `forward` gets its own."""
        super().__init__()
        self.config = c = config
        self.latents = nn.Embedding(num_latents, num_latent_channels) if num_latents else None
        # Each list holds the weights of the first cross-attention or block, then those of all others if they differ.
        num_layers = 1 if c.first_cross_attention_layer_shared else min(c.num_cross_attention_layers, 2)
        self.cross_attention = nn.ModuleList(
            c.cross_attention(num_latent_channels, num_input_channels, name="encoder.num_cross_attention")
            for _ in range(num_layers)
        )
        num_blocks = 1 if c.first_self_attention_block_shared else min(c.num_self_attention_blocks, 2)
        self.self_attention = nn.ModuleList(c.self_attention_block(num_latent_channels) for _ in range(num_blocks))
        init_weights(self, c.init_scale)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None, latents: Tensor | None = None) -> Tensor:
        """x (B, M, C) -> latents (B, N, D). `pad_mask` (B, M) is true at inputs to ignore.

        `latents` (B, N, D), computed by another network, replace the learned ones.
        """
        c = self.config
        mask = mask_of_padding(pad_mask)
        if latents is None:
            latents = self.latents.weight.expand(x.shape[0], -1, -1)
        shared_from = len(self.cross_attention) - 1  # from this cross-attention on, all have the same weights
        keys_values = x
        for i in range(c.num_self_attention_blocks):
            which = -1 if i else 0  # index of the weights: the first, or those of the others
            if i < c.num_cross_attention_layers:
                layer = self.cross_attention[which]
                if i <= shared_from and c.num_cross_attention_layers > 1:
                    # Once for all calls with the same weights. Unprojected inputs serve the other weights, too.
                    keys_values = layer.attention.keys_values(x, layer.kv_norm, num_queries=latents.shape[1])
                    if isinstance(keys_values, Unprojected):
                        x = keys_values
                latents = run_layer(layer, c, latents, keys_values, mask=mask)
            for layer in self.self_attention[which]:
                latents = run_layer(layer, c, latents)
        return latents

    def attention_map(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Attention weights (B, H, N, M) of the latents over the inputs x (B, M, C) in the first cross-attention.

        The weights of a latent sum to 1 over M. `forward` never holds them; a picture needs them.
        """
        layer = self.cross_attention[0]
        queries = layer.q_norm(self.latents.weight[None])
        return layer.attention.weights(queries, layer.kv_norm(x), mask_of_padding(pad_mask))


@dataclass
class PerceiverDecoderConfig(CrossAttentionConfig):
    cross_attention_residual: bool = True  # add the queries to the output of the attention
    num_query_channels: Count | None = None  # F, of trained queries; null: channels of latents or tied embeddings


class PerceiverDecoder(nn.Module):
    """Queries attend to the latents (Perceiver IO, section 3.2). They do not see each other."""

    def __init__(self, config: PerceiverDecoderConfig, num_latent_channels: int, num_query_channels: int):
        super().__init__()
        self.config = config
        self.cross_attention = config.cross_attention(
            num_query_channels,
            num_latent_channels,
            query_residual=config.cross_attention_residual,
            name="decoder.num_cross_attention",
        )
        init_weights(self, config.init_scale)

    def forward(self, queries: Tensor, latents: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """queries (B, O, F) and latents (B, N, D) -> (B, O, F).

        Queries where `pad_mask` (B, O) is true get zeros from the attention, as in DeepMind's code.
        """
        mask = None if pad_mask is None else ~pad_mask[:, None, :, None]  # (B, 1, O, 1)
        return run_layer(self.cross_attention, self.config, queries, latents, mask=mask)


@dataclass
class PerceiverIOConfig:
    """Options of all Perceiver IO models. A task adds its own, such as `input`."""

    num_latents: Count = 256  # N
    num_latent_channels: Count = 512  # D
    encoder: PerceiverEncoderConfig = field(default_factory=PerceiverEncoderConfig)
    decoder: PerceiverDecoderConfig | None = field(default_factory=PerceiverDecoderConfig)
    # Training starts from these weights: a checkpoint of train.py, or published weights
    init_from: str | None = field(default=None, kw_only=True)

    def build_encoder(self, num_input_channels: int) -> PerceiverEncoder:
        return PerceiverEncoder(self.encoder, self.num_latents, self.num_latent_channels, num_input_channels)


class PerceiverIO(nn.Module):
    """Perceiver IO (arXiv 2107.14795): any inputs to any outputs.

    Three parts depend on the modality; adapters.py has several of each:

        input_adapter(inputs) -> (B, M, C)
        query_provider(adapted inputs (B, M, C), output_positions) -> queries (B, O, F)
        output_adapter(decoded queries (B, O, F)) -> outputs
    """

    def __init__(
        self,
        input_adapter: nn.Module,
        encoder: PerceiverEncoder,
        query_provider: nn.Module,
        decoder: PerceiverDecoder,
        output_adapter: nn.Module,
    ):
        super().__init__()
        self.input_adapter = input_adapter
        self.encoder = encoder
        self.query_provider = query_provider
        self.decoder = decoder
        self.output_adapter = output_adapter

    def forward(self, inputs: Tensor, pad_mask: Tensor | None = None, output_positions: Tensor | None = None) -> Tensor:
        """Inputs of the input adapter -> outputs of the output adapter.

        pad_mask          (B, M), true at padded inputs, which the latents ignore
        output_positions  (O') or (B, O'), indices of the outputs to compute. Default: all
        """
        x, latents = self.encode(inputs, pad_mask)
        return self.decode(x, latents, output_positions)

    def encode(self, inputs: Tensor, pad_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs -> adapted inputs (B, M, C) and latents (B, N, D), for one or more calls of `decode`."""
        x = self.input_adapter(inputs)
        return x, self.encoder(x, pad_mask)

    def decode(self, x: Tensor, latents: Tensor, output_positions: Tensor | None = None) -> Tensor:
        """Adapted inputs x (B, M, C) and latents (B, N, D) -> outputs. `output_positions` are those of `forward`."""
        queries = self.query_provider(x, output_positions)  # (B, O, F)
        return self.output_adapter(self.decoder(queries, latents))


class Perceiver(nn.Module):
    """The original Perceiver (arXiv 2103.03206): the output comes from the mean of the latents."""

    def __init__(self, input_adapter: nn.Module, encoder: PerceiverEncoder, output_adapter: nn.Module):
        super().__init__()
        self.input_adapter = input_adapter
        self.encoder = encoder
        self.output_adapter = output_adapter

    def forward(self, inputs: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Inputs and `pad_mask` (B, M), as in PerceiverIO -> outputs."""
        latents = self.encoder(self.input_adapter(inputs), pad_mask)  # (B, N, D)
        return self.output_adapter(latents.mean(1, keepdim=True))  # the adapter gets (B, 1, D)


# ----------------------------------------------------------------------------------------------------------------------
# Perceiver AR


@dataclass
class PerceiverARConfig:
    vocab_size: Count | None = None  # V; null: the task sets it
    max_seq_len: Count = 4096  # T: the longest context
    num_latents: Count = 512  # N: the last N positions are latents and predict; the other T - N are the prefix
    num_channels: Count = 512  # C: of embeddings and latents
    num_heads: Count = 8  # H: in all attention layers
    num_self_attention_layers: Annotated[int, "[0, 1000]"] = 8  # on the latents, after the cross-attention
    # krasserm: rotary positions, GELU, an output tied to the embeddings, few biases.
    # google: sinusoids, squared ReLU, an untied output that starts at zero, biases everywhere, a latent projection.
    architecture: Literal["krasserm", "google"] = "krasserm"
    # Options of krasserm's architecture
    absolute_positions: bool = True  # learned positions; rotary positions then turn half of each head, else all of it
    num_rotary_layers: Annotated[int, "[-1, inf)"] = 1  # self-attention layers with rotary positions; -1: all
    output_norm: bool = False  # LayerNorm before the output; google has one
    ngram_sizes: NgramSizes = ()  # embed the n-grams of these n, too; see TokenEmbedding
    num_ngram_buckets: Count = 20_000  # vectors for each n
    output_bias: bool = True  # bias of the output
    init_scale: Scale = 0.02  # standard deviation of the initial weights; google: 1 / sqrt(inputs), embeddings 1
    latent_keys: Literal["kv_norm", "q_norm"] = "kv_norm"  # LayerNorm of latents as keys; q_norm: compatibility
    # Training
    cross_attention_dropout: Share = 0.0  # fraction of the prefix positions that a training step drops
    post_attention_dropout: Share = 0.0  # of attention weights
    residual_dropout: Share = 0.0  # of attention and MLP outputs, before they join the residual stream
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third more compute
    z_loss: Annotated[float, "[0, inf)"] = 0.0  # weight of log(Z)^2 in the loss; Z is the softmax denominator
    # Training starts from these weights: a checkpoint of train.py, or published weights
    init_from: str | None = None

    def __post_init__(self):
        if self.architecture == "google":
            if self.num_channels % 2:
                raise ValueError(f"num_channels={self.num_channels} must be even: half for sines, half for cosines")
            options = (
                "absolute_positions",
                "num_rotary_layers",
                "output_norm",
                "output_bias",
                "init_scale",
                "latent_keys",
                "ngram_sizes",
            )
            for name in options:
                default = getattr(PerceiverARConfig, name)
                if getattr(self, name) != default:
                    raise ValueError(f"architecture=google has no option {name}; leave it at {default}")
        if self.num_latents > self.max_seq_len:
            raise ValueError(
                f"num_latents={self.num_latents} exceeds max_seq_len={self.max_seq_len}; "
                "latents are the last positions of the context"
            )
        if self.num_channels % self.num_heads:
            raise ValueError(f"num_channels={self.num_channels} is not divisible by num_heads={self.num_heads}")
        if self.num_rotary_channels % 2:
            raise ValueError(
                f"num_channels={self.num_channels} and num_heads={self.num_heads} give {self.num_rotary_channels} "
                "rotary channels in each head; the number must be even, because they turn in pairs"
            )
        if self.num_rotary_layers > self.num_self_attention_layers:
            raise ValueError(
                f"num_rotary_layers={self.num_rotary_layers} exceeds "
                f"num_self_attention_layers={self.num_self_attention_layers}"
            )

    @property
    def num_rotary_channels(self) -> int:
        """The number of channels in each head that rotary positions turn."""
        if self.architecture == "google":
            return 0
        num_parts = 2 if self.absolute_positions else 1
        return self.num_channels // self.num_heads // num_parts

    def build(self) -> "PerceiverAR":
        return PerceiverAR(self)


@dataclass
class DecodingStep:
    """The positions and caches that one forward pass uses. decoding.py makes them."""

    positions: Tensor  # (1 or B, M), of the tokens in their windows
    cross_attention: LayerCache
    self_attention: list[LayerCache]


class PerceiverAR(nn.Module):
    """Perceiver AR (arXiv 2202.07765, section 3): an autoregressive model whose latents are its last N inputs.

    The latents attend to the whole context in one causal cross-attention. Causal self-attention layers follow. Each
    latent predicts the token after it.
    """

    def __init__(self, config: PerceiverARConfig):
        if config.vocab_size is None:
            raise ValueError("vocab_size=None: set it to the number of different tokens")
        super().__init__()
        self.config = c = config
        google = c.architecture == "google"
        layer = dict(
            num_heads=c.num_heads,
            widening_factor=4,
            activation="squared_relu" if google else "gelu",
            bias=google,
            dropout=c.post_attention_dropout,
            residual_dropout=c.residual_dropout,
        )
        self.token_embedding = TokenEmbedding(c.vocab_size, c.num_channels, c.ngram_sizes, c.num_ngram_buckets)
        self.position_embedding = None
        if c.absolute_positions and not google:
            self.position_embedding = nn.Embedding(c.max_seq_len, c.num_channels)
        self.latent_projection = Linear(c.num_channels, c.num_channels) if google else nn.Identity()
        self.cross_attention = CrossAttentionLayer(c.num_channels, c.num_channels, latent_keys=c.latent_keys, **layer)
        layers = [SelfAttentionLayer(c.num_channels, **layer) for _ in range(c.num_self_attention_layers)]
        self.self_attention = nn.ModuleList(layers)
        self.output_norm = nn.LayerNorm(c.num_channels) if google or c.output_norm else nn.Identity()
        self.output_weight = nn.Parameter(torch.zeros(c.vocab_size, c.num_channels)) if google else None
        self.output_bias = nn.Parameter(torch.zeros(c.vocab_size)) if c.output_bias else None
        init_weights(self, None if google else c.init_scale)

    @property
    def num_recent_tokens(self) -> int:
        """The number of successive tokens that the embedding of the last one depends on."""
        return max(self.config.ngram_sizes, default=1)

    def forward(
        self,
        input_ids: Tensor,
        num_latents: int | None = None,
        pad_mask: Tensor | None = None,
        prefix_keep: Tensor | None = None,
        step: DecodingStep | None = None,
    ) -> Tensor:
        """Logits (B, N', V) of the token after each of the last `num_latents` = N' of input_ids (B, M).

        num_latents  default min(M, N)
        pad_mask     (B, M), true at padding, which must be on the left: the first real token has position 0
        prefix_keep  (B, P'), sorted indices of the prefix positions to keep; the model skips the others. Default: all;
                     in training those of `draw_prefix_keep`
        step         positions and caches of a decoding step; not together with pad_mask or prefix_keep. Its positions
                     are those of the last tokens; n-grams may need some tokens before these, which are cached

        Raises ValueError if M exceeds max_seq_len or num_latents is not between 1 and min(M, N).
        """
        c = self.config
        batch_size = input_ids.shape[0]
        length = step.positions.shape[1] if step else input_ids.shape[1]
        max_latents = min(length, c.num_latents)
        if num_latents is None:
            num_latents = max_latents
        if length > c.max_seq_len:
            raise ValueError(f"{length} tokens are more than max_seq_len={c.max_seq_len}")
        if not 1 <= num_latents <= max_latents:
            raise ValueError(f"num_latents={num_latents} must be between 1 and {max_latents} for {length} tokens")

        positions = step.positions if step else torch.arange(length, device=input_ids.device)[None]  # (1 or B, M)
        kept = None  # (B, P' + N'), the positions of all tokens that the model does not skip
        prefix_length = length - num_latents
        if prefix_keep is None and self.training and c.cross_attention_dropout:
            prefix_keep = draw_prefix_keep(
                batch_size, prefix_length, c.cross_attention_dropout, device=input_ids.device
            )
        if prefix_keep is not None:
            # Drop positions before the embedding: from here on they cost nothing.
            latent_positions = positions[:, prefix_length:].expand(batch_size, -1)
            kept = positions = torch.cat((prefix_keep, latent_positions), dim=1)
        if pad_mask is not None:
            input_ids = input_ids.masked_fill(pad_mask, 0)  # for n-grams: as if the text began here
            num_padded = pad_mask.sum(1, keepdim=True)
            pad_mask = pad_mask.gather(1, positions.expand(batch_size, -1))
            positions = (positions - num_padded).clamp(min=0)  # (B, M)

        x = self.token_embedding(input_ids, kept)
        x = x[:, -positions.shape[1] :]  # (B, M, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        elif c.architecture == "google":
            x = x + sinusoids(positions + 1, c.num_channels, x.dtype)  # Google's first token has position 1
        rotary = None
        if c.num_rotary_channels:
            rotary = rotary_angles(positions, c.num_rotary_channels, x.dtype)
        mask = mask_of_padding(pad_mask)  # (B, 1, 1, M); self-attention uses the last N' of `mask` and `rotary`

        latents = self.latent_projection(x[:, -num_latents:])  # (B, N', C)
        x = run_layer(
            self.cross_attention,
            c,
            latents,
            x,
            mask=mask,
            causal=True,
            rotary=rotary,
            cache=step and step.cross_attention,
        )  # (B, N', C)
        for i, layer in enumerate(self.self_attention):
            if i == c.num_rotary_layers:
                rotary = None  # for this layer and all after it
            x = run_layer(layer, c, x, mask=mask, causal=True, rotary=rotary, cache=step and step.self_attention[i])
        weight = self.token_embedding.weight if self.output_weight is None else self.output_weight
        return linear(self.output_norm(x), weight, self.output_bias)


def draw_prefix_keep(batch_size: int, prefix_length: int, dropout: float, generator=None, device=None) -> Tensor:
    """Random indices (B, P') of the prefix positions that a training step keeps, sorted.

    The step drops the fraction `dropout`. `generator` and `device` are those of torch.rand.
    """
    num_kept = prefix_length - int(prefix_length * dropout)
    scores = torch.rand(batch_size, prefix_length, generator=generator, device=device)
    return scores.topk(num_kept).indices.sort().values
