"""Weights & Biases."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from vimtune.loggers.base import LoggedRun, Logger, Record, curves
from vimtune.loggers.notes import read_note, write_note
from vimtune.loggers.registry import register_logger


@register_logger("wandb")
class WandB(Logger):
    """A run of Weights & Biases, called like the run folder, in the project "vimtune" or `WANDB_PROJECT`.

    A row of its history is a record, and `step` in it is the axis of all curves: the rows of a step and of
    the epoch that ends with it may then come in different sessions. wandb counts rows, so after resuming it
    knows how many records it has. `WANDB_MODE=offline` writes them to wandb/ in the run folder, for
    `wandb sync`; there each session writes all records of the run, because nobody can be asked which have
    been synced.
    """

    summary = "Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline and its other variables are respected"
    module = package = "wandb"

    _run: Any
    _row: int

    def open(self, run: LoggedRun, known: int) -> int:
        """Begin a run of wandb, or go on with the one that the run folder names."""
        import wandb

        note = read_note(run.folder, "wandb", r"([a-z0-9]{1,64})\n")
        name = secrets.token_hex(4) if note is None else note[1]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "vimtune",
            name=os.environ.get("WANDB_NAME") or run.name,
            id=name,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            reinit="create_new",  # A run that the program has open already goes on beside this one.
        )
        if note is None:
            write_note(run.folder, "wandb", f"{name}\n")
        self._run.define_metric("*", step_metric="step")
        self._row = int(self._run.step)
        return self._row

    def write(self, record: Record) -> None:
        """Add a row."""
        self._run.log({"step": record["step"], "epoch": record["epoch"], **curves(record)}, step=self._row)
        self._row += 1

    def write_result(self, run: LoggedRun, scores: Mapping[str, float], step: int) -> None:
        """Put the scores into the summary, which the table of runs shows."""
        self._run.summary.update(dict(scores))

    def close(self, error: BaseException | None) -> None:
        """Finish the run of wandb, as a failed one if there was an error."""
        self._run.finish(exit_code=0 if error is None else 1)
