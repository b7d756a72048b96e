"""What a run shows while it goes, and the hand that writes its records."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vimtune.console import fit, print_line
from vimtune.tasks.base import Task
from vimtune.training.folder import RunFolder
from vimtune.training.records import EventLog, MetricsLog
from vimtune.training.state import EpochRecord

BAR_WIDTH = 12
"""Columns of the progress bar, which a terminal narrower than four of them goes without."""


def duration(seconds: float) -> str:
    """`95` -> `1:35`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Tracker:
    """Records and shows the main process's metrics; in the other processes it does nothing."""

    def __init__(
        self,
        folder: RunFolder,
        console: Console,
        task: Task,
        *,
        is_main: bool,
        epochs: int,
        total_steps: int,
        first_step: int = 0,
        keep_bytes: int = 0,
        warnings: list[str] | None = None,
    ) -> None:
        """Open the files of the main process.

        Args:
            folder: that of the run.
            console: where to print.
            task: names the scores and the unit.
            is_main: whether this is the main process.
            epochs, total_steps: length of the run.
            first_step: number of steps that were done before this session of the run.
            keep_bytes: what stays of an existing metrics.jsonl.
            warnings: those so far; `warn` adds to this list.
        """
        self.console, self.task = console, task
        self.warnings = [] if warnings is None else warnings
        self.epochs, self.total_steps, self.first_step = epochs, total_steps, first_step
        self.started = time.monotonic()
        self.score = "-"
        self.status: list[tuple[str, int]] = []
        self.steps_done = first_step
        self.metrics: MetricsLog | None = None
        self.events: EventLog | None = None
        self.live: Live | None = None
        if not is_main:
            return
        self.metrics = MetricsLog(folder, keep_bytes)
        self.events = EventLog(folder, first_step)
        if console.is_terminal:
            # Transient: figures that are no longer true do not stay above the final table.
            self.live = Live(
                console=console,
                get_renderable=self._status_line,
                transient=True,
                redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
            )

    def message(self, text: str, command: str | None = None) -> None:
        """Print `text`, above the progress bar if there is one, and below it a command to copy."""
        print_line(self.console, text)
        if command is not None:
            print_line(self.console, f"  {command}", wrap=False)

    def warn(self, text: str) -> None:
        """Print a warning and keep it for the report, unless it was said before the run was resumed."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.message(f"warning: {text}")

    def show_step(self, epoch: int, step: int, loss: float, lr: float, rate: float) -> None:
        """Move the progress bar to `step` optimizer steps done.

        Args:
            epoch: number of the epoch, from 0 on.
            step: number of steps done in the whole run.
            loss: mean loss of the step.
            lr: its learning rate.
            rate: units per second in training so far.
        """
        self._show(
            step,
            [
                (f"epoch {epoch + 1}/{self.epochs}", 0),
                (f"step {step}/{self.total_steps}", 2),
                (f"loss {loss:.3f}", 3),
                *((f"{score.name} {self.score}", 4) for score in self.task.scores[:1]),
                (f"lr {lr:.1e}", 6),
                (f"{rate:.0f} {self.task.short_unit}/s", 5),
                (f"eta {self._remaining(step)}", 1),
            ],
        )

    def show_evaluation(self, split: str) -> None:
        """Say beside the progress bar that `split` is being scored."""
        self._show(self.steps_done, [(f"evaluating on {split}", 0)])

    def record_step(self, record: Mapping[str, Any]) -> None:
        """Write one `step` record."""
        if self.metrics is None or self.events is None:
            return
        self.metrics.write({"kind": "step", **record})
        curves = {f"train/{name}": value for name, value in record.items() if name not in ("step", "epoch")}
        self.events.write_scalars(curves, record["step"])

    def record_epoch(self, record: EpochRecord, split: str) -> None:
        """Write the record of an epoch, evaluated on `split` if it has scores, and print its line."""
        evaluated = record.scores is not None
        scores = record.scores or {}
        if self.metrics is not None and self.events is not None:
            values = record.flat(self.task.unit)
            self.metrics.write({"kind": "epoch", **values, **({"split": split} if evaluated else {})})
            curves = {f"{split}/loss": record.loss} | {f"{split}/{name}": scores[name] for name in scores}
            self.events.write_scalars({**curves, "train/epoch_loss": record.train_loss}, record.step)
        parts = [(f"epoch {record.epoch}/{self.epochs}", 0), (f"loss {record.train_loss:.4f}", 3)]
        if evaluated:
            parts += [(f"{split} loss {record.loss:.4f}", 4)]
            for number, score in enumerate(self.task.scores):
                value = scores[score.name]
                if value is None:
                    continue
                if number == 0:
                    self.score = score.show(value, digits=1)
                    parts += [(f"{split} {score.name} {score.show(value)}", 1)]
                else:
                    parts += [(f"{score.name} {score.show(value)}", 5)]
        parts += [(f"lr {record.lr:.1e}", 7), (f"{record.rate:.0f} {self.task.short_unit}/s", 6)]
        parts += [(f"eta {self._remaining(record.step)}", 2)]
        self.message(fit(parts, self.console.width if self.console.is_terminal else sys.maxsize))

    def record_result(self, settings: Mapping[str, Any], scores: Mapping[str, float | None]) -> None:
        """Enter the finished run into TensorBoard's table of hyperparameters."""
        if self.events is not None:
            self.events.write_result(settings, scores, self.steps_done)

    def sync(self) -> int:
        """Have metrics.jsonl on disk; its length, 0 where nothing is written."""
        return 0 if self.metrics is None else self.metrics.sync()

    def close(self) -> None:
        """Remove the progress bar and close the files; closing again does nothing."""
        if self.live is not None:
            self.live.stop()
        for log in (self.events, self.metrics):
            if log is not None:
                log.close()

    def _show(self, steps_done: int, status: list[tuple[str, int]]) -> None:
        self.steps_done, self.status = steps_done, status
        if self.live is not None and not self.live.is_started:
            self.live.start(refresh=True)  # only now, below what is said before the first step

    def _status_line(self) -> RenderableType:
        width = self.console.width
        if width < 4 * BAR_WIDTH:
            return Text(fit(self.status, width), no_wrap=True, overflow="ellipsis")
        line = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(self.total_steps, self.steps_done, width=BAR_WIDTH)
        line.add_row(bar, Text(fit(self.status, width - BAR_WIDTH - 2), no_wrap=True, overflow="ellipsis"))
        return line

    def _remaining(self, step: int) -> str:
        done = step - self.first_step
        if done <= 0:
            return "-"
        return duration((time.monotonic() - self.started) / done * (self.total_steps - step))
