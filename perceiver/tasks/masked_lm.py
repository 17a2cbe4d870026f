"""Masked language models: Perceiver IO fills in the bytes of masked words (Perceiver IO, section 4.1).

Letters in shapes are those of model.py; L is the length of a text in bytes.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch.utils.data import Dataset

from perceiver import pictures
from perceiver.adapters import InputAdapter, LinearOutput, TiedTokenOutput, TrainablePositions, TrainableQueries
from perceiver.config import Count, NonNegative
from perceiver.data import IGNORE, ByteTokenizer, CorpusConfig, Example, Tokens, example_rng, load_corpus, pad_right
from perceiver.errors import UserError
from perceiver.io import progress, read_text, report, save_picture, shorten
from perceiver.model import NgramSizes, PerceiverDecoder, PerceiverIO, PerceiverIOConfig, TokenEmbedding, init_weights
from perceiver.tasks.base import Task, token_sums, unigram_bits


@dataclass
class TokenInputConfig:
    vocab_size: Count = 262  # V: 262 for bytes
    max_seq_len: Count = 2048  # M: number of positions; a shorter input takes the first ones
    num_input_channels: Count = 768  # C: channels of embeddings and positions, which are added
    ngram_sizes: NgramSizes = ()  # embed the n-grams of these n, too; see TokenEmbedding
    num_ngram_buckets: Count = 20_000  # vectors for each n

    def build(self, init_scale: float) -> InputAdapter:
        """Tokens (B, M) -> (B, M, C)."""
        num_channels = self.num_input_channels
        embedding = TokenEmbedding(self.vocab_size, num_channels, self.ngram_sizes, self.num_ngram_buckets)
        positions = TrainablePositions((self.max_seq_len,), num_channels, init_scale=init_scale)
        init_weights(embedding, init_scale)
        return InputAdapter(embedding, num_channels, positions, "add")


@dataclass
class MaskedLMConfig(PerceiverIOConfig):
    """Tokens (B, M) -> logits of the token at every position, (B, M, V) (Perceiver IO, section 4.1)."""

    input: TokenInputConfig = field(default_factory=TokenInputConfig)
    tied_output: bool = True  # logits are products with the input's embeddings

    def __post_init__(self):
        if self.decoder is None:
            raise ValueError("decoder=None: a masked language model needs a decoder")
        default = self.input.num_input_channels if self.tied_output else self.num_latent_channels
        self.num_query_channels = self.decoder.num_query_channels or default
        if self.tied_output and self.num_query_channels != default:
            raise ValueError(
                f"decoder.num_query_channels={self.num_query_channels} must equal "
                f"input.num_input_channels={default}, unless tied_output is false"
            )

    def build(self) -> PerceiverIO:
        input_adapter = self.input.build(self.encoder.init_scale)
        encoder = self.build_encoder(input_adapter.num_channels)
        num_channels, init_scale = self.num_query_channels, self.decoder.init_scale
        queries = TrainableQueries(self.input.max_seq_len, num_channels, one_per_input=True, init_scale=init_scale)
        decoder = PerceiverDecoder(self.decoder, self.num_latent_channels, num_channels)
        if self.tied_output:
            output_adapter = TiedTokenOutput(input_adapter.features)
        else:
            output_adapter = LinearOutput(num_channels, self.input.vocab_size, init_scale)
        return PerceiverIO(input_adapter, encoder, queries, decoder, output_adapter)


@dataclass
class MaskedTextDataConfig(CorpusConfig):
    mask_prob: Annotated[float, "(0, 1]"] = 0.15  # probability that a word is selected for prediction
    unmasked_weight: NonNegative = 0.0  # training: loss weight of bytes that are not selected


TOKENIZER = ByteTokenizer()
NOT_IN_WORDS = [TOKENIZER.PAD, *TOKENIZER.encode(" \t\n\r\v\f")]


def mask_words(ids, mask_prob, rng) -> Example:
    """Selects each word of the byte tokens (L,) with probability `mask_prob`. Returns input_ids (L,) and labels (L,).

    Whitespace separates words. 80% of the selected words become MASK, byte by byte; 10% become random bytes; 10% stay
    (BERT, arXiv 1810.04805, section 3.1). Only bytes of selected words have a label. At least one word is selected, so
    that a batch of one short text has a loss.
    """
    in_word = ~np.isin(ids, NOT_IN_WORDS)
    starts = in_word & np.diff(in_word, prepend=False)
    draws = rng.random(1 + starts.sum())  # draws[n] belongs to word n = 1, 2, ...
    if starts.any() and draws[1:].min() >= mask_prob:
        draws[rng.integers(1, len(draws))] *= mask_prob  # now one word is selected
    draw = np.where(in_word, draws[np.cumsum(starts)], 1.0)  # the draw of each byte's word
    masked = draw < 0.8 * mask_prob
    replaced = (draw < 0.9 * mask_prob) & ~masked
    input_ids = np.where(masked, TOKENIZER.MASK, ids)
    input_ids[replaced] = rng.integers(TOKENIZER.OFFSET, TOKENIZER.vocab_size, replaced.sum())
    return {"input_ids": input_ids, "labels": np.where(draw < mask_prob, ids, IGNORE)}


@dataclass
class MaskedWindows(Dataset):
    """Training windows with masked words, at random places of a corpus.

    Indexed by (step, index in the global batch).
    """

    tokens: Tokens
    max_seq_len: int
    mask_prob: float
    seed: int

    def __post_init__(self):
        if len(self.tokens) < self.max_seq_len:
            raise UserError(
                f"the training text has {len(self.tokens)} bytes, fewer than model.input.max_seq_len="
                f"{self.max_seq_len}; lower that or give more text"
            )

    def __getitem__(self, key):
        """input_ids (L,) and labels (L,)."""
        rng = example_rng(self.seed, key)
        start = rng.integers(len(self.tokens) - self.max_seq_len + 1)
        window = self.tokens[start : start + self.max_seq_len]
        return mask_words(window, self.mask_prob, rng)


@dataclass
class MaskedBlocks(Dataset):
    """A whole corpus for evaluation, in consecutive blocks. The masks are the same in every evaluation."""

    tokens: Tokens
    max_seq_len: int
    mask_prob: float

    def __len__(self):
        return math.ceil(len(self.tokens) / self.max_seq_len)

    def __getitem__(self, index):
        """input_ids (L,), padded on the right, labels (L,) and pad_mask (L,)."""
        start = index * self.max_seq_len
        block = self.tokens[start : start + self.max_seq_len]
        example = pad_right(block, self.max_seq_len)
        return example | mask_words(example["input_ids"], self.mask_prob, np.random.default_rng(index))


class MaskedLM(Task):
    """Perceiver IO on text: predict the bytes of masked words (Perceiver IO, section 4.1)."""

    name = "masked_lm"
    ModelConfig = MaskedLMConfig
    DataConfig = MaskedTextDataConfig
    options = ("attention",)

    def load_data(self):
        data, max_seq_len = self.config.data, self.config.model.input.max_seq_len
        corpus = load_corpus(data)
        if corpus.holds_ids:
            raise UserError(f"data.path={data.path} holds token ids; masked_lm masks words, so it needs text")
        self.data_note = corpus.note
        self.train_tokens = corpus.train
        self.val_set = MaskedBlocks(corpus.val, max_seq_len, data.mask_prob)
        return MaskedWindows(corpus.train, max_seq_len, data.mask_prob, self.config.train.seed), self.val_set

    def loss(self, model, batch):
        labels = batch["labels"]  # (B, L)
        logits = model(batch["input_ids"], batch.get("pad_mask"))  # (B, L, V)
        sums = token_sums(logits, labels)
        sums["correct"] = (logits.argmax(-1) == labels).sum()
        sums["masked_loss"] = sums["loss"]
        weight = self.config.data.unmasked_weight
        if model.training and weight:
            unmasked = batch["input_ids"].where(labels == IGNORE, IGNORE)
            sums["loss"] = sums["loss"] + weight * token_sums(logits, unmasked)["loss"]
        return sums

    def metrics(self, sums):
        return super().metrics(sums) | {"bits_per_byte": sums["masked_loss"] / sums["count"] / math.log(2)}

    def visualize(self, model):
        """The start of the validation text with a _ for each masked byte, the same text as the model fills it in, and a
        picture of the model's attention. Here every selected word becomes MASK.
        """
        device = next(model.parameters()).device
        example = {name: torch.from_numpy(values).to(device) for name, values in self.val_set[0].items()}
        selected = example["labels"] != IGNORE
        input_ids = example["input_ids"].masked_fill(selected, TOKENIZER.MASK)
        logits = model(input_ids[None], example["pad_mask"][None])
        filled, _ = fill_in(input_ids, logits[0])
        blanks = input_ids.masked_fill(selected, TOKENIZER.OFFSET + ord("_"))
        return {
            "masked": TOKENIZER.decode(blanks[:512].tolist()),
            "filled": TOKENIZER.decode(filled[:512].tolist()),
            "attention": first_text_attention(model, self.val_set),
        }

    def summary(self, metrics):
        """The validation result beside the unigram baseline, which ignores the text around a byte."""
        baseline = unigram_bits(self.train_tokens, self.val_set)
        return (
            f"{self.config.data.eval_name}: {metrics['bits_per_byte']:.3f} bits per masked byte, "
            f"{metrics['accuracy']:.1%} of these bytes right; the unigram baseline has {baseline:.3f} bits"
        )

    def predict(self, model, args):
        """Prints each text with its masks filled in, then the bytes of each mask and their probability."""
        device = next(model.parameters()).device
        max_seq_len = self.config.model.input.max_seq_len
        for source, name in progress(args.inputs, args.limit):
            ids = encode_masks(read_masked_text(source), args.mask_bytes)
            if len(ids) > max_seq_len:
                raise UserError(f"{shorten(source)} has {len(ids)} bytes; the model takes {max_seq_len} at most")
            input_ids = torch.tensor(ids, device=device)
            filled, log_probs = fill_in(input_ids, model(input_ids[None])[0])
            text = TOKENIZER.decode(filled.tolist())
            masks = []
            for span in np.ma.clump_masked(np.ma.masked_equal(ids, TOKENIZER.MASK)):  # runs of masks
                probability = log_probs[span].sum().exp().item()
                masks.append({"text": TOKENIZER.decode(filled[span].tolist()), "probability": probability})
            files = list(map(str, save_attention(model, input_ids, name, args)))
            lines = [f"  {mask['text']!r}, probability {mask['probability']:.3g}" for mask in masks]
            report(args, {"input": source, "text": text, "masks": masks, "files": files}, text, *lines)


MASK = b"[MASK]"


def read_masked_text(source):
    """The text in the file `source`, or `source` itself if there is no such file. "-" is stdin.

    Raises UserError if the text has no [MASK].
    """
    if source == "-" or os.path.exists(source):
        text = read_text(source)
    else:
        text = source.encode("utf-8", "surrogateescape")
    if MASK not in text:
        raise UserError(f"{shorten(source)} holds no {MASK.decode()} to fill in, and is not a file that holds one")
    return text


def encode_masks(text, mask_bytes):
    """Byte tokens of a text, with `mask_bytes` MASK tokens for each [MASK]."""
    first, *others = text.split(MASK)
    ids = TOKENIZER.encode(first)
    for piece in others:
        ids += mask_bytes * [TOKENIZER.MASK] + TOKENIZER.encode(piece)
    return ids


def fill_in(input_ids, logits):
    """Tokens (L,) with the most likely byte at each MASK, from logits (L, V), and the log-probabilities of these bytes.

    Each byte is predicted without knowing the others.
    """
    best, byte = logits[:, TOKENIZER.OFFSET :].float().log_softmax(-1).max(-1)
    masked = input_ids == TOKENIZER.MASK
    return torch.where(masked, byte + TOKENIZER.OFFSET, input_ids), best


def first_text_attention(model, texts):
    """A picture of the model's attention over the first example of the dataset `texts`."""
    example = texts[0]
    return pictures.over_text(model, torch.from_numpy(example["input_ids"][~example["pad_mask"]]))


def save_attention(model, input_ids, name, args):
    """Writes a picture of the model's attention over a text (L,) if predict.py is asked for it. Returns its files."""
    if not args.attention:
        return []
    file = Path(args.out) / f"{name}-attention.png"
    save_picture(pictures.over_text(model, input_ids, args.latents), file)
    return [file]
