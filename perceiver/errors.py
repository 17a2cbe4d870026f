"""Errors for the user: a mistake in the input becomes one line and exit code 2, never a traceback."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import torch


class UserError(Exception):
    """A mistake in the user's input. The scripts print it as one line and exit with code 2."""

    def __init__(self, message: str):
        # A DataLoader raises a worker's UserError again. Its message is a traceback, then the original message.
        super().__init__(message.rstrip().rpartition("\nperceiver.errors.UserError: ")[2])


@contextmanager
def reading(file) -> Iterator[None]:
    """Turns any exception in the block into a UserError, which says that `file` cannot be read, and why."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):  # the file is not to blame
        raise
    except Exception as error:  # decoders raise all kinds of exceptions on a broken file
        raise UserError(f"cannot read {file}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The message of an exception in one line."""
    if isinstance(error, EOFError):
        return "it ends too early"
    message = getattr(error, "strerror", None) or " ".join(str(error).split())
    return message or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or on the CPU. On the CPU, PyTorch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explaining_memory(advice: str) -> Iterator[None]:
    """Turns an out-of-memory error in the block into a UserError of one line, with `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({reason(error)[-200:]}). {advice}") from None


def printable(text: str, stream: TextIO) -> str:
    """`text` as it is, or for a terminal with escaped control characters: they could change how the terminal works.

    Surrogates, which stand for bytes that are not UTF-8, are escaped too.
    """
    if not stream.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda c: f"\\x{ord(c[0]) & 255:02x}", text)


def print_error(line: str):
    print(printable(line, sys.stderr), file=sys.stderr, flush=True)


def run_script(main: Callable[[], int | None], report: Callable[[str], None] = print_error):
    """Runs the `main` of a script and exits with the code that it returns, or with the code of its exception.

    `report` prints the line of an error.
    """
    try:
        with explaining_memory("Use a smaller batch or model"):
            code = main() or 0
    except UserError as error:
        report(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of stdout closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # for example a full disk
        where = f"{error.filename}: " if error.filename else ""
        report(f"error: {where}{reason(error)}")
        code = 2
    sys.exit(code)
