"""Decoding with Perceiver AR: which tokens are prefix and which are latents at every step, caches, and sampling."""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.model import KVCache, PerceiverAR


def split(num_tokens: int, max_seq_len: int, num_latents: int, stride: int) -> tuple[int, int]:
    """First token of the window and first latent of it, when the model predicts token number `num_tokens`.

    Tokens join the latents until there are N of them; the next one moves the first latent `stride` tokens on, so that
    N - stride of the old latents remain. The prefix is never longer than T - N: from there on the window slides with
    the latents. Both numbers stay put between two moves, which is what makes cached decoding exact. They depend on
    nothing but the length, so that a text continued in two calls is the text continued in one; stride 1 is the model
    with N latents at every step.
    """
    beyond = max(0, num_tokens - num_latents)
    first_latent = -(-beyond // stride) * stride  # the next multiple of stride
    return max(0, first_latent - (max_seq_len - num_latents)), first_latent


class Int8Linear(nn.Module):
    """A linear map whose weights have 8 bits, and a scale for every output: a decoding step reads a quarter.

    It takes torch.compile to gain by it, which converts the weights of a single row's product in its loop; everything
    else makes them anew first.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        self.out_features, self.bias = layer.out_features, layer.bias
        scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        self.register_buffer("scale", scale)  # (out, 1)
        self.register_buffer("rounded", (weight / scale).round().to(torch.int8))  # (out, in)

    @property
    def weight(self) -> Tensor:
        return self.rounded * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        y = ((self.rounded * x.reshape(1, -1)).sum(1) * self.scale[:, 0]).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def quantize(model: nn.Module) -> None:
    """Makes every linear map of the model an `Int8Linear`; embeddings, norms and the output stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))


def decode_step(model: PerceiverAR, cache: KVCache, tokens: Tensor) -> Tensor:
    """Logits (B, V) after one more token (B,) of every sequence, when the cache has advanced."""
    return model(tokens[:, None], cache=cache)[:, -1]


def compiled_step(device: torch.device):
    """`decode_step` by torch.compile: on CUDA one graph of kernels; on the CPU a few C++ loops, which takes a compiler
    and some 20 seconds when the first token is decoded. (CUDA: not measured yet.)"""
    torch._dynamo.config.recompile_limit = 64  # a graph for every number of keys read, batch size and kind of model
    if device.type == "cuda":
        return torch.compile(decode_step, fullgraph=True, dynamic=False, mode="reduce-overhead")
    # The option keeps what is before a product out of its loop, to be computed once and not for every row of weights.
    return torch.compile(decode_step, fullgraph=True, dynamic=False, options={"realize_opcount_threshold": 0})


class Decoder:
    """Sequences that grow token by token, and the model's logits of what comes next.

    The result with `kv_cache` equals the one without, up to rounding: that one evaluates the whole model anew, at the
    same split, for every token. Sequences may differ in length; each gets what it would get alone.
    """

    def __init__(self, model: PerceiverAR, prompts: list[list[int]], max_new_tokens: int, stride: int | None = None,
                 kv_cache: bool = True, compile: bool = False):
        """`stride` (1 .. N, default N / 2 as in Google's sampler) is the number of tokens between two re-encodings.
        `compile` is for the steps with a cache; see `compiled_step`.

        Raises ValueError for an empty prompt, a token outside the vocabulary, a stride outside 1 .. N or `compile`
        without a cache.
        """
        c, device = model.config, model.token_embedding.weight.device
        self.model, self.stride = model, max(1, c.num_latents // 2) if stride is None else stride
        if not 1 <= self.stride <= c.num_latents:
            raise ValueError(f"stride={stride} must be between 1 and num_latents={c.num_latents}")
        if compile and not kv_cache:
            raise ValueError("only decoding with a key/value cache can be compiled")
        if not prompts or not all(prompts):
            raise ValueError("a prompt needs at least one token")
        if not all(0 <= token < c.vocab_size for prompt in prompts for token in prompt):
            raise ValueError(f"a prompt has a token outside of 0..{c.vocab_size - 1}, the model's vocabulary")
        self.lengths = [len(prompt) for prompt in prompts]
        self.tokens = torch.zeros(len(prompts), max(self.lengths) + max_new_tokens, dtype=torch.long, device=device)
        for row, prompt in zip(self.tokens, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        self.rows = torch.arange(len(prompts), device=device)
        self.cache = KVCache(model, len(prompts), static=compile) if kv_cache else None
        self.step = compiled_step(device) if compile else decode_step
        self.cached = [None] * len(prompts)  # (first token, first latent) that a row's cache was made for

    def append(self, tokens: Tensor) -> None:
        """Adds one token (B,) to every sequence."""
        self.tokens[self.rows, self.tokens.new_tensor(self.lengths)] = tokens
        self.lengths = [length + 1 for length in self.lengths]

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """(B, V) of the next token of every sequence. To be asked once after each `append`."""
        c = self.model.config
        splits = [split(length, c.max_seq_len, c.num_latents, self.stride) for length in self.lengths]
        stale = [row for row, now in enumerate(splits) if self.cache is None or now != self.cached[row]]
        logits = None
        if len(stale) < len(splits):
            # Rows that are stale come along, for the shape's sake, and are made anew below.
            self.cache.advance()
            newest = self.tokens[self.rows, self.tokens.new_tensor(self.lengths) - 1]  # (B,)
            logits = self.step(self.model, self.cache, newest)

        groups: dict[tuple[int, int], list[int]] = {}  # rows of one shape are encoded together
        for row in stale:
            first_token, first_latent = splits[row]
            shape = (self.lengths[row] - first_token, self.lengths[row] - first_latent)
            groups.setdefault(shape, []).append(row)
        for (num_tokens, num_latents), rows in groups.items():
            window = torch.stack([self.tokens[row, self.lengths[row] - num_tokens : self.lengths[row]] for row in rows])
            if self.cache is not None:
                self.cache.prefill(rows, num_tokens, num_latents)
            new = self.model(window, num_latents, cache=self.cache)[:, -1]
            logits = new.new_empty(len(splits), new.shape[1]) if logits is None else logits
            logits[rows] = new
        self.cached = splits
        return logits


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """A token (B,) from logits (B, V), by numbers (B,) uniform in [0, 1); the best one at temperature 0.

    The order is temperature, the `top_k` most likely, the smallest set with probability `top_p` or more.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, tokens = logits.float().sort(descending=True)  # (B, V)
    logits = (logits - logits[:, :1]) / temperature  # the best at 0: nothing overflows
    probs = logits[:, :top_k].softmax(-1)
    if top_p is not None:
        before = probs.cumsum(-1) - probs
        probs = probs * (before < top_p)
    cumulative = probs.cumsum(-1)
    rank = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return tokens.gather(1, rank.clamp(max=probs.shape[1] - 1))[:, 0]


def generate(model: PerceiverAR, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, seed: int = 0, stride: int | None = None,
             kv_cache: bool = True, compile: bool = False) -> Iterator[Tensor]:
    """An iterator over the next token (B,) of every prompt, `max_new_tokens` times.

    Prompts may differ in length, from one token to far beyond the context, of which the model then sees the end. Row b
    draws from its own generator, seeded with seed + b: it does not depend on what else is in the batch.

    Raises ValueError as `Decoder`, and for a temperature below 0, a top_k below 1 or a top_p outside (0, 1].
    """
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if not 0 <= seed < 2**63 - len(prompts):
        raise ValueError(f"seed={seed} must be from 0 to 2^63 - 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    decoder = Decoder(model, prompts, max_new_tokens, stride, kv_cache, compile)
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed + row))
                           for row in range(len(prompts))]).to(decoder.tokens.device)  # (B, max_new_tokens)

    def steps() -> Iterator[Tensor]:
        training = model.training
        model.eval()
        try:
            for numbers in uniform.unbind(1):
                tokens = choose(decoder.logits(), numbers, temperature, top_k, top_p)
                decoder.append(tokens)
                yield tokens
        finally:
            model.train(training)

    return steps()
