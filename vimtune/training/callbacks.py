"""Callbacks: code of the user's that is told of a run while it goes, and may end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from vimtune.recipe import Recipe
from vimtune.tasks.report import Report
from vimtune.training.state import EpochRecord, Progress


@dataclass(frozen=True)
class StepRecord:
    """What is known of an optimizer step that is done, over all processes together."""

    step: int
    """Number of optimizer steps of the run so far, this one included."""
    epoch: int
    """Its epoch, from 1 on."""
    loss: float
    """Mean loss, per unit of the task."""
    lr: float
    """Learning rate of the first group of parameters."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    count: int
    """On how much of what the task counts, such as images, it trained."""
    seconds: float
    """How long it took, with the wait for its batches."""


@dataclass
class Session:
    """A session of a run, as callbacks see it: from the start or a resumption to the end or a stop.

    Attributes:
        recipe: the settings of the run.
        model: the model with its adapter, which is being trained.
        folder: the run folder.
        device: where this process computes.
        rank: number of this process; 0 is the main one, which alone should write files and print.
        epochs, total_steps: length of the run, unless it is stopped early.
    """

    recipe: Recipe
    model: nn.Module
    folder: Path
    device: torch.device
    rank: int
    epochs: int
    total_steps: int
    _progress: Progress = field(repr=False)
    _message: Callable[[str], None] = field(repr=False)
    _reason: str | None = field(default=None, repr=False)

    @property
    def step(self) -> int:
        """Number of optimizer steps of the run so far."""
        return self._progress.step

    @property
    def epoch(self) -> int:
        """Number of epochs that are over."""
        return self._progress.epoch

    @property
    def history(self) -> Sequence[EpochRecord]:
        """The records of the epochs that are over, also of those before this session."""
        return tuple(self._progress.history)

    @property
    def wish(self) -> str | None:
        """Why a callback of this process has asked to end the training; None if none has."""
        return self._reason

    def stop(self, reason: str = "") -> None:
        """End the training after this step or epoch, as if it were the last one.

        The run then ends as any other: the epoch is evaluated, the best adapter scored, and the report
        written. With several processes it is enough that one of them asks.

        Args:
            reason: why, for the message that says so.
        """
        self._reason = reason if self._reason is None else self._reason

    def message(self, text: str) -> None:
        """Print a line above the progress bar, in the main process."""
        self._message(text)


class Callback:
    """Base of callbacks, `vimtune.train(recipe, callbacks=[...])`: override what you need.

    Hooks are called in every process of the run, in the order of the list, and are told the same numbers
    everywhere. `session` says where the run stands, gives the model, and takes the wish to stop.

    An exception that a hook raises ends the run with its own traceback. Files of the run are whole, and it
    can be resumed from the state that was saved last. A finished run that is only reported
    (`resume="auto"`) calls no hook.
    """

    def on_start(self, session: Session) -> None:
        """Before the first step of a session, also of one that goes on; the model is ready."""

    def on_step(self, session: Session, step: StepRecord) -> None:
        """After each optimizer step; the weights are those after it."""

    def on_epoch(self, session: Session, epoch: EpochRecord) -> None:
        """After each epoch. Its state is saved, unless that is not worth it yet (`vimtune.training.saving`).

        `vimtune.save_adapter(session.model, path)` keeps the adapter as it is then. `epoch.loss` and
        `epoch.scores` are None where the epoch was not evaluated (`eval_interval`).
        """

    def on_end(self, session: Session, report: Report) -> None:
        """When the run has ended by itself or by `Session.stop`, and its report is written.

        The model has the weights of the last step; the best ones are in adapter.safetensors.
        """
