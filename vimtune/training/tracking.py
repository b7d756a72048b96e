"""What a run shows while it goes."""

from __future__ import annotations

import sys
import time

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vimtune.console import fit, print_line
from vimtune.tasks.base import Task
from vimtune.text import duration
from vimtune.training.state import EpochRecord

BAR_WIDTH = 12
"""Columns of the progress bar, which a terminal narrower than four of them goes without."""


class Tracker:
    """Shows how the main process gets on; in the other processes it does nothing."""

    def __init__(
        self,
        console: Console,
        task: Task,
        *,
        epochs: int,
        total_steps: int,
        first_step: int = 0,
        warnings: list[str] | None = None,
    ) -> None:
        """Prepare what is shown.

        Args:
            console: where to print; a quiet one in processes that show nothing.
            task: names the scores and the unit.
            epochs, total_steps: length of the run.
            first_step: number of steps that were done before this session of the run.
            warnings: those so far; `warn` adds to this list.
        """
        self.console, self.task = console, task
        self.warnings = [] if warnings is None else warnings
        self.epochs, self.total_steps, self.first_step = epochs, total_steps, first_step
        self.started = time.monotonic()
        self.score = "-"
        self.status: list[tuple[str, int]] = []
        self.steps_done = first_step
        self.live: Live | None = None
        if console.is_terminal and not console.quiet:
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
                *((f"{score.name_in_lines} {self.score}", 4) for score in self.task.scores[:1]),
                (f"lr {lr:.1e}", 6),
                (f"{rate:.0f} {self.task.short_unit}/s", 5),
                (f"eta {self._remaining(step)}", 1),
            ],
        )

    def show_evaluation(self, split: str) -> None:
        """Say beside the progress bar that `split` is being scored."""
        self._show(self.steps_done, [(f"evaluating on {split}", 0)])

    def show_epoch(self, record: EpochRecord, split: str) -> None:
        """Print the line of an epoch, evaluated on `split` if it has scores."""
        evaluated = record.scores is not None
        scores = record.scores or {}
        parts = [(f"epoch {record.epoch}/{self.epochs}", 0), (f"loss {record.train_loss:.4f}", 3)]
        if evaluated:
            parts += [(f"{split} loss {record.loss:.4f}", 4)]
            for number, score in enumerate(self.task.scores):
                value = scores[score.name]
                if value is None:
                    continue
                if number == 0:
                    self.score = score.show(value, digits=1)
                    parts += [(f"{split} {score.name_in_lines} {score.show(value)}", 1)]
                else:
                    parts += [(f"{score.name_in_lines} {score.show(value)}", 5)]
        parts += [(f"lr {record.lr:.1e}", 7), (f"{record.rate:.0f} {self.task.short_unit}/s", 6)]
        parts += [(f"eta {self._remaining(record.step)}", 2)]
        self.message(fit(parts, self.console.width if self.console.is_terminal else sys.maxsize))

    def close(self) -> None:
        """Remove the progress bar; closing again does nothing."""
        if self.live is not None:
            self.live.stop()

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
