"""Data that tasks share: the order of examples, tokenizers, corpora, splits of files, and images with labels.

A training example depends on (seed, step, index in the global batch) alone. So a resumed run needs no saved state of
the data, and the number of ranks, workers and micro-batches changes no example.

Letters in shapes are those of model.py.
"""

import codecs
import gzip
import math
import os
import re
import sys
import sysconfig
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate
from torchvision import datasets
from torchvision.datasets.folder import make_dataset
from tqdm import tqdm

from perceiver.config import Count, NonNegativeInt, Probability, ValFraction
from perceiver.distributed import Ranks
from perceiver.errors import UserError, reading
from perceiver.io import (
    Download,
    cached_array,
    digest,
    fetch,
    file_place,
    import_optional,
    read_bytes,
    stamp,
    tell,
    visible_files,
)

IGNORE = -100  # the label of a position without a loss, cross_entropy's default

Example = dict[str, np.ndarray]


# ----------------------------------------------------------------------------------------------------------------------
# The order of examples, and batches


@dataclass
class LoaderConfig:
    """The fields that the data configs of all tasks share."""

    batch_size: Count = 16  # examples of one optimizer step, over all ranks and micro-batches
    num_workers: NonNegativeInt = 0  # processes that load data, per rank; 0: the training process itself
    # The largest fraction of examples that may be unreadable. Training replaces each by the next readable one;
    # evaluation leaves it out. Unless this is 0, one unreadable example is always allowed.
    max_unreadable: Probability = 0.01

    eval_name = "validation"  # of the data that evaluation uses


@dataclass
class Shuffled(Dataset):
    """A finite training set, indexed by (step, index in the global batch). An epoch has every example once, shuffled.

    Random transforms must draw from PyTorch's CPU generator, as torchvision's do. `Shuffled` seeds it for each example
    and restores its state afterwards.
    """

    examples: Dataset
    batch_size: int
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> dict:
        step, index = key
        num_examples = len(self.examples)
        epoch, place = divmod(step * self.batch_size + index, num_examples)
        number = epoch_order(self.seed, epoch, num_examples)[place]
        seed = derive_seed(self.seed, step, index, 1)  # the 1: not the seed of dropout, (seed, step, rank)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU's generator
            return self.examples[int(number)]


def derive_seed(*key: int) -> int:
    """A seed for PyTorch's generators that depends on all numbers of `key`."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def example_rng(seed, key) -> np.random.Generator:
    """The random numbers of the training example at `key`, (step, index in the global batch)."""
    return np.random.default_rng((seed, *key))


@lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def epoch_order(seed, epoch, num_examples):
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


class Readable(Dataset):
    """A dataset of files in which each unreadable example is replaced by the next readable one.

    The replacement depends on the index alone, so a resumed run sees the same examples. Prints a line for each
    unreadable example once. Raises UserError if more than `max_unreadable` of all examples are unreadable.
    """

    num_replaced = 0  # by all datasets of this process

    def __init__(self, examples: Dataset, max_unreadable: float):
        self.examples = examples
        self.max_unreadable = max_unreadable
        self.unreadable = torch.zeros(len(examples), dtype=torch.bool).share_memory_()  # workers share it

    def __getattr__(self, name):
        if name.startswith("__") or name == "examples":  # pickle looks for them before `examples` is there
            raise AttributeError(name)
        return getattr(self.examples, name)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        generator_state = torch.get_rng_state()
        for distance in range(len(self)):
            number = (index + distance) % len(self)
            if not self.unreadable[number]:
                try:
                    return self.examples[number]
                except UserError as error:
                    self.report(number, error)
                    torch.set_rng_state(generator_state)
            Readable.num_replaced += 1
        raise UserError("no example is readable")

    def report(self, number, error):
        self.unreadable[number] = True
        check_unreadable(int(self.unreadable.sum()), len(self), self.max_unreadable, error)
        tell(f"{error}; training uses the next example instead, evaluation leaves it out")


def check_unreadable(count: int, total: int, max_unreadable: float, error):
    """Raises UserError if `count` of `total` examples are too many. `error` says why the last one is unreadable."""
    if count == total:
        raise UserError(f"{error}; no example is readable")
    if count > math.ceil(max_unreadable * total):
        raise UserError(
            f"{error}; {count} of {total} examples are unreadable, more than data.max_unreadable={max_unreadable} "
            "allows: repair the files, or raise it"
        )


@dataclass
class Marked(Dataset):
    """Adds to each example whether it is unreadable, that is, whether `Readable` replaced a part of it."""

    examples: Dataset

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        before = Readable.num_replaced
        example = self.examples[key]
        return example | {"unreadable": Readable.num_replaced > before}


class TrainKeys(Sampler):
    """The keys (step, index in the global batch) of one rank's micro-batches, for steps first_step .. last_step - 1."""

    def __init__(
        self, batch_size: int, gradient_accumulation_steps: int, ranks: Ranks, first_step: int, last_step: int
    ):
        self.size = batch_size // (gradient_accumulation_steps * ranks.world_size)  # of a micro-batch
        self.starts = range(ranks.rank * self.size, batch_size, ranks.world_size * self.size)  # of its micro-batches
        self.steps = range(first_step, last_step)
        self.ranks = ranks

    def __iter__(self):
        for step in self.steps:
            for start in self.starts:
                yield [(step, index) for index in range(start, start + self.size)]


def train_loader(dataset: Dataset, keys: TrainKeys, num_workers: int) -> DataLoader:
    return make_loader(dataset, keys.ranks, num_workers, collate_fn=collate_padded, batch_sampler=keys)


def eval_loader(dataset: Dataset, batch_size: int, ranks: Ranks, num_workers: int) -> DataLoader:
    """Batches of this rank's share of a dataset, without unreadable examples.

    Together the ranks see every example once.
    """
    numbers = range(ranks.rank, len(dataset), ranks.world_size)
    return make_loader(
        Subset(dataset, numbers), ranks, num_workers, collate_fn=collate_readable, batch_size=batch_size
    )


def make_loader(dataset, ranks, num_workers, **batches):
    # Forked workers share the memory of their parent. Other start methods pickle the dataset for each worker. Of a
    # mapped corpus, they pickle the name of its file.
    fork = num_workers > 0 and sys.platform == "linux"
    return DataLoader(
        Marked(dataset),
        num_workers=num_workers,
        multiprocessing_context="fork" if fork else None,
        worker_init_fn=own_process_group,
        pin_memory=ranks.device.type == "cuda",
        **batches,
    )


def own_process_group(worker):
    """Gives a worker its own process group. Ctrl-C and torchrun's SIGTERM go to the group of the training process,
    which still needs the worker to finish its step.
    """
    os.setpgrp()


def collate_padded(examples: list[dict]) -> dict[str, Tensor]:
    """Stacks examples into a batch. Pads shorter input_ids on the left, to the length of the longest.

    A batch without padding gets no pad_mask, because attention is faster without a mask. `unreadable` is the number of
    unreadable examples.
    """
    unreadable = sum(example.get("unreadable", False) for example in examples)
    lengths = [len(example.get("input_ids", ())) for example in examples]
    longest = max(lengths)
    if min(lengths) < longest:
        examples = [pad_left(example, longest) for example in examples]
    batch = default_collate(examples)
    if "pad_mask" in batch and not batch["pad_mask"].any():
        del batch["pad_mask"]
    return batch | {"unreadable": torch.tensor(unreadable)}


def collate_readable(examples: list[dict]) -> dict[str, Tensor]:
    """Like `collate_padded`, but leaves out unreadable examples. `num_readable` is the number of the others.

    If all are unreadable, the batch has their replacements, which must not count.
    """
    readable = [example for example in examples if not example["unreadable"]]
    batch = collate_padded(readable or examples)
    batch["unreadable"] = torch.tensor(len(examples) - len(readable))
    batch["num_readable"] = torch.tensor(len(readable))
    return batch


def pad_left(example, length):
    """An example with input_ids (length,) and pad_mask (length,). prefix_keep moves with its tokens."""
    padding = length - len(example["input_ids"])
    padded = {"input_ids": np.pad(example["input_ids"], (padding, 0)), "pad_mask": np.arange(length) < padding}
    if "prefix_keep" in example:
        padded["prefix_keep"] = example["prefix_keep"] + padding
    return example | padded


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


class ByteTokenizer:
    """UTF-8 bytes after six special tokens: byte b is token b + 6 (DeepMind's bytes_tokenizer.py)."""

    PAD, BOS, EOS, MASK, CLS, SEP = range(6)
    OFFSET = 6
    vocab_size = 262
    unit = "byte"
    end_of_text = EOS

    def encode(self, text: str | bytes) -> list[int]:
        """Surrogates in `text` stand for bytes that are not UTF-8."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return [byte + self.OFFSET for byte in data]

    def decode(self, tokens: list[int]) -> str:
        """Leaves special tokens out. Bytes that are not UTF-8 become U+FFFD."""
        data = bytes(token - self.OFFSET for token in tokens if token >= self.OFFSET)
        return data.decode("utf-8", "replace")


class IdTokenizer:
    """Token ids written as numbers, like "17 4 256", for corpora of token ids."""

    unit = "token"
    end_of_text = None  # unknown

    def encode(self, text: str) -> list[int]:
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise UserError("the model was trained on token ids: the prompt must be numbers, like '17 4 256'") from None

    def decode(self, tokens: list[int]) -> str:
        return "".join(f" {token}" for token in tokens)


class JsonTokenizer:
    """The tokenizer in a tokenizer.json, without special tokens: BPE, Unigram, or another that `tokenizers` reads."""

    unit = "token"
    END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # its name in common tokenizers

    def __init__(self, json: str, source: str | Path):
        """`json` is the text of a tokenizer.json. Error messages name its `source`."""
        tokenizers = import_optional("tokenizers", f"the tokenizer of {source}")
        with reading(source):
            self.tokenizer = tokenizers.Tokenizer.from_str(json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.json = json
        vocab = self.tokenizer.get_vocab()
        self.vocab_size = 1 + max(vocab.values())
        self.end_of_text = next((vocab[name] for name in self.END_OF_TEXT if name in vocab), None)

    @classmethod
    def read(cls, file):
        return cls(read_bytes(file).decode("utf-8", "replace"), file)

    def encode(self, text: str) -> list[int]:
        """Surrogates in `text` stand for bytes that are not UTF-8. They become U+FFFD."""
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def dtype(self) -> np.dtype:
        """The type of arrays of its tokens."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens (n,) of each text. All cores encode them together."""
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)


Tokenizer = ByteTokenizer | IdTokenizer | JsonTokenizer


def tokenizer_state(tokenizer: Tokenizer) -> dict:
    """The entry of a tokenizer in a checkpoint."""
    return {"type": type(tokenizer).__name__, "json": getattr(tokenizer, "json", None)}


def tokenizer_from_state(state: dict) -> Tokenizer:
    if state["json"] is not None:
        return JsonTokenizer(state["json"], "the checkpoint")
    return IdTokenizer() if state["type"] == "IdTokenizer" else ByteTokenizer()


class StreamDecoder:
    """Decodes tokens as they arrive. `push` returns all new text, except for an unfinished character at its end.

    All returned texts, joined, are the part of decode(prompt + tokens) that follows decode(prompt).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.decode = tokenizer.decode
        self.tokens = list(prompt)  # the last tokens; the text of a token may depend on the token before it
        self.num_returned = len(self.decode(prompt))  # characters of their text that are not new
        self.num_waiting = 0  # tokens since the text last ended with a whole character

    def push(self, tokens: list[int]) -> str:
        self.tokens += tokens
        self.num_waiting += len(tokens)
        text = self.decode(self.tokens)
        end = len(text)
        if not text.endswith("\ufffd"):
            self.num_waiting = 0
        elif self.num_waiting <= 3:  # perhaps the first 1 to 3 tokens of a character
            return ""
        else:  # bytes that are not UTF-8, but the last 3 may begin a character
            end = max(end - 3, self.num_returned)
        new = text[self.num_returned : end]
        self.num_returned = end

        recent = self.tokens[-12:]  # 12 is a multiple of 1, 2, 3 and 4, the bytes of a character
        recent_text = self.decode(recent)
        start = len(text) - len(recent_text)
        if start < end and text.endswith(recent_text):  # the cut is between two characters
            self.tokens = recent
            self.num_returned = end - start
        return new

    def finish(self) -> str:
        """The rest of the text: U+FFFD for an unfinished character."""
        return self.decode(self.tokens)[self.num_returned :]


# ----------------------------------------------------------------------------------------------------------------------
# Corpora


@dataclass
class CorpusConfig(LoaderConfig):
    dataset: Literal["stdlib", "wikitext103", "enwik8", "imdb"] = "stdlib"  # stdlib: .py files of this Python
    path: str | None = None  # your data instead of a dataset: a text file, a folder, or token ids in .npy or .bin
    bin_dtype: Literal["uint8", "uint16", "uint32"] = "uint16"  # of token ids in .bin files
    cache_dir: str = "data"  # folder of the datasets; a missing dataset is downloaded to it
    val_fraction: ValFraction = 0.05  # fraction held out for validation if the data has no split
    val_size: Annotated[int, "[2, inf)"] = 1_000_000  # maximum number of bytes or token ids to validate on
    eval_split: Literal["val", "test"] = "val"  # test: evaluate on the test files of the data instead

    @property
    def eval_name(self) -> str:
        return "test" if self.eval_split == "test" else "validation"


DOWNLOADS = {
    "wikitext103": Download(
        url="https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        unpacked="wikitext-103-raw",
        sha256="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    ),
    "enwik8": Download(
        url="http://mattmahoney.net/dc/enwik8.zip", unpacked="enwik8", unpacked_md5="a1fa5ffddb56f4953e226637dabbb36a"
    ),
    "imdb": Download(
        url="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        unpacked="aclImdb",
        md5="7c2ac02c03563afcf9b574c7e56c153a",
    ),
}
STDLIB = Path(sysconfig.get_path("stdlib"))


def find_source(config) -> Path:
    """The file or folder of data.path or data.dataset, downloaded if necessary. Raises UserError if it is missing."""
    if config.path is None:
        if config.dataset == "stdlib":
            return STDLIB
        return fetch(config.dataset, DOWNLOADS[config.dataset], config.cache_dir)
    source = Path(config.path).expanduser()
    if not source.exists():
        raise UserError(f"data.path={source} does not exist")
    return source


@dataclass
class Tokens:
    """A corpus in memory or mapped from disk. Its token ids are `values` + `offset`."""

    values: np.ndarray  # (number of tokens,), uint8 or wider
    offset: int = 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, part: slice) -> np.ndarray:
        return in_memory(self.values[part]).astype(np.int64) + self.offset

    def blocks(self, size=2**22, count=None) -> Iterator[np.ndarray]:
        """Yields `values` in blocks of up to `size`: all of them, or `count` blocks evenly spaced."""
        starts = range(0, len(self), size)
        step = math.ceil(len(starts) / count) if count else 1
        for start in starts[::step]:
            yield in_memory(self.values[start : start + size])

    def __reduce__(self):
        """A worker that is not forked gets the name of the file of mapped values, not a copy."""
        if not isinstance(self.values, np.memmap):
            return Tokens, (self.values, self.offset)
        return map_tokens, (*file_place(self.values), self.values.dtype, len(self.values), self.offset)


def map_tokens(file, start, dtype, count, offset):
    return Tokens(np.memmap(file, dtype, mode="r", offset=start, shape=(count,)), offset)


def in_memory(values):
    """`values`, read from their file if they are mapped.

    Pages of a map would stay in the memory of this process, and the process would crash if the file became shorter.
    """
    if not isinstance(values, np.memmap):
        return values
    file, start = file_place(values)
    with reading(file):
        found = np.fromfile(file, values.dtype, len(values), offset=start)
        if len(found) < len(values):
            raise ValueError("it has become shorter")
    return found


@dataclass
class Corpus:
    train: Tokens
    val: Tokens
    holds_ids: bool  # whether the data is token ids, not text
    note: str  # a line that names the training files, the validation files and the unused files


def load_corpus(config: CorpusConfig) -> Corpus:
    """Text or token ids for training and for validation.

    `corpus_files` finds the split of the data. Without one, every n-th file is for validation, n = 1 / val_fraction. If
    there are fewer than n files, the end of the text is. Raises UserError if the data cannot be read or is too short.
    """
    source = unwrap(find_source(config))
    train_files, val_files = corpus_files(source, config.eval_split)
    if not train_files:
        raise UserError(f"{source} holds no text files")
    depth = len(source.parts) + 1
    used = {file.parts[:depth] for file in train_files + val_files}
    unused = [place for place in visible_places(source) if place.parts not in used]
    is_enwik8 = source.name == "enwik8"
    if config.eval_split == "test" and not val_files and not is_enwik8:
        raise UserError(f"data.eval_split=test: {source} has no test files, such as test.txt; leave it at val")
    if not val_files and len(train_files) >= round(1 / config.val_fraction):
        train_files, val_files = hold_out(train_files, config.val_fraction)

    separator = b"\n\n" if is_imdb(source) else b""
    train = read_values(train_files, config, separator)
    if val_files:
        val = read_values(val_files, config, separator)
    elif is_enwik8 and len(train) == 100_000_000:
        train, val, test = np.split(train, [90_000_000, 95_000_000])  # the usual split
        val = test if config.eval_split == "test" else val
    else:
        train, val = np.split(train, [int(len(train) * (1 - config.val_fraction))])
    val = val[: config.val_size]
    if len(val) < 2:
        raise UserError(
            f"{source} has {len(train)} tokens for training and {len(val)} for validation; "
            "give more text, or raise data.val_fraction"
        )

    holds_ids = is_ids(train_files[0])
    unit, offset = ("token ids", 0) if holds_ids else ("bytes", ByteTokenizer.OFFSET)
    note = (
        f"{source}: {len(train):,} {unit} of {list_names(train_files)} for training, "
        f"{len(val):,} of {list_names(val_files) or 'the rest'} for {config.eval_name}"
    )
    if unused:
        note += f"; not used: {list_names(unused)}"
    return Corpus(Tokens(train, offset), Tokens(val, offset), holds_ids, note)


def unwrap(source):
    """`source`, or the innermost folder if `source` holds only one folder, as unpacked archives do."""
    places = visible_places(source)
    if len(places) == 1 and places[0].is_dir():
        return unwrap(places[0])
    return source


def corpus_files(source: Path, eval_split: str) -> tuple[list[Path], list[Path]]:
    """The files for training, and those of `eval_split`, "val" or "test". The second list may be empty.

    The names in the folder `source` tell them apart: train.txt and valid.txt, wiki.train.tokens and wiki.valid.tokens,
    or folders train and dev. Such names differ only in this word and in numbers. All other files are left out. Without
    such names, all text files are for training. Raises UserError if `source` holds several corpora.
    """
    if source.is_file():
        return [source], []
    if source == STDLIB:
        return stdlib_files(), []
    if is_imdb(source):
        # Sort by file name, so that the classes mix: validation may see only the first reviews.
        reviews = (source / "train").glob("*/*.txt")
        return sorted(reviews, key=lambda file: (file.name, file.parent)), []

    corpora = defaultdict(lambda: defaultdict(list))  # files by part, by the other words of their names
    for place in visible_places(source):
        part = split_part(place.name)
        if part is not None:
            other_words = name_words(place.name).difference(PARTS)
            corpora[other_words][part] += text_files(place) if place.is_dir() else [place]
    with_train = [corpus for corpus in corpora.values() if "train" in corpus]
    with_val = [corpus for corpus in with_train if "val" in corpus]
    with_test = [corpus for corpus in with_train if "test" in corpus]
    found = with_val or with_test
    if len(found) > 1:
        names = " and ".join(list_names(corpus["train"]) for corpus in found)
        raise UserError(f"{source} holds several corpora, with {names}; put each corpus in a folder of its own")
    if found:
        return found[0]["train"], found[0][eval_split]
    files = text_files(source)
    if with_train:
        files = [file for file in files if split_part(file.relative_to(source).parts[0]) != "test"]
    return files, []


PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def split_part(name: str) -> str | None:
    """train, val or test, if the name of a file or folder has one such word: val for wiki.valid.tokens."""
    parts = {PARTS[word] for word in name_words(name).intersection(PARTS)}
    return parts.pop() if len(parts) == 1 else None


def name_words(name):
    """The words in the name of a file. Dots, underscores, hyphens and digits separate them."""
    return frozenset(re.split(r"[._\d-]+", name.lower()))


def is_imdb(source):
    """Whether `source` is IMDb's folder. Its folder unsup holds reviews without labels."""
    return (source / "train" / "unsup").is_dir()


def is_ids(file):
    return file.suffix in (".npy", ".bin")


def stdlib_files() -> list[Path]:
    """The Python files of the interpreter's standard library, without tests, installed packages and empty files."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [
        file
        for file in sorted(STDLIB.rglob("*.py"))
        if left_out.isdisjoint(file.relative_to(STDLIB).parts) and file.stat().st_size > 0
    ]


def text_files(folder):
    """The visible files below `folder` that are not empty and have no zero byte at their start."""
    files = []
    for file in visible_files(folder):
        with reading(file), open(file, "rb") as stream:
            start = stream.read(8192)
        if start and b"\0" not in start:
            files.append(file)
    return files


def visible_places(folder):
    """The files and folders in `folder`, sorted, without hidden ones. None if `folder` is a file."""
    return sorted(folder.glob("[!.]*"))


def list_names(files):
    names = ", ".join(file.name for file in files[:3])
    return names if len(files) <= 3 else f"{names}, ... ({len(files):,} in all)"


SMALL_CORPUS = 2**26  # bytes; a smaller corpus of several files is joined in memory


def read_values(files: list[Path], config: CorpusConfig, separator: bytes) -> np.ndarray:
    """The token ids of .npy and .bin files, or the bytes of text files.

    A single file is mapped to memory. Several files are joined: in memory, or, if they are large, in a file in
    cache_dir, which is mapped and kept until one of them changes. `separator` follows each of several texts.
    """
    if len(files) == 1:
        return map_file(files[0], config.bin_dtype)
    separator = np.frombuffer(separator, np.uint8)
    if not is_ids(files[0]):
        parts = partial(text_blocks, files, separator)
    else:
        dtype = np.result_type(*{map_file(file, config.bin_dtype).dtype for file in files})
        parts = partial(id_blocks, files, config.bin_dtype, dtype)
    if sum(file.stat().st_size for file in files) < SMALL_CORPUS:
        return np.concatenate(list(parts()))
    name = digest(*map(stamp, files), separator, config.bin_dtype)
    return cached_array(Path(config.cache_dir) / f"corpus-{name}.npy", lambda: tqdm(parts(), "joining files"))


def text_blocks(files, separator):
    for file in files:
        with reading(file), open(file, "rb") as stream:
            while block := stream.read(2**22):
                yield np.frombuffer(block, np.uint8)
        yield separator


def id_blocks(files, bin_dtype, dtype):
    for file in files:
        for block in Tokens(map_file(file, bin_dtype)).blocks():
            yield block.astype(dtype)


def map_file(file, bin_dtype):
    with reading(file):
        if file.suffix != ".npy":
            return np.memmap(file, bin_dtype if file.suffix == ".bin" else np.uint8, mode="r")
        values = np.load(file, mmap_mode="r")
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ValueError(f"it holds {values.dtype} of shape {values.shape}; token ids must be integers (n,)")
        return values


def tokenize(corpus: Tokens, tokenizer: JsonTokenizer, cache_dir: str | Path) -> Tokens:
    """The tokens of a corpus of bytes. `cache_dir` keeps them for the next run."""
    file = Path(cache_dir) / f"tokens-{digest(tokenizer.json, corpus.values)}.npy"
    return Tokens(cached_array(file, lambda: encode_corpus(corpus, tokenizer)))


def encode_corpus(corpus, tokenizer):
    """Yields the tokens of a corpus of bytes in parts."""
    parts = text_parts(corpus.values)
    with tqdm(desc="tokenizing", total=len(corpus), unit="B", unit_scale=True) as bar:
        while group := list(islice(parts, 16)):
            yield np.concatenate(tokenizer.encode_texts(group))
            bar.update(sum(len(text.encode()) for text in group))


def text_parts(values, size=2**18):
    """Yields the text of UTF-8 bytes (n,) in parts of up to `size` bytes.

    A part ends at the end of a line, unless the line is longer than a part.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start = 0
    while start < len(values):
        block = in_memory(values[start : start + size]).tobytes()
        end = block.rfind(b"\n") + 1 or len(block)  # rfind is -1 without a line end
        start += end
        yield decoder.decode(block[:end], final=start == len(values))


# ----------------------------------------------------------------------------------------------------------------------
# Windows of a corpus


@dataclass
class TextWindows(Dataset):
    """Training windows of Perceiver AR at random places of a corpus, indexed by (step, index in the global batch)."""

    tokens: Tokens
    max_seq_len: int
    num_latents: int
    seed: int

    def __post_init__(self):
        if len(self.tokens) <= self.max_seq_len:
            raise UserError(
                f"the training data has {len(self.tokens)} tokens, fewer than model.max_seq_len + 1 = "
                f"{self.max_seq_len + 1}; lower model.max_seq_len or give more data"
            )

    def __getitem__(self, key: tuple[int, int]) -> Example:
        return self.draw(example_rng(self.seed, key))

    def draw(self, rng: np.random.Generator) -> Example:
        """input_ids (T,) and labels (N,): the token after each of the last N inputs."""
        start = rng.integers(len(self.tokens) - self.max_seq_len)
        window = self.tokens[start : start + self.max_seq_len + 1]
        return {"input_ids": window[:-1], "labels": window[-self.num_latents :]}


@dataclass
class TextBlocks(Dataset):
    """A whole corpus for evaluation. Each block predicts N tokens, with up to T tokens of context.

    Together the blocks predict every token once, except the first.
    """

    tokens: Tokens
    max_seq_len: int
    num_latents: int
    pad: int = ByteTokenizer.PAD

    def __len__(self):
        return math.ceil((len(self.tokens) - 1) / self.num_latents)

    def __getitem__(self, index: int) -> Example:
        """input_ids (T,), padded on the left, labels (N,) and pad_mask (T,)."""
        first = 1 + index * self.num_latents  # the first token to predict
        end = min(first + self.num_latents, len(self.tokens))
        start = max(0, end - 1 - self.max_seq_len)
        window = self.tokens[start:end]
        return left_padded(window, end - first, self.max_seq_len, self.num_latents, self.pad)


def left_padded(window, num_predicted, max_seq_len, num_latents, pad) -> Example:
    """input_ids (T,), labels (N,) and pad_mask (T,) of a window of up to T + 1 tokens.

    The last `num_predicted` tokens are labels.
    """
    padding = max_seq_len + 1 - len(window)
    labels = window[len(window) - num_predicted :]
    return {
        "input_ids": np.pad(window[:-1], (padding, 0), constant_values=pad),
        "labels": np.pad(labels, (num_latents - num_predicted, 0), constant_values=IGNORE),
        "pad_mask": np.arange(max_seq_len) < padding,
    }


def pad_right(ids, length) -> Example:
    """input_ids (length,) of up to `length` ids, and pad_mask (length,), true at padding."""
    return {
        "input_ids": np.pad(ids, (0, length - len(ids)), constant_values=ByteTokenizer.PAD),
        "pad_mask": np.arange(length) >= len(ids),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Splits of files


def hold_out(items: list, val_fraction: float) -> tuple[list, list]:
    """Splits items into two lists: for training, and every n-th for validation, n = 1 / val_fraction.

    Of two or more items, at least one is for validation.
    """
    every = min(round(1 / val_fraction), len(items))
    train = [item for number, item in enumerate(items) if number % every != every // 2]
    return train, items[every // 2 :: every]


def hold_out_folders(root, files, val_fraction):
    """Like `hold_out`, but files of one folder stay together, because versions of one piece often share a folder.

    The folder of a file is the topmost one below `root` that directly holds files. Files in `root` itself stand alone.
    If there is only one folder, single files are held out.
    """
    holders = {file.parent for file in files} - {root}
    groups = defaultdict(list)
    for file in files:
        folders = [folder for folder in file.parents if folder in holders]
        group = folders[-1] if folders else file
        groups[group].append(file)
    if len(groups) < 2:
        return hold_out(files, val_fraction)
    train, val = hold_out(list(groups.values()), val_fraction)
    return list(chain(*train)), list(chain(*val))


@dataclass
class LabelledConfig(LoaderConfig):
    """The fields that say how labeled examples are split."""

    val_fraction: ValFraction = 0.1  # fraction of each class held out for validation, if the data has no val
    eval_split: Literal["val", "test"] = "val"  # test: evaluate on the part test of the data instead

    @property
    def eval_name(self) -> str:
        return "test" if self.eval_split == "test" else "validation"


def split_classes(source: Path, read: Callable[[Path], dict], config: LabelledConfig) -> tuple[dict, dict, str]:
    """Examples by class for training and for validation, and a line that says where they come from.

    `read` takes a file or folder and returns its examples by class. If `source` holds train and val (or test), they are
    the two parts; with `eval_split` test the second is always test. Otherwise the two parts are split from `source`
    (from train, if `source` holds nothing else), with `val_fraction` of each class for validation. Raises UserError if
    a class has only one example, or if the classes of the two parts differ.
    """
    parts = {split_part(place.name): place for place in visible_places(source)}
    train_part = parts.get("train")
    val_part = parts.get(config.eval_split) or parts.get("test")
    if config.eval_split == "test" and not (train_part and val_part):
        raise UserError(f"data.eval_split=test: {source} does not hold the parts train and test; leave it at val")
    if train_part and val_part:
        train, val = read(train_part), read(val_part)
        origin = f"{train_part.name} and {val_part.name}"
    else:
        if list(parts) == ["train"]:
            source = train_part
        train, val = {}, {}
        origin = "held out"
        for name, examples in read(source).items():
            if len(examples) < 2:
                raise UserError(f"class {name} of {source} has one example; it needs two, one of them for validation")
            train[name], val[name] = hold_out(examples, config.val_fraction)
    if train.keys() != val.keys():
        raise UserError(f"{origin} of {source} must hold the same classes, not {', '.join(train)} / {', '.join(val)}")
    num_train, num_val = (sum(map(len, classes.values())) for classes in (train, val))
    return train, val, f"{source}: {num_train:,} examples for training, {num_val:,} for {config.eval_name} ({origin})"


def labelled_files(source: Path, suffixes: tuple[str, ...], config: LabelledConfig) -> tuple[dict, dict, str]:
    """`split_classes` of files that end in one of `suffixes`, with one folder per class."""
    return split_classes(source, lambda folder: class_files(folder, suffixes), config)


def class_files(folder, suffixes):
    """The visible files with one of `suffixes`, by class folder.

    Raises UserError if there are fewer than two class folders, or if one has no such file.
    """
    classes = {place.name: [] for place in visible_places(folder) if place.is_dir()}
    if len(classes) < 2:
        raise UserError(
            f"{folder} holds fewer than two class folders; it must hold CLASS/*{suffixes[0]}, or the folders "
            f"train and val with CLASS/*{suffixes[0]}"
        )

    def is_valid(file):
        name = os.path.basename(file).lower()
        return name.endswith(suffixes) and not name.startswith(".")

    with reading(folder):
        found = make_dataset(folder, classes, is_valid_file=is_valid)
    for file, files in found:  # make_dataset pairs each file with its class's value in `classes`, here a list
        files.append(Path(file))
    return classes


# ----------------------------------------------------------------------------------------------------------------------
# Images with labels


def read_image(file: str | Path, channels: int) -> Image.Image:
    """An image file in gray (1 channel) or RGB (3), upright by its EXIF orientation, transparent pixels on white.

    Raises UserError if it cannot be read, or has more than 8 bits per channel.
    """
    with open_image(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return to_channels(image, channels)


IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # Pillow would start a program for EPS
MAX_PIXELS = 2**26  # 8192 x 8192; a file of a few bytes can declare any size
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_pixels` is stricter


@contextmanager
def open_image(file: str | Path) -> Iterator[Image.Image]:
    """Yields an image file. Raises UserError if it cannot be read, also in the block."""
    with reading(file), Image.open(file, formats=IMAGE_FORMATS) as image:
        check_pixels(image)
        yield image


def check_pixels(image: Image.Image):
    """Raises ValueError if an image is too large to decode."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}; make it smaller")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image in gray (1 channel) or RGB (3), transparent pixels on white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have mode {image.mode}; give an image with 8 bits per channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def file_array(files: list[Path]) -> np.ndarray:
    """The paths of files (n,) in one block of bytes; os.fsdecode turns an element into a path."""
    return np.array(list(map(os.fsencode, files)))


@dataclass
class LabelledImages:
    images: np.ndarray  # `file_array` (n,), or uint8 pixels (n, H, W) or (n, H, W, 3)
    labels: np.ndarray | list[int]
    class_names: list[str]


def load_labelled_images(dataset: str, path: str | None, cache_dir: str, train: bool) -> LabelledImages:
    """The training or the test set of mnist or cifar10, from the folder `path`.

    If `path` is None, from `cache_dir`, to which a missing dataset is downloaded.
    """
    root = Path(path or cache_dir).expanduser()
    read, needed = READERS[dataset]
    with reading(f"data.dataset={dataset} in {root} (it needs {needed}; your own images: data.dataset=imagefolder)"):
        return read(root, train, download=path is None)


def read_mnist(root, train, download):
    if download:
        datasets.MNIST(root, download=True)
    part = "train" if train else "t10k"
    images = read_idx(root, f"{part}-images-idx3-ubyte", datasets.mnist.read_image_file)
    labels = read_idx(root, f"{part}-labels-idx1-ubyte", datasets.mnist.read_label_file)
    if labels.shape != images.shape[:1] or labels.max() > 9:
        raise UserError(
            f"{root}: MNIST must have images of shape (n, height, width) and labels of shape (n,) from 0 to 9; "
            f"the shapes are {images.shape} and {labels.shape}"
        )
    return LabelledImages(images, labels, list("0123456789"))


MAX_IDX_BYTES = 2**28  # MNIST has 47 million; a compressed file can hold a thousand times its size


def read_idx(root, name, read):
    """The array that torchvision's `read` finds in an IDX file in `root` or root/MNIST/raw, which may be compressed."""
    files = sorted([*root.glob(f"{name}*"), *root.glob(f"MNIST/raw/{name}*")])
    if not files:
        raise FileNotFoundError(f"there is no {name}")
    with reading(files[0]), tempfile.NamedTemporaryFile() as unpacked:  # torchvision reads no compressed files
        with gzip.open(files[0]) if files[0].suffix == ".gz" else open(files[0], "rb") as packed:
            data = packed.read(MAX_IDX_BYTES + 1)
        if len(data) > MAX_IDX_BYTES:
            raise ValueError(f"it holds more than {MAX_IDX_BYTES} bytes")
        unpacked.write(data)
        unpacked.flush()
        return read(unpacked.name).numpy()


def read_cifar10(root, train, download):
    if root.name == datasets.CIFAR10.base_folder:
        root = root.parent
    found = datasets.CIFAR10(root, train, download=download)  # compares MD5 checksums before it opens pickles
    return LabelledImages(found.data, found.targets, found.classes)


READERS = {  # a function for each dataset, and the files that it needs
    "mnist": (read_mnist, "train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, or these with .gz"),
    "cifar10": (read_cifar10, "the folder cifar-10-batches-py; files with other MD5 checksums are not opened"),
}
