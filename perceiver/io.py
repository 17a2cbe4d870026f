"""Files in and out: reading, caches and downloads of datasets, and the output of generate.py and predict.py."""

import hashlib
import importlib
import json
import os
import pickletools
import re
import resource
import shutil
import sys
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from perceiver.errors import UserError, printable, reading, reason


def import_optional(package: str, purpose: str) -> ModuleType:
    """Imports a package of requirements-extra.txt. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_bytes(file: str | Path) -> bytes:
    with reading(file):
        return Path(file).read_bytes()


def read_text(source: str) -> bytes:
    """The bytes of a text file, or of stdin if `source` is "-"."""
    with reading(shorten(source)):
        return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()


def visible_files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted by path, without hidden files and folders."""
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            files.append(file)
    return files


def natural_key(file: str | Path) -> list:
    """A sort key that orders numbers by value: 9.png comes before 10.png."""
    parts = re.split(r"(\d+)", str(file))
    return [int(part) if part.isdigit() else part for part in parts]


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or fewer if `ulimit -v` says so."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return installed if limit == resource.RLIM_INFINITY else min(limit, installed)


# What a pickle in a file of torch.save may name. weights_only allows more, such as bytearrays of any length.
PICKLED = re.compile(
    r"collections OrderedDict|torch Size|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|"
    r"torch (float|int|uint|bfloat|bool)\d*"
)


def load_tensors(file: str | Path, device: str | torch.device = "cpu"):
    """The object in a file of torch.save: tensors, numbers and texts in dicts and lists.

    The file may come from anybody: it runs no code, and takes no more memory than its size. Raises an exception if it
    is damaged.
    """
    advise_upgrade()
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(file):
            raise ValueError("it is compressed, which torch.save never does")
        if damaged := archive.testzip():  # torch.load does not check
            raise ValueError(f"its part {damaged} has a wrong checksum")
        for name in archive.namelist():
            if name.endswith(".pkl"):
                check_pickle(archive.read(name))
    return torch.load(file, map_location=device, weights_only=True)


def check_pickle(data: bytes):
    """Raises ValueError if a pickle names a function or class that is not in a checkpoint."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "STACK_GLOBAL" or operation.name == "GLOBAL" and not PICKLED.fullmatch(argument):
            raise ValueError(f"it holds {argument or operation.name}, which no checkpoint needs")


@cache
def advise_upgrade():
    if torch.__version__ < (2, 10):
        tell(
            f"torch {torch.__version__} has a known flaw (CVE-2026-24747): a checkpoint made for an attack can corrupt "
            "memory. Load only files that you trust, or install torch 2.10 or newer"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Writing, caches and downloads


@contextmanager
def replacing(path: Path, before: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yields a temporary path to write. Then flushes that file to the disk and renames it to `path` atomically.

    `before` runs right before the file takes its name.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    yield temporary
    flush(temporary)
    if before is not None:
        before()
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path):
    """Waits until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cached_array(file: Path, make: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """The array in the .npy file `file`, mapped to memory. If the file does not exist, `make` yields its parts (n,).

    Only one part is in memory at a time.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, open(temporary, "wb") as out:
            write_array(out, make())
    with reading(file):
        return np.load(file, mmap_mode="r")


HEADER_SIZE = 128  # bytes of a .npy header; numpy leaves space for any length


def write_array(out: BinaryIO, parts: Iterable[np.ndarray]):
    """Writes parts (n,) of one type to a .npy file."""
    out.write(bytes(HEADER_SIZE))
    for part in parts:
        part.tofile(out)
    write_header(out, part.dtype)


def write_header(out: BinaryIO, dtype: np.dtype):
    """Writes the header of a .npy file, once the values after it are there."""
    count = (out.seek(0, os.SEEK_END) - HEADER_SIZE) // dtype.itemsize
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    out.seek(0)
    np.lib.format.write_array_header_1_0(out, header)


def digest(*parts: str | np.ndarray) -> str:
    """16 hexadecimal digits that change with any of `parts`, for the names of cache files.

    An array that is mapped from a file is known by the name, size and time of the file. It is not read.
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.memmap):
            file, start = file_place(part)
            part = f"{stamp(file)} {start} {len(part)} {part.dtype}"
        total.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return total.hexdigest()[:16]


def stamp(file: str | Path) -> str:
    """The name, size and time of a file. They change if its content does."""
    with reading(file):
        status = os.stat(file)
    return f"{os.path.abspath(file)} {status.st_size} {status.st_mtime_ns}"


def file_place(values: np.memmap) -> tuple[str, int]:
    """The file of an array that is mapped, or of a slice of one, and the place of its first byte in the file."""
    whole = values
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    return whole.filename, whole.offset + values.ctypes.data - whole.ctypes.data


@dataclass
class Download:
    """The source of a dataset."""

    url: str
    unpacked: str  # file or folder in the archive, and in the cache folder
    sha256: str = ""  # of the archive; empty if unknown
    md5: str | None = None  # of the archive
    unpacked_md5: str | None = None  # of the unpacked file


def fetch(name: str, download: Download, cache_dir: str | Path) -> Path:
    """The unpacked dataset `name` in `cache_dir`. Downloads and unpacks its archive if necessary.

    If a step fails, deletes the new download, so that the next run downloads it again, and raises UserError.
    """
    cache_dir = Path(cache_dir)
    target = cache_dir / download.unpacked
    archive = cache_dir / download.url.rpartition("/")[2]
    partial = cache_dir / f"{download.unpacked}.tmp"
    is_new = not archive.exists()
    if target.exists():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        if is_new:
            tell(f"downloading {download.url} to {archive}")
            torch.hub.download_url_to_file(download.url, str(archive), hash_prefix=download.sha256)
            check_md5(archive, download.md5)
        unpack(archive, partial)
        check_md5(partial / download.unpacked, download.unpacked_md5)
        (partial / download.unpacked).rename(target)
        partial.rmdir()
    except Exception as error:  # archives raise all kinds of exceptions
        if is_new:
            archive.unlink(missing_ok=True)
        raise UserError(
            f"data.dataset={name} cannot be downloaded or unpacked ({reason(error)}); put {archive.name} or "
            f"its content {download.unpacked} into {cache_dir}, or give the path of a copy with data.path="
        ) from None
    return target


MAX_UNPACKED = 2**32  # bytes; a small .zip file can hold a thousand times its size


def unpack(archive: Path, folder: Path):
    """Unpacks a .zip or .tar.gz archive. Nothing is written outside `folder`."""
    if archive.suffix == ".zip":  # zip archives are always unpacked safely
        with zipfile.ZipFile(archive) as content:
            size = sum(entry.file_size for entry in content.infolist())
        if size > MAX_UNPACKED:
            raise RuntimeError(f"{archive} unpacks to {size} bytes, too many for a dataset")
        shutil.unpack_archive(archive, folder)
    else:
        shutil.unpack_archive(archive, folder, filter="data")


def check_md5(file: Path, md5: str | None):
    if md5 and not check_integrity(file, md5):
        raise RuntimeError(f"{file} has a wrong checksum")


# ----------------------------------------------------------------------------------------------------------------------
# The output of the scripts


def say(*lines: str):
    """Prints a result to stdout, above any progress bar."""
    tqdm.write(printable("\n".join(lines), sys.stdout), sys.stdout)


def report(args: Namespace, result: dict, *lines: str):
    """Prints a result of generate.py or predict.py: `lines`, or with --json one line with the JSON object `result`."""
    if args.json:
        lines = [json.dumps(result)]
    if lines:
        say(*lines)


def tell(line: str):
    """Prints a remark to stderr, above any progress bar."""
    tqdm.write(printable(line, sys.stderr), sys.stderr)


def check_options(task, args: Namespace, names: Iterable[str]):
    """Raises UserError if the user gave one of the options `names`, but `task` does not take it."""
    for name in names:
        if getattr(args, name) and name not in task.options:
            raise UserError(f"--{name.replace('_', '-')} is not for task {task.name}")


def check_counts(args: Namespace, *names: str):
    """Raises UserError if one of the options `names` is below 1."""
    for name in names:
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {vars(args)[name]} must be at least 1")


def shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def input_files(inputs: list[str], endings: tuple[str, ...], what: str) -> list[str]:
    """`inputs`, with each folder replaced by its files with one of `endings`. Raises UserError if a folder has none."""
    files = []
    for source in inputs:
        found = [source]
        if os.path.isdir(source):
            names = [str(file) for file in visible_files(Path(source))]
            found = sorted((name for name in names if name.lower().endswith(endings)), key=natural_key)
            if not found:
                raise UserError(f"{source} holds no {what}")
        files += found
    return files


def progress(inputs: list[str], limit: int | None = None) -> Iterator[tuple[str, str]]:
    """Yields each input, up to `limit`, with a unique name for its output files. Shows a progress bar for several."""
    if limit is not None and limit < len(inputs):
        tell(f"--limit {limit} leaves out {len(inputs) - limit} of {len(inputs)} inputs")
        inputs = inputs[:limit]
    uses = Counter()
    with tqdm(inputs, disable=len(inputs) == 1) as bar:
        for source in bar:
            stem = Path(source).stem if os.path.isfile(source) else "text"
            uses[stem] += 1
            yield source, stem if uses[stem] == 1 else f"{stem}-{uses[stem]}"


@contextmanager
def output(folder: str | Path, name: str) -> Iterator[Path]:
    """Yields the path of a file to write, and creates its folder. Raises UserError if the file cannot be written."""
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except (OSError, ValueError) as error:  # ValueError: encoders refuse some sizes and rates
        raise UserError(f"cannot write {path}: {reason(error)}") from None
    tell(f"wrote {path}")


def output_files(name: str, count: int, endings: Iterable[str]) -> list[Path]:
    """The paths of `count` files to write, numbered if there are several. Creates their folder.

    Raises UserError if `name` does not end in one of `endings`. Call it before a long computation.
    """
    path = Path(name)
    if path.is_dir() or path.suffix.lower() not in endings:
        raise UserError(f"cannot write {name}: the file name must end in {' or '.join(endings)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {name}: {reason(error)}") from None
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]


def save_picture(picture: Tensor, file: Path):
    """Writes a picture (3, H, W) of uint8."""
    with output(file.parent, file.name):
        to_pil_image(picture).save(file)
