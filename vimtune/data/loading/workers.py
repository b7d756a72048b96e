"""The processes that prepare images: how they start, and how they take signals."""

from __future__ import annotations

import multiprocessing
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vimtune.data.errors import WorkerError
from vimtune.text import printable, shorten

GRACE_SECONDS = 10
"""Seconds for which a worker lives on after SIGTERM."""
_WORKER_TROUBLE = (
    r"DataLoader worker \(pid|Pin memory thread exited|shared memory|ancdata|Too many open files"
)
"""What torch says when a worker has died or a batch cannot be sent, as opposed to errors in its code."""


@contextmanager
def death_noticed_later() -> Iterator[None]:
    """Restore the handler of SIGCHLD that DataLoader replaces within the `with` block.

    DataLoader's own handler raises an error wherever the main process happens to be when a worker dies, for
    example while it saves a run. Without that handler DataLoader notices the death when it is asked for the
    next batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    former = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not former and former is not None:
        signal.signal(signal.SIGCHLD, former)


@contextmanager
def naming_worker_trouble() -> Iterator[None]:
    """Turn what happens to the workers within the `with` block into a `WorkerError`.

    Raises:
        WorkerError: a worker died, or the system ran out of something.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error).strip() or type(error).__name__
        plumbing = not isinstance(error, RuntimeError) and not text.startswith("Caught ")
        if not plumbing and not re.search(_WORKER_TROUBLE, text):
            raise
        reason = printable(shorten(text.splitlines()[-1]))
        raise WorkerError(
            f"the processes that prepare images failed ({reason}). Most often memory, shared memory or "
            f"open files ran out: use fewer --num-workers, a smaller --batch-size, or --cache none."
        ) from error


def prepare_worker(worker: int) -> None:
    """Set up the process of a worker: its signals, and one thread for OpenCV.

    Args:
        worker: number of the worker, which DataLoader passes and nothing here depends on.
    """
    del worker
    # The main process handles Ctrl-C and stops the workers after it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # On Windows the signal ends a process without asking it.
        signal.signal(signal.SIGTERM, _die_later)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # A handler of the main process is inherited.
    if "cv2" in sys.modules:
        import cv2

        cv2.setNumThreads(0)  # Each worker has one core, and OpenCV's thread pool does not survive a fork.


def _die_later(signum: int, frame: Any) -> None:
    """Let the worker live on for `GRACE_SECONDS` after SIGTERM.

    Schedulers send the signal to the whole process group, and the main process needs its workers until it
    has finished the step and saved.
    """
    signal.alarm(GRACE_SECONDS)


def worker_context(num_workers: int) -> Any:
    """The `multiprocessing` context of the workers: fork where the system can, None for Python's default.

    Forked workers share the memory pages of the cache with the main process.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return multiprocessing.get_context("fork") if num_workers and can_fork else None
