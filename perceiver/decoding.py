"""Generation with Perceiver AR: windows, the key/value cache, sampling.

One new token takes these calls, in this order:

    generate                          repeats the following for each token
    Decoder.logits()                  finds the window of each row, makes a step, and runs the model
    KVCache.prefill() or .advance()   makes the DecodingStep: positions, and a LayerCache for each layer
    PerceiverAR(ids, step=step)       hands each layer its LayerCache
    Attention(x_q, x_kv, cache=...)   computes queries, keys and values
    LayerCache.attend(q, k, v, ...)   stores the keys and values, then attends
    sample_token                      samples a token of each row from the logits

Letters in shapes are those of model.py; S is the number of positions in a cache.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from perceiver.attention import LayerCache
from perceiver.model import DecodingStep, PerceiverAR


def window_bounds(num_tokens: int, max_seq_len: int, num_latents: int, stride: int) -> tuple[int, int]:
    """Indices of the first token and the first latent in the window that predicts token `num_tokens`.

    New tokens become latents until there are N. The next token moves the first latent forward by `stride` tokens, so
    N - stride of the old latents remain. The prefix holds at most T - N tokens. Once it is full, its first token moves
    together with the first latent.

    Both indices stay the same between two moves, so cached decoding is exact. They depend on the length alone, so two
    calls that continue a text give the same result as one. With stride 1, every token after the first N has N latents.
    """
    num_beyond = max(0, num_tokens - num_latents)
    num_moves = -(-num_beyond // stride)  # rounded up
    first_latent = num_moves * stride
    first_token = max(0, first_latent - (max_seq_len - num_latents))
    return first_token, first_latent


# ----------------------------------------------------------------------------------------------------------------------
# The key/value cache


class KVCache:
    """Memory for the keys and values of every layer, for B sequences that grow.

    Each sequence owns one row. The row holds keys in the order of their positions, already rotated, in the dtype of the
    weights. A new token changes none of them, because attention is causal, as long as the window keeps its first token
    and first latent. When one of these moves, a prefill has to fill the row again.

    `static` is for torch.compile and CUDA graphs, which need equal shapes in successive steps. A step then reads 512
    keys, or the next power of two, or the whole cache, so the shapes rarely change. Without `static`, a step reads only
    as many keys as the longest row has, and rows of equal length need no mask.
    """

    def __init__(self, model: PerceiverAR, batch_size: int, static=False):
        c = model.config
        weight = model.token_embedding.weight
        qk_width, v_width = model.cross_attention.attention.head_widths(weight.device)

        def allocate(size):
            keys = weight.new_zeros(batch_size, c.num_heads, size, qk_width)
            values = weight.new_zeros(batch_size, c.num_heads, v_width, size)
            # Otherwise a CUDA graph would copy them in every step. A guard would keep them alive, and recompile for the
            # next cache.
            if static and weight.is_cuda:
                torch._dynamo.mark_static_address(keys, guard=False)
                torch._dynamo.mark_static_address(values, guard=False)
            return keys, values

        self.config = c
        self.static = static
        self.rows = torch.arange(batch_size, device=weight.device)[:, None]
        self.cross_attention = allocate(c.max_seq_len)
        self.self_attention = [allocate(c.num_latents) for _ in range(c.num_self_attention_layers)]

    def prefill(self, rows: list[int], num_tokens: int, num_latents: int) -> DecodingStep:
        """The step of model(ids (len(rows), num_tokens), num_latents, step=...), which fills these rows again."""
        return DecodingStep(
            torch.arange(num_tokens, device=self.rows.device)[None],
            LayerCache(*self.cross_attention, at=(rows, slice(num_tokens))),
            [LayerCache(*buffers, at=(rows, slice(num_latents))) for buffers in self.self_attention],
        )

    def advance(self, shapes: list[tuple[int, int]]) -> DecodingStep:
        """The step of model(ids (B, 1), step=...), which appends one token, also a latent, to every row.

        `shapes` has the number of tokens and the number of latents in each row's window, including the new token.
        """
        num_tokens, num_latents = zip(*shapes)
        last_token, last_latent = (self.rows.new_tensor(shapes) - 1).split(1, dim=1)  # (B, 1), in a single transfer
        token = self.new_key(num_tokens, last_token, self.config.max_seq_len)
        latent = self.new_key(num_latents, last_latent, self.config.num_latents)
        return DecodingStep(
            last_token,
            LayerCache(*self.cross_attention, **token),
            [LayerCache(*buffers, **latent) for buffers in self.self_attention],
        )

    def new_key(self, lengths: tuple[int, ...], last: Tensor, size: int) -> dict:
        """Fields of a LayerCache that appends one key to every row.

        `lengths` are the numbers of keys in the rows, including the new one, and `last` (B, 1) their last positions;
        `size` is the largest possible number.
        """
        num_read = max(lengths)
        if self.static:
            num_read = min(size, max(512, 1 << (num_read - 1).bit_length()))
        elif min(lengths) == num_read:  # slices make a token 5% faster on the CPU
            return dict(at=(slice(None), slice(num_read - 1, num_read)), num_read=num_read)
        unused = torch.arange(num_read, device=last.device) > last
        bias = torch.where(unused, -torch.inf, 0.0)
        return dict(at=(self.rows, last), num_read=num_read, bias=bias[:, None])


# ----------------------------------------------------------------------------------------------------------------------
# Faster steps


def decode_step(model: PerceiverAR, tokens: Tensor, step: DecodingStep) -> Tensor:
    """Logits (B, V) after one more token of every sequence, the last of `tokens` (B, model.num_recent_tokens).

    `step` comes from `KVCache.advance`.
    """
    return model(tokens, step=step)[:, -1]


def compiled_step(device: torch.device):
    """`decode_step`, compiled to a CUDA graph (not measured yet), or to a few C++ loops on the CPU.

    The CPU needs a C++ compiler. There the first token takes some 20 seconds.
    """
    torch._dynamo.config.recompile_limit = 64  # one graph for each number of keys, batch size and kind of model
    if device.type == "cuda":
        options = {"triton.cudagraphs": True}
    else:  # compute the input of a matrix product once, not again for every row of weights
        options = {"realize_opcount_threshold": 0}
    return torch.compile(decode_step, fullgraph=True, dynamic=False, options=options)


# ----------------------------------------------------------------------------------------------------------------------
# Generation


class Decoder:
    """Sequences that grow token by token, and the model's logits of their next tokens.

    Without `kv_cache`, the model runs on the whole window for every token. The results are the same up to rounding.
    Sequences may differ in length; each gets the logits that it would get alone.
    """

    def __init__(
        self, model: PerceiverAR, prompts: list[list[int]], stride: int | None = None, kv_cache=True, compile=False
    ):
        """stride   tokens between two moves of the window, 1 .. N. Default: N / 2, as in Google's sampler
        compile  compile the steps that append a token; see `compiled_step`

        Raises ValueError if the model is in training mode, there is no prompt, a prompt is empty, a token is outside
        the vocabulary, the stride is outside 1 .. N, or `compile` comes without `kv_cache`.
        """
        c = model.config
        if stride is None:
            stride = max(1, c.num_latents // 2)
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        if not 1 <= stride <= c.num_latents:
            raise ValueError(f"stride={stride} must be between 1 and num_latents={c.num_latents}")
        if compile and not kv_cache:
            raise ValueError("compile=True needs the key/value cache")
        if not prompts or not all(prompts):
            raise ValueError("a prompt needs at least one token")
        for prompt in prompts:
            if min(prompt) < 0 or max(prompt) >= c.vocab_size:
                raise ValueError(f"a prompt has a token outside the model's vocabulary, 0 to {c.vocab_size - 1}")

        self.model = model
        self.stride = stride
        self.sequences = [list(prompt) for prompt in prompts]
        self.device = model.token_embedding.weight.device
        self.cache = KVCache(model, len(prompts), static=compile) if kv_cache else None
        self.cached = [None] * len(prompts)  # the window_bounds of the keys in each row of the cache
        self.decode_step = compiled_step(self.device) if compile else decode_step

    def append(self, tokens: Tensor):
        """Adds one token (B,) to every sequence."""
        for sequence, token in zip(self.sequences, tokens.tolist()):
            sequence.append(token)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Logits (B, V) of the next token of every sequence. Call `logits` and `append` in turn."""
        c = self.model.config
        shapes = []  # for each row, the numbers of tokens and of latents in its window
        stale = defaultdict(list)  # rows to prefill, by shape
        for row, tokens in enumerate(self.sequences):
            bounds = window_bounds(len(tokens), c.max_seq_len, c.num_latents, self.stride)
            first_token, first_latent = bounds
            shapes.append((len(tokens) - first_token, len(tokens) - first_latent))
            if self.cache is None or bounds != self.cached[row]:
                stale[shapes[row]].append(row)
            self.cached[row] = bounds

        if sum(map(len, stale.values())) == len(shapes):
            logits = self.model.token_embedding.weight.new_empty(len(shapes), c.vocab_size)
        else:  # stale rows run too, so that the batch size stays the same; their logits are replaced below
            step = self.cache.advance(shapes)
            logits = self.decode_step(self.model, self.recent_tokens(shapes), step)
        for (num_tokens, num_latents), rows in stale.items():
            windows = [self.sequences[row][-num_tokens:] for row in rows]
            step = self.cache and self.cache.prefill(rows, num_tokens, num_latents)
            encoded = self.model(torch.tensor(windows, device=self.device), num_latents, step=step)
            logits[rows] = encoded[:, -1]
        return logits

    def recent_tokens(self, shapes: list[tuple[int, int]]) -> Tensor:
        """The last tokens (B, model.num_recent_tokens) of every window. Before the start of a window they are 0."""
        size = self.model.num_recent_tokens
        rows = []
        for tokens, (num_tokens, _) in zip(self.sequences, shapes):
            recent = tokens[-min(size, num_tokens) :]
            rows.append([0] * (size - len(recent)) + recent)
        return torch.tensor(rows, device=self.device)


def sample_token(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Tokens (B,) sampled from logits (B, V) with random numbers (B,) uniform in [0, 1).

    Temperature 0 takes the most likely token. Otherwise the temperature applies first. Then `top_k` keeps the k most
    likely tokens, and `top_p` the fewest most likely of these whose total probability is at least p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, tokens = logits.float().sort(descending=True)  # (B, V)
    logits = (logits - logits[:, :1]) / temperature  # the largest becomes 0, so nothing overflows
    probs = logits[:, :top_k].softmax(-1)
    if top_p is not None:
        before = probs.cumsum(-1) - probs  # total probability of the more likely tokens
        probs = probs * (before < top_p)
    cumulative = probs.cumsum(-1)
    rank = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    rank = rank.clamp(max=probs.shape[1] - 1)
    return tokens.gather(1, rank)[:, 0]


def generate(
    model: PerceiverAR,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature=1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed=0,
    stride: int | None = None,
    kv_cache=True,
    compile=False,
    stop: Sequence[list[int]] = (),
) -> Iterator[Tensor]:
    """An iterator that yields the next token (B,) of every prompt, at most `max_new_tokens` times.

    The model must be in evaluation mode. Prompts may differ in length. If a prompt is longer than the context, the
    model sees its end. Row b has its own random generator with seed + b, so it does not depend on the rest of the
    batch. `stride`, `kv_cache` and `compile` are options of `Decoder`.

    A row ends when its new tokens end with one of the sequences `stop`. From then on the iterator yields ENDED for this
    row, and it stops when all rows have ended. `new_tokens` collects the tokens of each row without the stop sequence.

    Raises ValueError as `Decoder` does, and for a temperature below 0, a top_k below 1, a top_p outside (0, 1], an
    impossible seed or an empty stop sequence. It does so at once, before the first token.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    if not 0 <= seed < 2**63 - len(prompts):
        raise ValueError(f"seed={seed} must be at least 0 and below 2^63 minus the number of samples")
    if not all(stop):
        raise ValueError("a stop sequence needs at least one token")
    decoder = Decoder(model, prompts, stride, kv_cache, compile)
    uniform = []
    for row in range(len(prompts)):
        generator = torch.Generator().manual_seed(seed + row)
        uniform.append(torch.rand(max_new_tokens, generator=generator))

    def tokens() -> Iterator[Tensor]:
        rows = [UntilStop(stop) for _ in prompts]
        for numbers in torch.stack(uniform, dim=1).to(decoder.device):
            new = sample_token(decoder.logits(), numbers, temperature, top_k, top_p)
            # A row that has ended still grows, so that the steps of the other rows compute the same as without `stop`.
            decoder.append(new)
            ended = [row.ended for row in rows]
            yield new.masked_fill(torch.tensor(ended, device=new.device), ENDED) if any(ended) else new
            if stop:
                for row, sequence in zip(rows, decoder.sequences):
                    row.push(sequence[-1:])
            if all(row.ended for row in rows):
                return

    return tokens()


# ----------------------------------------------------------------------------------------------------------------------
# The end of a generation

ENDED = -1  # `generate` yields it for a row that has ended


class UntilStop:
    """Text or a list of tokens that arrives in pieces, up to the first of several stop sequences of the same type.

    `push` returns all that is known to come before a stop sequence. It holds back an ending that may be the start of
    one. `ended` tells whether a stop sequence has come.
    """

    def __init__(self, stop: Sequence[str] | Sequence[list[int]]):
        self.stop = stop
        self.held = None
        self.ended = False

    def push(self, new: str | list[int], final=False) -> str | list[int]:
        """`final` says that nothing follows `new`, so that nothing is held back."""
        nothing = new[:0]
        if self.ended:
            return nothing
        items = (self.held or nothing) + new
        self.held = nothing
        for place in range(len(items)):
            rest = items[place:]
            if any(rest[: len(stop)] == stop for stop in self.stop):
                self.ended = True
                return items[:place]
            if not final and any(rest == stop[: len(rest)] for stop in self.stop):
                self.held = rest
                return items[:place]
        return items


def new_tokens(steps: Iterable[Tensor], stop: Sequence[list[int]] = ()) -> list[list[int]]:
    """The new tokens of each row from all steps of `generate`, without the stop sequence and what follows it."""
    rows = torch.stack(list(steps), dim=1).tolist()
    return [UntilStop([*stop, [ENDED]]).push(row, final=True) for row in rows]
