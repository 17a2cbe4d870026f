"""Causal language models: Perceiver AR predicts the next byte or token of a text."""

import gzip
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from perceiver import decoding
from perceiver.data import (
    ByteTokenizer,
    CorpusConfig,
    IdTokenizer,
    JsonTokenizer,
    TextBlocks,
    TextWindows,
    example_rng,
    load_corpus,
    tokenize,
    tokenizer_from_state,
    tokenizer_state,
)
from perceiver.errors import UserError
from perceiver.io import cached_array, digest
from perceiver.tasks.base import Autoregression


@dataclass
class TextDataConfig(CorpusConfig):
    tokenizer: str | None = None  # a tokenizer.json; null: bytes
    random_lengths: bool = False  # shorten training windows at random; see RandomLengths


class CausalLM(Autoregression):
    """Perceiver AR on text: predict the next byte, the next token of a tokenizer.json, or the next token id."""

    name = "causal_lm"
    DataConfig = TextDataConfig
    options = ("tokenizer", "stop", "no_prompt")
    vocab_size = ByteTokenizer.vocab_size
    min_vocab_size = 0  # load_data checks the vocabulary

    def __init__(self, config):
        super().__init__(config)
        self.tokenizer = ByteTokenizer()

    @property
    def unit(self):
        return self.tokenizer.unit

    def state_dict(self):
        return super().state_dict() | {"tokenizer": tokenizer_state(self.tokenizer)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.tokenizer = tokenizer_from_state(state["tokenizer"])

    def load_data(self):
        model, data = self.config.model, self.config.data
        corpus = load_corpus(data)
        self.data_note = corpus.note
        train, self.val_tokens = corpus.train, corpus.val
        self.val_text = None  # the bytes that validation predicts, if the data is text
        if data.tokenizer is not None:
            self.tokenizer = JsonTokenizer.read(data.tokenizer)
            self.check_vocab_size(self.tokenizer.vocab_size, f"data.tokenizer={data.tokenizer}")
        elif corpus.holds_ids:
            self.tokenizer = IdTokenizer()
        else:
            self.check_vocab_size(ByteTokenizer.vocab_size, "bytes")

        if corpus.holds_ids:
            for tokens in (train, self.val_tokens):
                check_ids(tokens, model.vocab_size, data)
        else:
            text = self.val_tokens.values
            if data.tokenizer is not None:
                train = tokenize(train, self.tokenizer, data.cache_dir)
                self.val_tokens = tokenize(self.val_tokens, self.tokenizer, data.cache_dir)
            first = self.val_tokens[:1].tolist()  # this token is never predicted
            num_bytes = 1 if data.tokenizer is None else len(self.tokenizer.decode(first).encode())
            self.val_text = text[num_bytes:].tobytes()
        windows = TextWindows(train, model.max_seq_len, model.num_latents, self.config.train.seed)
        if data.random_lengths:
            windows = RandomLengths(windows)
        blocks = TextBlocks(self.val_tokens, model.max_seq_len, model.num_latents)
        return self.with_prefix_dropout(windows), blocks

    def metrics(self, sums):
        """Adds bits_per_byte, which compares models with different tokenizers.

        With a tokenizer it is bits per token, divided by the mean number of bytes of a validation token. That is exact
        for validation and an estimate for training.
        """
        metrics = super().metrics(sums)
        if self.unit == "token" and self.val_text:
            tokens_per_byte = (len(self.val_tokens) - 1) / len(self.val_text)
            metrics["bits_per_byte"] = metrics["bits_per_token"] * tokens_per_byte
        return metrics

    def visualize(self, model):
        """A continuation of the start of the validation text."""
        prompt = self.val_tokens[:32].tolist()
        tokens = decoding.generate(model, [prompt], max_new_tokens=256, temperature=0.8, top_p=0.95)
        return {"sample": self.tokenizer.decode(prompt + [token.item() for token in tokens])}

    def summary(self, metrics):
        """The validation result beside gzip and xz on the same bytes."""
        if not self.val_text:
            return None
        size = len(self.val_text)
        gzip_bits = 8 * len(gzip.compress(self.val_text, 9)) / size
        xz_bits = 8 * len(lzma.compress(self.val_text, preset=9)) / size
        return (
            f"{self.config.data.eval_name}: {metrics['bits_per_byte']:.3f} bits per byte; for the same {size:,} bytes "
            f"gzip -9 needs {gzip_bits:.3f} and xz -9 {xz_bits:.3f}"
        )

    def generate(self, model, args):
        if args.tokenizer is not None:
            self.tokenizer = JsonTokenizer.read(args.tokenizer)
        if self.tokenizer is None:
            raise UserError(f"{args.ckpt} comes without a tokenizer.json; give one with --tokenizer")
        self.continue_text(model, args)


@dataclass
class RandomLengths(Dataset):
    """Shortens `windows` from the left, so that the model also learns to predict from short contexts.

    The lengths are T, T - N, T - 2N, ... down to N. All windows of a step get the same one, so they need no padding.
    """

    windows: TextWindows

    def __getitem__(self, key):
        windows, (step, _) = self.windows, key
        lengths = range(windows.max_seq_len, windows.num_latents - 1, -windows.num_latents)
        length = example_rng(windows.seed, (step,)).choice(lengths)
        example = windows[key]
        return example | {"input_ids": example["input_ids"][-length:]}


def check_ids(tokens, vocab_size, data):
    """Raises UserError if a token id of the corpus is outside the model's vocabulary.

    `cache_dir` keeps the range of a large corpus.
    """
    if len(tokens) > 2**26:
        file = Path(data.cache_dir) / f"range-{digest(tokens.values)}.npy"
        ends = cached_array(file, lambda: [id_range(tokens)])
    else:
        ends = id_range(tokens)
    for token in ends:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"data.path={data.path} holds token {token}, outside the vocabulary: model.vocab_size is {vocab_size}"
            )


def id_range(tokens):
    """The smallest and the largest token id of a corpus."""
    lows, highs = zip(*((block.min(), block.max()) for block in tokens.blocks()))
    return np.array([min(lows), max(highs)], np.int64)
