"""How a run is stopped in the middle, for tests."""

from __future__ import annotations

import signal

import pytest

from vimtune.training import run
from vimtune.training.stepper import Stepper


def interrupt_at(monkeypatch: pytest.MonkeyPatch, where: str, call: int, number: int = signal.SIGINT) -> None:
    """Send this process signal `number` just before call `call` of a step ("_compute_gradients") or an
    evaluation ("evaluate")."""
    owner = Stepper if where == "_compute_gradients" else run
    original, calls = getattr(owner, where), []

    def wrapped(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, where, wrapped)
