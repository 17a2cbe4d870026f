"""How the scripts end."""
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the user's input: the scripts print it as one line and exit with code 2."""

    def __init__(self, message: str):
        # One from a DataLoader's worker comes as "Caught UserError in ...", a traceback, and the message at its end.
        super().__init__(message.rstrip().rpartition("\nperceiver.errors.UserError: ")[2])


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's main, whose result is the exit code, and exits; mistakes of the user's leave no traceback."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
