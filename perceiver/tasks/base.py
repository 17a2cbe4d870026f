"""The base class of all tasks, and the parts that several tasks share.

A task holds everything that depends on the modality; the loop in train.py asks the task. A task returns losses and
metrics as sums. The loop adds the sums of all batches and ranks, and only then divides by the count. So uneven batches
and the number of ranks change no result.

Letters in shapes are those of model.py; L is the number of positions with logits.
"""

import json
import math
import sys
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from perceiver import decoding
from perceiver.config import Config
from perceiver.data import IGNORE, IdTokenizer, StreamDecoder, Tokenizer, Tokens, derive_seed
from perceiver.errors import UserError, printable, reason
from perceiver.io import memory_limit, read_text, say, shorten, tell
from perceiver.model import PerceiverARConfig, draw_prefix_keep

Batch = dict[str, Tensor]
Sums = dict[str, Tensor]  # scalars
Metrics = dict[str, float]

TASKS: dict[str, type["Task"]] = {}  # all tasks by the name that a config gives


class Task(ABC):
    """One task: its config classes, model, data, loss, metrics and pictures, and how the scripts use its model.

    train.py calls `build_model`, `load_data`, `loss`, `metrics`, `visualize` and `summary`; generate.py calls
    `generate`, predict.py calls `predict`. Callers set training or evaluation mode and turn gradients on or off.
    """

    name: str  # the value of `task:` in a config
    ModelConfig: type  # dataclass of the config section `model`; its `build()` returns the model
    DataConfig: type  # dataclass of the config section `data`, a LoaderConfig
    rate = "samples_per_s"  # the speed metric: samples_per_s counts examples, tokens_per_s the `count` of `loss`
    options: tuple[str, ...] = ()  # options of generate.py and predict.py that this task takes besides the common ones
    class_names: list[str] | None = None  # of a classifier
    data_note = ""  # a line about the training and validation data; load_data sets it

    def __init_subclass__(cls):
        if "name" in vars(cls):
            TASKS[cls.name] = cls

    def __init__(self, config: Config):
        self.config = config

    def build_model(self) -> nn.Module:
        meta = self.meta_model()
        size = sum(tensor.nbytes for tensor in chain(meta.parameters(), meta.buffers()))
        if size > memory_limit():
            raise UserError(f"the model takes {size / 1e9:,.1f} GB, this machine has {memory_limit() / 1e9:,.1f} GB")
        return self.config.model.build()

    def meta_model(self) -> nn.Module:
        """The model on the meta device: shapes without memory. Raises UserError if the config describes no model."""
        try:
            with torch.device("meta"):
                return self.config.model.build()
        except ValueError as error:
            raise UserError(f"model.{error}") from None
        except (RuntimeError, OverflowError, TypeError) as error:  # a number is too large for PyTorch
            raise UserError(f"the section model describes no model: {shorten(reason(error))}") from None

    def state_dict(self) -> dict:
        """The attributes that come from the data. A checkpoint keeps them, so prediction needs no data."""
        return {"class_names": self.class_names}

    def load_state_dict(self, state: dict):
        self.class_names = state["class_names"]

    @abstractmethod
    def load_data(self) -> tuple[Dataset, Dataset]:
        """The training set, indexed by (step, index in the global batch), and the validation set, by 0, 1, ..."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """Sums over the batch: `loss` in nats, its `count`, and other sums for `metrics`."""

    def metrics(self, sums: Metrics) -> Metrics:
        """Means by name, from sums of `loss` over examples and ranks."""
        metrics = {"loss": sums["loss"] / sums["count"]}
        if "correct" in sums:
            metrics["accuracy"] = sums["correct"] / sums["count"]
        return metrics

    def count_loss(self, model: nn.Module, batch: Batch) -> Sums:
        """`loss` of a batch from a loader, and the number of `unreadable` examples. Replacements do not count."""
        sums = self.loss(model, batch)
        if "num_readable" in batch:  # in evaluation
            is_counted = batch["num_readable"].clamp(max=1)
            sums = {name: is_counted * value for name, value in sums.items()}
        return sums | {"unreadable": batch["unreadable"]}

    def all_metrics(self, sums: Metrics) -> Metrics:
        """`metrics`, and the number of unreadable examples if there are any. Raises UserError if all examples are."""
        if sums["unreadable"] and not sums["count"]:
            raise UserError(f"{int(sums['unreadable'])} examples are unreadable, and none is left")
        metrics = self.metrics(sums)
        return metrics | {"unreadable": int(sums["unreadable"])} if sums["unreadable"] else metrics

    def visualize(self, model: nn.Module) -> dict[str, str | Tensor | tuple[Tensor, int]]:
        """Texts, pictures (3, H, W) of uint8, and sounds (S, 1) in [-1, 1] with their sample rate, by name."""
        return {}

    def summary(self, metrics: Metrics) -> str | None:
        """A line at the end of a run: the validation result beside a baseline. None: the metrics alone."""
        return None

    def generate(self, model: nn.Module, args: Namespace):
        """Continues the prompt of generate.py. `args` are its options."""
        raise UserError(f"task {self.name} does not implement generate; if it implements predict, use predict.py")

    def predict(self, model: nn.Module, args: Namespace):
        """Runs the model on the inputs of predict.py. `args` are its options."""
        raise UserError(f"task {self.name} does not implement predict; if it implements generate, use generate.py")

    def check_classes(self, names: list[str], key: str, num_classes: int):
        """Stores the class names of the data. Raises UserError if there are not `num_classes`, the value of `key`."""
        self.class_names = names
        if len(names) != num_classes:
            raise UserError(f"{key}={num_classes}, but the data has {len(names)} classes: {shorten(', '.join(names))}")


# ----------------------------------------------------------------------------------------------------------------------
# Perceiver AR


class Autoregression(Task):
    """Perceiver AR on sequences: predict the next token at each of the last N positions of a window."""

    ModelConfig = PerceiverARConfig
    rate = "tokens_per_s"
    unit = "token"  # the unit in names of metrics, such as bits_per_token
    vocab_size: int  # number of different tokens; `model.vocab_size: null` takes it
    num_sampled = 0  # tokens that `sample` has yielded

    def __init__(self, config):
        super().__init__(config)
        if config.model.vocab_size is None:
            config.model.vocab_size = self.vocab_size
        self.check_vocab_size(self.min_vocab_size, f"task {self.name}")

    @property
    def min_vocab_size(self):
        return self.vocab_size

    def check_vocab_size(self, needed: int, what: str):
        """Raises UserError if the model has fewer than `needed` tokens. The message names `what` needs them."""
        vocab_size = self.config.model.vocab_size
        if vocab_size < needed:
            raise UserError(f"model.vocab_size={vocab_size} is too small for {what}, which needs {needed}")

    def with_prefix_dropout(self, windows: Dataset) -> Dataset:
        """The training set `windows`, with random prefix positions to keep if model.cross_attention_dropout is set."""
        model = self.config.model
        if model.cross_attention_dropout == 0:
            return windows
        return PrefixDropout(windows, model.num_latents, model.cross_attention_dropout, self.config.train.seed)

    def loss(self, model, batch):
        labels = batch["labels"]  # (B, N)
        logits = model(batch["input_ids"], labels.shape[1], batch.get("pad_mask"), batch.get("prefix_keep"))
        sums = self.sums(logits, batch)
        weight = self.config.model.z_loss
        if model.training and weight:
            log_z = logits.float().logsumexp(-1) * (labels != IGNORE)  # (B, N)
            sums["loss"] = sums["loss"] + weight * log_z.square().sum()
        return sums

    def sums(self, logits: Tensor, batch: Batch) -> Sums:
        """The sums of `loss` before the z-loss is added."""
        sums = token_sums(logits, batch["labels"])
        return sums | {"cross_entropy": sums["loss"]}

    def metrics(self, sums):
        bits = sums["cross_entropy"] / sums["count"] / math.log(2)
        return {"loss": sums["loss"] / sums["count"], f"bits_per_{self.unit}": bits}

    def sample(
        self,
        model: nn.Module,
        prompt: list[int],
        args: Namespace,
        max_new_tokens: int | None = None,
        stop: Sequence[list[int]] = (),
        bar=True,
    ) -> Iterator[list[int]]:
        """Yields the next token of every sample as `decoding.generate` does. Shows its progress on stderr if `bar`."""
        max_new_tokens = max_new_tokens or args.max_new_tokens
        context = model.config.max_seq_len
        if len(prompt) > context:
            tell(f"the prompt has {len(prompt)} tokens; the model sees only the last {context} of them, its context")
        prompts = [prompt] * args.num_samples
        try:
            steps = decoding.generate(
                model,
                prompts,
                max_new_tokens,
                args.temperature,
                args.top_k,
                args.top_p,
                args.seed,
                args.stride,
                not args.no_kv_cache,
                args.compile,
                stop,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        for tokens in tqdm(steps, total=max_new_tokens, unit=" tokens", disable=not bar):
            self.num_sampled += sum(token != decoding.ENDED for token in tokens.tolist())
            yield tokens.tolist()

    def continue_text(self, model, args):
        """Prints the prompt and its continuation: a single sample token by token, several when all are complete.

        A sample ends at the end-of-text token of `self.tokenizer`, or before a text of --stop.
        """
        text = read_prompt(args)
        prompt = self.tokenizer.encode(text)
        stop = StopSequences(self.tokenizer, args.stop)
        samples = [TextSample(self.tokenizer, prompt, stop) for _ in range(args.num_samples)]
        streaming = args.num_samples == 1 and not args.json
        bar = not (streaming and sys.stdout.isatty())
        given = "" if args.no_prompt else text
        for step, tokens in enumerate(self.sample(model, prompt, args, stop=stop.tokens, bar=bar)):
            pieces = [sample.push(token) for sample, token in zip(samples, tokens)]
            if streaming:  # the prompt is written once, with the first token
                write(given + pieces[0] if step == 0 else pieces[0])
            if all(sample.ended for sample in samples):
                break
        rest = [sample.finish() for sample in samples]
        if args.json:
            for number, sample in enumerate(samples):
                say(json.dumps({"prompt": text, "seed": args.seed + number} | sample.result()))
        elif streaming:
            write(rest[0] + "\n")
        else:
            write("\n-----\n".join(given + sample.text for sample in samples) + "\n")


class StopSequences:
    """Where a text ends: at the end-of-text token of its tokenizer, and before each of `texts`.

    tokens  the sequences that the sampled tokens tell: end of text, and for a corpus of token ids all of `texts`
    texts   those that only the text tells, because its tokens may be cut in several ways
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[str]):
        if "" in texts:
            raise UserError("--stop must not be empty")
        by_token = isinstance(tokenizer, IdTokenizer)
        self.tokens = [tokenizer.encode(text) for text in texts] if by_token else []
        self.texts = [] if by_token else texts
        if tokenizer.end_of_text is not None:
            self.tokens.append([tokenizer.end_of_text])


class TextSample:
    """The text of one sample, which grows token by token and ends before a stop sequence."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: StopSequences):
        self.decoder = StreamDecoder(tokenizer, prompt)
        self.tokens = decoding.UntilStop(stop.tokens)
        self.texts = decoding.UntilStop(stop.texts)
        self.num_tokens = 0
        self.text = ""

    @property
    def ended(self) -> bool:
        return self.tokens.ended or self.texts.ended

    def push(self, token: int) -> str:
        """The text that is certain with this token, after that of the earlier tokens."""
        if self.ended:
            return ""
        self.num_tokens += 1
        tokens = self.tokens.push([token])
        text = self.texts.push(self.decoder.push(tokens)) if tokens else ""
        self.text += text
        return text

    def finish(self) -> str:
        """The rest of the text."""
        tokens = self.tokens.push([], final=True)
        text = self.decoder.push(tokens) + self.decoder.finish()
        text = self.texts.push(text, final=True)
        self.text += text
        return text

    def result(self) -> dict:
        """The values for --json."""
        return {"text": self.text, "num_tokens": self.num_tokens, "ended_by": "stop" if self.ended else "length"}


@dataclass
class PrefixDropout(Dataset):
    """Adds to each example of `windows` the prefix positions that a training step keeps: prefix_keep (P',).

    The dataset draws them, not the model: random numbers of the GPU would depend on the number of ranks.
    """

    windows: Dataset
    num_latents: int
    dropout: float
    seed: int

    def __getitem__(self, key):
        example = self.windows[key]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *key, 2))
        prefix_length = len(example["input_ids"]) - self.num_latents
        prefix_keep = draw_prefix_keep(1, prefix_length, self.dropout, generator)
        return example | {"prefix_keep": prefix_keep[0]}


def read_prompt(args):
    """The text of the prompt. Bytes that are not UTF-8 become surrogates; `write` turns them back into bytes."""
    if args.prompt_file is None and args.prompt != "-":
        return args.prompt
    return read_text(args.prompt_file or args.prompt).decode("utf-8", "surrogateescape")


def write(text: str):
    """Writes text to stdout at once. Surrogates become the bytes that they stand for, except on a terminal."""
    text = printable(text, sys.stdout)
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


def token_sums(logits: Tensor, labels: Tensor) -> Sums:
    """The summed loss and the count of labels, from logits (B, L, V) and labels (B, L). IGNORE labels do not count."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return {"loss": loss, "count": (labels != IGNORE).sum()}


def unigram_bits(train: Tokens, val_set: Dataset) -> float:
    """The unigram baseline: mean bits per label of `val_set` under the token frequencies of the training data.

    Of a corpus of more than a billion tokens, it counts 256 blocks.
    """
    labels = np.concatenate([val_set[index]["labels"] for index in range(len(val_set))])
    labels = labels[labels != IGNORE] - train.offset
    counts = np.ones(1 + labels.max())  # start at 1: no token gets probability 0
    for block in train.blocks(count=256):
        found = np.bincount(block)
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))), constant_values=1)
        counts[: len(found)] += found
    return -np.log2(counts / counts.sum())[labels].mean()
