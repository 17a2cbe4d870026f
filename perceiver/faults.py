"""Faults while a run is going: stop signals, the time limit, a second process in its folder, a dead data worker."""

import fcntl
import os
import signal
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perceiver import checkpoint
from perceiver.distributed import Ranks
from perceiver.errors import UserError, reason
from perceiver.io import tell

STARTED = time.monotonic()
LOCK = "lock"  # in a run folder


class StopSignal:
    """Remembers SIGTERM, Ctrl-C or the end of the time limit, so that the loop can save a checkpoint and end."""

    def __init__(self, max_hours: float | None = None):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self.receive)
        if max_hours is not None:
            seconds = STARTED + 3600 * max_hours - time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))  # sends SIGALRM; 0 would mean never

    def receive(self, number: int, frame):
        self.received = number

    @property
    def name(self) -> str:
        if self.received == signal.SIGALRM:
            return "train.max_hours"
        return signal.Signals(self.received).name if self.received else "another process"


class RunFolder:
    """The run folder of this process. A lock keeps other processes out until this one ends, however it ends."""

    def __init__(self, folder: Path):
        """Locks the folder if it exists. Raises UserError if another process has it, or if it cannot be written."""
        self.folder = folder
        self.file = None
        release_in_children(weakref.ref(self))
        if folder.exists():
            self.lock()

    def open(self, source: Path | None):
        """Creates the folder, after the folder of an earlier run has been moved aside. See `move_aside`."""
        if self.folder.exists():
            self.lock()
        checkpoint.move_aside(self.folder, source)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the folder train.out_dir={self.folder}: {reason(error)}") from None
        self.lock()

    def lock(self):
        path = self.folder / LOCK
        try:
            file = open(path, "a+")
        except OSError as error:
            raise UserError(f"cannot write to the folder train.out_dir={self.folder}: {reason(error)}") from None
        if self.file is not None and os.path.sameopenfile(self.file.fileno(), file.fileno()):
            file.close()
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"train.out_dir={self.folder} is in use by {file.read() or 'another process'}; "
                "wait for it, stop it, or choose another train.out_dir"
            ) from None
        except OSError as error:
            tell(f"{path}: {reason(error)}; make sure that no other process uses this folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self.file = file

    def release(self):
        if self.file is not None:
            self.file.close()
            self.file = None


def release_in_children(run: weakref.ref):
    """Takes the lock of a RunFolder from processes that this one forks: a data worker may live longer than it."""

    def release():
        if run() is not None:
            run().release()

    os.register_at_fork(after_in_child=release)


@contextmanager
def explaining_faults(ranks: Ranks) -> Iterator[None]:
    """Turns two errors in training into one line: numbers that are not finite, and the death of a data worker."""
    try:
        yield
    except FloatingPointError as error:
        if ranks.is_main:
            tell(
                f"error: {error}. Try a lower optim.lr or optim.max_grad_norm, or train.precision=float32. "
                "Checkpoints of earlier steps, if there are any, are unchanged"
            )
        raise SystemExit(1) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A worker that dies sends a signal, at which PyTorch raises RuntimeError anywhere, or it closes its connection.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        is_other = isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)
        if is_other or isinstance(error, BrokenPipeError):
            raise
        raise UserError(
            f"a data worker ended ({reason(error)}); if the system ended it for lack of memory, lower "
            "data.num_workers. The same command continues from the last checkpoint"
        ) from None
