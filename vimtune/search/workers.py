"""Trials one after the other in this process, or several at once in processes of their own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Protocol

from vimtune.machine import CORES, usable_cores
from vimtune.plugins import import_package, imported_packages
from vimtune.search.trial import Job, TrialOutcome, run_trial, worker_values

PATIENCE = 120.0
"""Seconds in which a trial that is to stop takes its last step and saves its state."""


class Trials(Protocol):
    """Where trials come from and where their results go."""

    def next_job(self) -> Job | None:
        """The next trial; None if there are enough."""

    def keep_on(self, number: int, epoch: int, value: float) -> bool:
        """Note the value of an epoch of a trial; whether the trial goes on."""

    def finish(self, job: Job, outcome: TrialOutcome) -> None:
        """Note what came of a trial."""


def run_here(trials: Trials) -> None:
    """Run all trials in this process, one after the other.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
    """
    while (job := trials.next_job()) is not None:
        trials.finish(job, run_trial(job, partial(trials.keep_on, job.number)))


@dataclass
class _Worker:
    """A process that runs trials, and what it is doing."""

    process: Any
    connection: Connection
    job: Job | None = None


def run_in_processes(trials: Trials, count: int) -> None:
    """Run `count` trials at once, each in a process that lives for as long as there are trials.

    Args:
        trials: which ones.
        count: of processes.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the trials have saved their states.
        RuntimeError: a fault in a process; the message has its traceback.
    """
    context = multiprocessing.get_context("spawn")

    def start(index: int) -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, index, count, imported_packages()))
        process.start()
        theirs.close()
        return _Worker(process, ours)

    workers: list[_Worker] = []
    former = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while True:
            for index in range(count):
                if len(workers) > index and workers[index].job is not None:
                    continue
                if (job := trials.next_job()) is None:
                    break
                if len(workers) == index:
                    workers.append(start(index))
                elif not workers[index].process.is_alive():
                    workers[index] = start(index)
                workers[index].job = job
                workers[index].connection.send(job)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready:
                    _answer(worker, trials)
    finally:
        _end(workers)
        signal.signal(signal.SIGTERM, former)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _answer(worker: _Worker, trials: Trials) -> None:
    """Take a message of a process."""
    job = worker.job
    assert job is not None, "it is busy"
    try:
        kind, content = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        reason = f"its process ended (exit code {worker.process.exitcode}), for want of memory perhaps"
        kind, content = "done", TrialOutcome("failed", reason=reason)
    if kind == "epoch":
        worker.connection.send(trials.keep_on(job.number, *content))
    elif kind == "done":
        worker.job = None
        trials.finish(job, content)
    elif kind == "stopped":
        raise KeyboardInterrupt
    else:
        raise content if isinstance(content, ValueError) else RuntimeError(f"in a trial: {content}")


def _end(workers: Sequence[_Worker]) -> None:
    """End the processes; a trial that is running saves its state first."""
    for worker in workers:
        worker.process.terminate()  # to the trainer, if it is at work, SIGTERM is a request to stop
        worker.connection.close()
    for worker in workers:
        worker.process.join(PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(connection: Connection, index: int, count: int, packages: Sequence[str]) -> None:
    """What a process does: trials, until the search ends it or has ended itself."""
    _die_with_parent()
    from vimtune.exits import prepare_streams

    prepare_streams()
    for package in packages:
        import_package(package)

    def keep_on(epoch: int, value: float) -> bool:
        connection.send(("epoch", (epoch, value)))
        return bool(connection.recv())

    os.environ[CORES] = str(max(1, usable_cores() // count))
    try:
        while True:
            job = connection.recv()
            own = dataclasses.replace(job, values=worker_values(job.values, index))
            connection.send(("done", run_trial(own, keep_on)))
    except KeyboardInterrupt:
        with suppress(OSError):
            connection.send(("stopped", None))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        told = error if isinstance(error, ValueError) else traceback.format_exc()
        with suppress(OSError):
            connection.send(("error", told))


def _die_with_parent() -> None:
    """End this process as soon as the search is gone, however that ended: nobody would note its trial."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was started by the search"
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
