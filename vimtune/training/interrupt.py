"""Ctrl-C and SIGTERM as a request to stop between two of the next steps, where the run can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal after its state was saved; the message is for the user."""


class Stopping(Exception):
    """Unwinds to where the run is saved; it is raised in all processes together.

    `failure` says why, where this process knows a reason other than a request to stop.
    """

    def __init__(self, failure: str | None = None) -> None:
        super().__init__(failure)
        self.failure = failure


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into `requested = True`.

    A second Ctrl-C raises KeyboardInterrupt at once. The former handlers come back on exit; outside
    the main thread, where Python cannot install handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
