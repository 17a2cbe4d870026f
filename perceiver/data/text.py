"""Text: tokenizers, corpora and windows of them, texts with labels."""
import codecs
import hashlib
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from perceiver.config import require
from perceiver.data.batches import LoaderConfig
from perceiver.errors import UserError

IGNORE = -100  # label of a position that has no loss, cross_entropy's default


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


class ByteTokenizer:
    """UTF-8 bytes after six special tokens: byte b is token b + 6 (DeepMind's bytes_tokenizer.py)."""
    PAD, BOS, EOS, MASK, CLS, SEP = range(6)
    OFFSET = 6
    vocab_size = 262

    def encode(self, text: str | bytes) -> list[int]:
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return [byte + self.OFFSET for byte in data]

    def decode(self, tokens: list[int]) -> str:
        """Special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return self.stream(tokens, self.new_stream(), final=True)

    def new_stream(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")("replace")

    def stream(self, tokens: list[int], state: codecs.IncrementalDecoder, final: bool = False) -> str:
        """The text that is complete with these tokens; the bytes of an unfinished character wait in `state`."""
        return state.decode(bytes(token - self.OFFSET for token in tokens if token >= self.OFFSET), final)


class IdTokenizer:
    """Token ids written as numbers, for corpora that come as ids: "17 4 256" <-> [17, 4, 256]."""

    def encode(self, text: str) -> list[int]:
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise UserError("the model was trained on token ids: the prompt must be numbers, like '17 4 256'") from None

    def decode(self, tokens: list[int]) -> str:
        return self.stream(tokens, self.new_stream())

    def new_stream(self) -> None:
        return None

    def stream(self, tokens: list[int], state: None, final: bool = False) -> str:
        return "".join(f" {token}" for token in tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Text corpora


@dataclass
class TextDataConfig(LoaderConfig):
    dataset: str = "stdlib"  # stdlib (.py files of this Python), wikitext103, enwik8 or imdb; not used with a path
    path: str | None = None  # own data: a text file, a folder of them, or token ids in .npy or .bin
    bin_dtype: str = "uint16"  # of the ids in a .bin file: uint8 or uint16
    cache_dir: str = "data"  # where a dataset is looked for, and downloaded to if it is not there
    val_fraction: float = 0.05  # share held out for validation: files of a folder, or the end of a file
    max_val_tokens: int = 1_000_000  # validation uses this many at most, from the first; of a text, bytes
    tokenizer: str | None = None  # a tokenizer.json, for causal_lm; null: bytes
    holds_ids: bool | None = None  # whether the data is token ids, not text; null: as the ending of the file says

    def __post_init__(self):
        super().__post_init__()
        require(self.dataset in ("stdlib", *DOWNLOADS),
                f"dataset={self.dataset!r} must be stdlib, {' or '.join(DOWNLOADS)}; your own text goes in data.path")
        require(self.bin_dtype in ("uint8", "uint16"), f"bin_dtype={self.bin_dtype!r} must be uint8 or uint16")
        require(0 < self.val_fraction <= 0.5, f"val_fraction={self.val_fraction} must be in (0, 0.5]")
        require(self.max_val_tokens >= 2, f"max_val_tokens={self.max_val_tokens} must be at least 2")
        if self.holds_ids is None:  # a checkpoint's config knows it, so that its data need not be there
            self.holds_ids = self.path is not None and is_ids(Path(self.path).expanduser())


@dataclass
class Tokens:
    """A corpus in memory or mapped from disk: token ids are `values` + `offset`."""
    values: np.ndarray  # (number of tokens,), uint8 or wider
    offset: int = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.values[part].astype(np.int64) + self.offset

    def split(self, val_fraction: float) -> tuple["Tokens", "Tokens"]:
        """The first part for training and the end for validation."""
        first = int(len(self) * (1 - val_fraction))
        return Tokens(self.values[:first], self.offset), Tokens(self.values[first:], self.offset)


# Folders that come with a split of their own: files for training and for validation.
SPLIT_FILES = (("wiki.train.raw", "wiki.valid.raw"), ("wiki.train.tokens", "wiki.valid.tokens"),
               ("train.txt", "val.txt"), ("train.bin", "val.bin"), ("train.npy", "val.npy"))

# name: address, SHA-256 or MD5 of the archive if it is known, and where in cache_dir the data lies once unpacked
DOWNLOADS = {
    "wikitext103": ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                    "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794", "wikitext-103-raw"),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", None, "enwik8"),
    "imdb": ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", "7c2ac02c03563afcf9b574c7e56c153a",
             "aclImdb"),
}
ENWIK8_BYTES, ENWIK8_MD5 = 100_000_000, "a1fa5ffddb56f4953e226637dabbb36a"


def load_text(config: TextDataConfig) -> tuple[Tokens, Tokens]:
    """The training and the validation corpus. Raises UserError if there is no file, or nothing in it."""
    if config.path is not None:
        source = Path(config.path).expanduser()
    elif config.dataset == "stdlib":
        source = Path(sysconfig.get_path("stdlib"))
        train, val = split_files(source, stdlib_files(source), config.val_fraction)
        return train, Tokens(val.values[: config.max_val_tokens], val.offset)
    else:
        source = fetch(config.dataset, Path(config.cache_dir))

    if not source.exists():
        raise UserError(f"data.path={source} does not exist")
    pair = split_pair(source)
    if pair is not None:
        train, val = (read_tokens(file, config.bin_dtype) for file in pair)
    elif (source / "train" / "pos").is_dir() and (source / "test" / "pos").is_dir():  # IMDb, with train/unsup
        train, val = (read_reviews(source / part) for part in ("train", "test"))
    elif source.is_dir():
        files = [file for file in sorted(source.rglob("*"))
                 if file.is_file() and not any(part.startswith(".") for part in file.relative_to(source).parts)]
        train, val = split_files(source, [file for file in files if is_text(file)], config.val_fraction)
    elif source.stat().st_size == ENWIK8_BYTES and source.name == "enwik8":
        tokens = read_tokens(source, config.bin_dtype)  # the customary split: 90, 5 and 5 MB, the last for testing
        train, val = Tokens(tokens.values[:90_000_000], tokens.offset), Tokens(
            tokens.values[90_000_000:95_000_000], tokens.offset)
    else:
        train, val = read_tokens(source, config.bin_dtype).split(config.val_fraction)
    val = Tokens(val.values[: config.max_val_tokens], val.offset)
    if len(train) == 0 or len(val) < 2:
        raise UserError(f"{source} leaves {len(train)} tokens to train on and {len(val)} to validate on; "
                        "give more text, or raise data.val_fraction")
    return train, val


def is_ids(source: Path) -> bool:
    return (split_pair(source) or [source])[0].suffix in (".npy", ".bin")


def split_pair(source: Path) -> tuple[Path, Path] | None:
    """The files for training and for validation in a folder that comes with both."""
    pairs = ((source / train, source / val) for train, val in SPLIT_FILES)
    return next((pair for pair in pairs if all(file.is_file() for file in pair)), None)


def read_tokens(file: Path, bin_dtype: str) -> Tokens:
    """A file mapped to memory: ids from .npy and .bin, bytes from anything else."""
    try:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty")
        if file.suffix == ".npy":
            values = np.load(file, mmap_mode="r", allow_pickle=False)
            if values.ndim != 1 or values.dtype.kind not in "iu":
                raise UserError(f"{file} holds {values.dtype} of shape {values.shape}; token ids must be integers (n,)")
            return Tokens(values)
        if file.suffix == ".bin":
            return Tokens(np.memmap(file, bin_dtype, mode="r"))
        return Tokens(np.memmap(file, np.uint8, mode="r"), ByteTokenizer.OFFSET)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None


def write_tokens(file: Path, values: np.ndarray) -> None:
    """An .npy file (n,) of what took long to make: whole, or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    with open(partial, "wb") as out:
        np.save(out, values)
    partial.replace(file)


def read_reviews(folder: Path) -> Tokens:
    """The texts of IMDb's class folders, with classes mixed, as the first ones alone may be used."""
    files = sorted(folder.glob("*/*.txt"), key=lambda file: (file.name, file.parent))
    return Tokens(np.frombuffer(b"\n\n".join(read_bytes(file) for file in files), np.uint8), ByteTokenizer.OFFSET)


def read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def stdlib_files(folder: Path) -> list[Path]:
    """The Python files of the interpreter's standard library, without tests and installed packages."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [file for file in sorted(folder.rglob("*.py")) if not left_out & set(file.relative_to(folder).parts)]


def is_text(file: Path) -> bool:
    try:
        with open(file, "rb") as stream:
            return b"\0" not in stream.read(8192)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def split_files(folder: Path, files: list[Path], val_fraction: float) -> tuple[Tokens, Tokens]:
    """The bytes of text files; every 1 / val_fraction-th file is for validation, or the end of all if they are few."""
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise UserError(f"{folder} holds no text files")

    def read(files: list[Path]) -> Tokens:
        return Tokens(np.frombuffer(b"".join(read_bytes(file) for file in files), np.uint8), ByteTokenizer.OFFSET)

    if len(files) < round(1 / val_fraction):
        return read(files).split(val_fraction)
    train, val = hold_out(files, val_fraction)
    return read(train), read(val)


def hold_out(files: list[Path], val_fraction: float) -> tuple[list[Path], list[Path]]:
    """Files for training, and every 1 / val_fraction-th for validation: at least one of two or more."""
    every = min(round(1 / val_fraction), len(files))
    return [file for n, file in enumerate(files) if n % every != every // 2], files[every // 2 :: every]


def fetch(name: str, cache_dir: Path, downloads: dict[str, tuple] = DOWNLOADS) -> Path:
    """A dataset in `cache_dir`, unpacked from its archive there or downloaded first; or UserError."""
    url, checksum, unpacked = downloads[name]
    target, archive = cache_dir / unpacked, cache_dir / url.rpartition("/")[2]
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        if not archive.exists():
            print(f"downloading {url} to {archive}", file=sys.stderr)
            torch.hub.download_url_to_file(url, str(archive))
            if checksum and checksum not in (hashlib.new(kind, archive.read_bytes()).hexdigest()
                                             for kind in ("sha256", "md5")):
                archive.unlink()
                raise RuntimeError(f"{url} came with a wrong checksum")
        partial = cache_dir / f"{unpacked}.tmp"
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as files:
                files.extractall(partial)
        else:
            with tarfile.open(archive) as files:
                files.extractall(partial, filter="data")
        source = partial / unpacked
        if name == "enwik8" and hashlib.md5(source.read_bytes()).hexdigest() != ENWIK8_MD5:
            raise RuntimeError(f"{source} has a wrong checksum")
        source.rename(target)
        partial.rmdir()
    except (OSError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"data.dataset={name} cannot be had ({error}); put {archive.name} or its content {unpacked} "
                        f"into {cache_dir}, or name a copy with data.path=") from None
    return target


# ----------------------------------------------------------------------------------------------------------------------
# Examples of a corpus


class TextWindows(Dataset):
    """Training windows of Perceiver AR at random places of a corpus, by key (step, index in the global batch).

    The prefix positions that prefix dropout keeps are drawn here too, with the window, because a GPU's random numbers
    would depend on how a batch is spread over the ranks.
    """

    def __init__(self, tokens: Tokens, max_seq_len: int, num_latents: int, num_kept: int, seed: int):
        if len(tokens) < max_seq_len + 1:
            raise UserError(f"the training data has {len(tokens)} tokens, fewer than model.max_seq_len + 1 = "
                            f"{max_seq_len + 1}; lower model.max_seq_len or give more data")
        self.tokens, self.max_seq_len, self.num_latents = tokens, max_seq_len, num_latents
        self.num_kept, self.seed = num_kept, seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """What `draw` returns, and prefix_keep (P',)"""
        rng = np.random.default_rng((self.seed, *key))
        example = self.draw(rng)
        prefix_length = self.max_seq_len - self.num_latents
        if self.num_kept < prefix_length:
            example["prefix_keep"] = np.sort(rng.permutation(prefix_length)[: self.num_kept])
        return example

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """input_ids (T,), labels (N,) of the last N of them"""
        start = rng.integers(len(self.tokens) - self.max_seq_len)
        window = self.tokens[start : start + self.max_seq_len + 1]
        return {"input_ids": window[:-1], "labels": window[-self.num_latents :]}


class TextBlocks(Dataset):
    """A whole corpus for evaluation: every token but the first is predicted once, N at a time, each with all of its
    context that fits."""

    def __init__(self, tokens: Tokens, max_seq_len: int, num_latents: int, pad: int = ByteTokenizer.PAD):
        self.tokens, self.max_seq_len, self.num_latents, self.pad = tokens, max_seq_len, num_latents, pad

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.num_latents)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """input_ids (T,), padded on the left, labels (N,), pad_mask (T,)"""
        first = 1 + index * self.num_latents  # the first token to predict
        end = min(first + self.num_latents, len(self.tokens))
        window = self.tokens[max(0, end - 1 - self.max_seq_len) : end]
        return left_padded(window, end - first, self.max_seq_len, self.num_latents, self.pad)


def left_padded(window: np.ndarray, num_predicted: int, max_seq_len: int, num_latents: int,
                pad: int) -> dict[str, np.ndarray]:
    """input_ids (T,), labels (N,), pad_mask (T,) of up to T + 1 tokens, of which the last ones are predicted"""
    padding = max_seq_len + 1 - len(window)
    labels = np.pad(window[len(window) - num_predicted :], (num_latents - num_predicted, 0), constant_values=IGNORE)
    return {"input_ids": np.pad(window[:-1], (padding, 0), constant_values=pad), "labels": labels,
            "pad_mask": np.arange(max_seq_len) < padding}


# ----------------------------------------------------------------------------------------------------------------------
# Masked words of a corpus

WHITESPACE = np.frombuffer(b" \t\n\r\v\f", np.uint8) + np.int64(ByteTokenizer.OFFSET)


@dataclass
class MaskedTextDataConfig(TextDataConfig):
    mask_prob: float = 0.15  # probability of a word to be chosen for prediction
    unmasked_weight: float = 0.0  # training: weight of the loss of a byte that is not chosen, and only to be repeated

    def __post_init__(self):
        super().__post_init__()
        require(self.tokenizer is None, f"tokenizer={self.tokenizer} is for causal_lm; words are masked byte by byte")
        require(0 < self.mask_prob <= 1, f"mask_prob={self.mask_prob} must be in (0, 1]")
        require(self.unmasked_weight >= 0, f"unmasked_weight={self.unmasked_weight} must not be negative")


def mask_words(ids: np.ndarray, mask_prob: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Input ids (L,) and labels (L,) of byte tokens (L,): each word between whitespace is chosen with `mask_prob`.

    Of the chosen ones 80% become MASK, byte by byte, 10% random bytes, and 10% stay; labels are theirs alone. At least
    one word is chosen: a batch has something to learn from, even of one short text.
    """
    inside = ~np.isin(ids, WHITESPACE)
    starts = inside & ~np.concatenate([[False], inside[:-1]])
    draws = rng.random(1 + starts.sum())  # of the words, from 1 on
    if draws[1:].size and draws[1:].min() >= mask_prob:
        draws[rng.integers(1, len(draws))] *= mask_prob
    draws = np.where(inside, draws[np.cumsum(starts)], 1.0)  # (L,): below 0.8 mask_prob masked, and so on
    masked = draws < 0.8 * mask_prob
    replaced = (draws < 0.9 * mask_prob) & ~masked
    input_ids = np.where(masked, ByteTokenizer.MASK, ids)
    input_ids[replaced] = rng.integers(ByteTokenizer.OFFSET, ByteTokenizer.vocab_size, replaced.sum())
    return input_ids, np.where(draws < mask_prob, ids, IGNORE)


class MaskedWindows(Dataset):
    """Training windows at random places of a corpus, with masked words, by key (step, index in the global batch)."""

    def __init__(self, tokens: Tokens, max_seq_len: int, mask_prob: float, seed: int):
        if tokens.offset != ByteTokenizer.OFFSET:
            raise UserError("the training text is token ids; to mask words, it must be text: choose another data.path")
        if len(tokens) < max_seq_len:
            raise UserError(f"the training text has {len(tokens)} bytes, fewer than model.input.max_seq_len="
                            f"{max_seq_len}; lower that or give more text")
        self.tokens, self.max_seq_len, self.mask_prob, self.seed = tokens, max_seq_len, mask_prob, seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """input_ids (L,), labels (L,)"""
        rng = np.random.default_rng((self.seed, *key))
        start = rng.integers(len(self.tokens) - self.max_seq_len + 1)
        input_ids, labels = mask_words(self.tokens[start : start + self.max_seq_len], self.mask_prob, rng)
        return {"input_ids": input_ids, "labels": labels}


class MaskedBlocks(Dataset):
    """A whole corpus for evaluation, in consecutive blocks whose masks are always the same."""

    def __init__(self, tokens: Tokens, max_seq_len: int, mask_prob: float):
        self.tokens, self.max_seq_len, self.mask_prob = tokens, max_seq_len, mask_prob

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.max_seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """input_ids (L,), padded on the right, labels (L,), pad_mask (L,)"""
        block = self.tokens[index * self.max_seq_len : (index + 1) * self.max_seq_len]
        input_ids, labels = mask_words(block, self.mask_prob, np.random.default_rng(index))
        labels = np.pad(labels, (0, self.max_seq_len - len(block)), constant_values=IGNORE)
        return pad_right(input_ids, self.max_seq_len) | {"labels": labels}


def pad_right(ids: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """input_ids (length,) of up to `length` ids, and pad_mask (length,), true at padding"""
    return {"input_ids": np.pad(ids, (0, length - len(ids)), constant_values=ByteTokenizer.PAD),
            "pad_mask": np.arange(length) >= len(ids)}


# ----------------------------------------------------------------------------------------------------------------------
# Texts with labels


@dataclass
class TextClassificationDataConfig(LoaderConfig):
    dataset: str = "stdlib"  # stdlib (which package of this Python is the code from?) or imdb; not used with a path
    path: str | None = None  # own data: CLASS/*.txt in this folder, or in its folders train and val (or test)
    cache_dir: str = "data"  # where a dataset is looked for, and downloaded to if it is not there
    val_fraction: float = 0.1  # share of each class's files held out for validation, if the data comes without a split

    def __post_init__(self):
        super().__post_init__()
        require(self.dataset in ("stdlib", "imdb"),
                f"dataset={self.dataset!r} must be stdlib or imdb; your own texts go in data.path")
        require(0 < self.val_fraction <= 0.5, f"val_fraction={self.val_fraction} must be in (0, 0.5]")


class LabelledText(Dataset):
    """Texts cut to `max_seq_len` bytes, with the class that their file belongs to."""

    def __init__(self, files: dict[str, list[Path]], max_seq_len: int, pieces: bool = False):
        """`files` by class. With `pieces`, a file is not one text but many, each of `max_seq_len` bytes; a rest of less
        than half of that is left out."""
        self.class_names, self.max_seq_len = list(files), max_seq_len
        self.texts: list[bytes] = []
        self.labels: list[int] = []
        for label, name in enumerate(files):
            for file in files[name]:
                text = read_bytes(file)
                end = max(1, len(text) - max_seq_len // 2) if pieces else 1
                texts = [text[start : start + max_seq_len] for start in range(0, end, max_seq_len) if text]
                self.texts += texts
                self.labels += [label] * len(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        """input_ids (L,), padded on the right, pad_mask (L,), label"""
        return encode_text(self.texts[index], self.max_seq_len) | {"label": self.labels[index]}


def encode_text(text: bytes, max_seq_len: int) -> dict[str, np.ndarray]:
    """input_ids (L,) of the first L = `max_seq_len` bytes, padded on the right, and pad_mask (L,)"""
    return pad_right(np.array(ByteTokenizer().encode(text[:max_seq_len]), np.int64), max_seq_len)


def load_labelled_text(config: TextClassificationDataConfig, max_seq_len: int) -> tuple[LabelledText, LabelledText]:
    """Texts for training and for validation. Raises UserError if they are not there or their classes differ."""
    stdlib = config.path is None and config.dataset == "stdlib"
    if stdlib:
        train, val = hold_out_of_each(stdlib_packages(Path(sysconfig.get_path("stdlib"))), config.val_fraction)
    else:
        source = fetch(config.dataset, Path(config.cache_dir)) if config.path is None else Path(config.path)
        train, val = labelled_files(source, (".txt",), config.val_fraction)
    return (LabelledText(train, max_seq_len, pieces=stdlib), LabelledText(val, max_seq_len, pieces=stdlib))


def labelled_files(source: Path, suffixes: tuple[str, ...], val_fraction: float
                   ) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Files by class for training and for validation: in source/CLASS, or in its folders train and val (or test).

    Raises UserError if they are not there or the classes of the two differ.
    """
    if not source.is_dir():
        raise UserError(f"data.path={source} is not a folder; it must be one with CLASS/*{suffixes[0]}, or with train "
                        "and val")
    held_out = next((source / name for name in ("val", "test") if (source / name).is_dir()), None)
    if held_out is not None and (source / "train").is_dir():
        train, val = class_files(source / "train", suffixes), class_files(held_out, suffixes)
        if train.keys() != val.keys():
            raise UserError(f"{source / 'train'} and {held_out} must hold the same classes, not "
                            f"{', '.join(train)} and {', '.join(val)}")
        return train, val
    classes = class_files(source, suffixes)
    for name, files in classes.items():
        if len(files) < 2:
            raise UserError(f"{source / name} holds one file; it needs two, one of them for validation")
    return hold_out_of_each(classes, val_fraction)


def hold_out_of_each(classes: dict[str, list[Path]], val_fraction: float
                     ) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    split = {name: hold_out(files, val_fraction) for name, files in classes.items()}
    return {name: train for name, (train, _) in split.items()}, {name: val for name, (_, val) in split.items()}


def class_files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files of the class folders in `folder`, without IMDb's unlabelled ones."""
    classes = {place.name: [file for file in sorted(place.iterdir()) if file.suffix.lower() in suffixes]
               for place in sorted(folder.iterdir())
               if place.is_dir() and place.name != "unsup" and not place.name.startswith(".")}
    empty = next((name for name, files in classes.items() if not files), None)
    if len(classes) < 2 or empty:
        raise UserError(f"{folder / empty if empty else folder} holds no "
                        f"{f'{suffixes[0]} files' if empty else 'class folders'}; expected two or more, "
                        f"CLASS/*{suffixes[0]}, in {folder} or in its folders train and val")
    return classes


def stdlib_packages(folder: Path) -> dict[str, list[Path]]:
    """The files of the ten packages of the standard library with the most text, of those with ten files or more.

    The longest come first: every tenth is then one of any length.
    """
    packages = {}
    for file in sorted(stdlib_files(folder), key=lambda file: (-file.stat().st_size, file)):
        if file.parent != folder and file.stat().st_size:
            packages.setdefault(file.relative_to(folder).parts[0], []).append(file)
    sizes = {name: sum(file.stat().st_size for file in files) for name, files in packages.items() if len(files) >= 10}
    return {name: packages[name] for name in sorted(sorted(sizes, key=sizes.get)[-10:])}
