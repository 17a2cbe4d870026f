"""Turn large texts into one file for training: `python -m perceiver.prepare INPUT ... --out data/c4/train.npy`.

The inputs are text files, .jsonl files with one document per line, or folders of them; .gz and .zst files are
unpacked on the way. With --tokenizer, the output is a .npy file of token ids; all cores tokenize. Without it, the
output is a .txt file of the texts' bytes. The memory that it takes does not depend on the size of the texts. If it is
stopped, the same command continues.
"""

import argparse
import gzip
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from perceiver.data import JsonTokenizer, check_unreadable
from perceiver.errors import UserError, reading, run_script
from perceiver.io import (
    HEADER_SIZE,
    digest,
    flush,
    import_optional,
    replacing,
    say,
    stamp,
    tell,
    visible_files,
    write_header,
)

PIECE = 2**18  # bytes of text that are tokenized as one; a character at the end of a longer line may break
MAX_DOCUMENT = 2**26  # bytes of a line of a .jsonl file
BATCH = 2**22  # bytes of text in memory at a time
SAVE_SECONDS = 5  # time between two saves of the state

Piece = tuple[bytes, bool]  # text, and whether a document ends after it


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perceiver.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text files, .jsonl, .gz or .zst files, folders")
    parser.add_argument("--out", required=True, help="the file to write: .npy with a tokenizer, .txt without one")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: keep the bytes of the texts")
    parser.add_argument("--end-of-text", help="a token of the tokenizer to add after each document; default: none")
    parser.add_argument("--text-column", default="text", help="the key of the text in .jsonl files; default: text")
    parser.add_argument(
        "--max-unreadable", type=float, default=0.01, help="largest fraction of broken lines in .jsonl; default: 0.01"
    )
    return parser.parse_args()


class Encoder:
    """Turns a batch of pieces into an array: token ids, or bytes with an empty line between documents."""

    def __init__(self, args: argparse.Namespace):
        self.tokenizer = None
        self.dtype = np.dtype(np.uint8)
        self.end = np.frombuffer(b"\n\n", np.uint8)
        if args.tokenizer is None:
            return
        self.tokenizer = JsonTokenizer.read(args.tokenizer)
        self.dtype = self.tokenizer.dtype
        self.end = np.empty(0, self.dtype)
        if args.end_of_text is not None:
            token = self.tokenizer.tokenizer.token_to_id(args.end_of_text)
            if token is None:
                raise UserError(f"--end-of-text {args.end_of_text} is not a token of {args.tokenizer}")
            self.end = np.array([token], self.dtype)

    def __call__(self, batch: list[Piece]) -> np.ndarray:
        texts = [text for text, _ in batch]
        if self.tokenizer is None:
            arrays = [np.frombuffer(text, np.uint8) for text in texts]
        else:
            arrays = self.tokenizer.encode_texts([text.decode("utf-8", "replace") for text in texts])
        parts = []
        for array, (_, is_end) in zip(arrays, batch):
            parts += [array, self.end] if is_end else [array]
        return np.concatenate(parts)


def find_files(inputs: list[str]) -> list[Path]:
    """The files of the inputs, in order. Raises UserError if one is missing or a folder is empty."""
    files = []
    for source in map(Path, inputs):
        if not source.exists():
            raise UserError(f"{source} does not exist")
        found = visible_files(source) if source.is_dir() else [source]
        if not found:
            raise UserError(f"{source} holds no files")
        files += found
    return files


def unpack(file: Path, raw: BinaryIO) -> BinaryIO:
    """The content of a file that is open as `raw`."""
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.suffix == ".zst":
        zstandard = import_optional("zstandard", f"reading {file}")
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
    return raw


class Source:
    """The text of one file in pieces. Counts the lines of .jsonl files that are broken."""

    def __init__(self, file: Path, args: argparse.Namespace):
        self.file = file
        self.args = args
        self.num_lines = self.num_broken = 0

    def pieces(self, stream: BinaryIO) -> Iterator[Piece]:
        name = self.file.name.removesuffix(self.file.suffix) if self.file.suffix in (".gz", ".zst") else self.file.name
        return self.documents(stream) if name.endswith((".jsonl", ".json")) else self.lines(stream)

    def documents(self, stream):
        while line := stream.readline(MAX_DOCUMENT):
            self.num_lines += 1
            try:
                if not line.endswith(b"\n") and len(line) == MAX_DOCUMENT:
                    raise ValueError(f"it is longer than {MAX_DOCUMENT} bytes")
                text = json.loads(line)[self.args.text_column]
                yield text.encode("utf-8", "replace"), True
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                self.num_broken += 1
                message = f"{self.file}: line {self.num_lines} holds no {self.args.text_column} ({error!r:.80})"
                check_unreadable(self.num_broken, max(1000, self.num_lines), self.args.max_unreadable, message)
                if self.num_broken <= 10:
                    tell(f"left out: {message}")

    def lines(self, stream):
        block = stream.read(PIECE)
        if b"\0" in block[:8192]:
            tell(f"left out: {self.file} is not text")
            return
        while block:
            block += stream.readline(PIECE)
            following = stream.read(PIECE)
            yield block, not following
            block = following


def batches(file: Path, args: argparse.Namespace) -> Iterator[tuple[list[Piece], int]]:
    """The pieces of a file in batches, each with the number of bytes of the file that are read so far."""
    batch, size = [], 0
    with reading(file), open(file, "rb") as raw:
        for piece in Source(file, args).pieces(unpack(file, raw)):
            batch.append(piece)
            size += len(piece[0])
            if size >= BATCH:
                yield batch, raw.tell()
                batch, size = [], 0
        if batch:
            yield batch, raw.tell()


@dataclass
class State:
    """How far a job is. A file beside the output keeps it."""

    job: str  # changes with the inputs and the options
    size: int  # bytes of the output
    file: int = 0  # number of the input file that comes next
    batch: int = 0  # number of its batch that comes next

    def save(self, path: Path, result: BinaryIO):
        """Writes the state, once the output of which it tells is on the disk."""
        result.flush()
        os.fsync(result.fileno())
        self.size = result.tell()
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)))


def start_or_continue(job: str, header_size: int, path: Path, partial: Path) -> State:
    """The state of a stopped job, if the inputs and options are the same. Otherwise of a new one."""
    try:
        state = State(**json.loads(path.read_text()))
        if state.job == job and state.size <= partial.stat().st_size:
            tell(f"continues {partial}")
            return state
    except (OSError, ValueError, TypeError):  # there is none, or it is damaged
        pass
    partial.write_bytes(bytes(header_size))
    return State(job, header_size)


def prepare(args: argparse.Namespace):
    out = Path(args.out)
    ending, header_size = (".txt", 0) if args.tokenizer is None else (".npy", HEADER_SIZE)
    if out.suffix != ending:
        raise UserError(f"--out {out} must end in {ending} {'without' if ending == '.txt' else 'with'} --tokenizer")
    files = find_files(args.inputs)
    encode = Encoder(args)
    options = f"{args.end_of_text} {args.text_column}"
    job = digest(*map(stamp, files), options, getattr(encode.tokenizer, "json", ""))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, state_file = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.state")
    state = start_or_continue(job, header_size, state_file, partial)
    sizes = [file.stat().st_size for file in files]
    saved = time.monotonic()
    with open(partial, "r+b") as result, tqdm(total=sum(sizes), unit="B", unit_scale=True) as bar:
        result.truncate(state.size)
        result.seek(state.size)
        while state.file < len(files):
            done = sum(sizes[: state.file])
            for number, (batch, position) in enumerate(batches(files[state.file], args)):
                bar.update(done + position - bar.n)
                if number < state.batch:
                    continue  # a stopped run has done it
                result.write(encode(batch).tobytes())
                state.batch += 1
                if time.monotonic() - saved > SAVE_SECONDS:
                    state.save(state_file, result)
                    saved = time.monotonic()
            state.file += 1
            state.batch = 0
        bar.update(bar.total - bar.n)
        count = (result.tell() - header_size) // encode.dtype.itemsize
        if count and header_size:
            write_header(result, encode.dtype)
    state_file.unlink(missing_ok=True)
    if not count:
        partial.unlink()
        raise UserError(f"{', '.join(args.inputs)} holds no text")
    flush(partial)
    partial.replace(out)
    say(f"wrote {out}: {count:,} {'tokens' if header_size else 'bytes'} of {len(files):,} files")


if __name__ == "__main__":
    run_script(lambda: prepare(parse_args()))
