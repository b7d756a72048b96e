"""Objects in processes of their own, so that a crash, a hang or a poisoned GPU context costs one call.

    worker = Worker(Machine, "cuda")
    worker.call("measure", seconds=60)

The parent decides who runs when: workers that wait do nothing.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

READY = "ready"


class WorkerFailed(Exception):
    """A call raised, took too long, or ended the process; `kind` is the exception's name."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Worker:
    """One object of `factory` in a fresh process; started anew after it died."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        self._factory, self._arguments = factory, arguments
        self._process: Any = None
        self._pipe: Any = None
        self.generation = 0
        """How often the process was started: what an earlier one held is gone."""
        self.start()

    def start(self) -> None:
        """Start the process without waiting for it."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._factory, self._arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self.generation += 1
        self._pending = [READY]

    def send(self, method: str, *arguments: Any) -> None:
        """Begin a call; `receive` gets its result. Restarts a dead process."""
        if not (self._pending or self._process.is_alive()):
            self.stop()
            self.start()
        with suppress(OSError):  # it has just died: `receive` will find that, and its last words
            self._pipe.send((method, arguments))
        self._pending.append(method)

    def receive(self, seconds: float) -> Any:
        """Result of the call begun last, after any that nobody waited for.

        Raises:
            WorkerFailed: see there. The process was killed if it did not answer in time.
        """
        result: Any = None
        while self._pending:
            result = self._receive_one(seconds)
        return result

    def _receive_one(self, seconds: float) -> Any:
        method = self._pending.pop(0)
        try:
            if not self._pipe.poll(seconds):
                self.stop()
                raise WorkerFailed("Timeout", f"no answer to {method!r} within {seconds:.0f} s")
            outcome, *content = self._pipe.recv()
        except (EOFError, OSError):
            self.stop()
            raise WorkerFailed("Died", f"the process ended during {method!r}") from None
        if outcome == "error":
            if method == READY:
                self.stop()
            raise WorkerFailed(*content)
        return content[0]

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        self.send(method, *arguments)
        return self.receive(seconds)

    def stop(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._pending = []


def _serve(pipe: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        target = factory(*arguments)
    except Exception as error:  # whatever it is, the parent has to know
        pipe.send(_failure(error))
        return
    pipe.send(("result", None))
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        try:
            reply: tuple[Any, ...] = ("result", getattr(target, method)(*given))
        except Exception as error:
            reply = _failure(error)
        pipe.send(reply)


def _failure(error: Exception) -> tuple[str, str, str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return "error", type(error).__name__, lines[0][:300]
