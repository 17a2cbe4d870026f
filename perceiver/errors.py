"""Errors for the user: a mistake in the input becomes one line and exit code 2, never a traceback."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def print_error(line: str):
    print(line, file=sys.stderr, flush=True)


def run_script(main: Callable[[], int | None], report: Callable[[str], None] = print_error):
    """Runs the `main` of a script and exits with the code that it returns, or with the code of its exception.

    `report` prints the line of an error.
    """
    try:
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
