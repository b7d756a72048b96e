"""The processes that prepare images: how they start, and how they take signals."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GRACE_SECONDS = 10
"""Seconds for which a worker lives on after SIGTERM."""


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


def prepare_worker(worker: int) -> None:
    """Set up the process of a worker: its signals, and one thread for OpenCV.

    Args:
        worker: number of the worker, which DataLoader passes and nothing here depends on.
    """
    del worker
    # The main process handles Ctrl-C and stops the workers after it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die_later)
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
