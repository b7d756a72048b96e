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
from vimtune.train.folder import RunFolder
from vimtune.train.records import EventLog, MetricsLog

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
        *,
        is_main: bool,
        epochs: int,
        total_steps: int,
        first_step: int = 0,
        keep_bytes: int = 0,
    ) -> None:
        self.console = console
        self.epochs, self.total_steps, self.first_step = epochs, total_steps, first_step
        self.started = time.monotonic()
        self.top1 = "-"
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

    def show_step(self, epoch: int, step: int, loss: float, lr: float, images_per_second: float) -> None:
        """Move the progress bar to `step` optimizer steps done."""
        self._show(
            step,
            [
                (f"epoch {epoch + 1}/{self.epochs}", 0),
                (f"step {step}/{self.total_steps}", 2),
                (f"loss {loss:.3f}", 3),
                (f"top1 {self.top1}", 4),
                (f"lr {lr:.1e}", 6),
                (f"{images_per_second:.0f} img/s", 5),
                (f"eta {self._remaining(step)}", 1),
            ],
        )

    def show_evaluation(self, split: str) -> None:
        """Say beside the progress bar that the images of `split` are being scored."""
        self._show(self.steps_done, [(f"evaluating on {split}", 0)])

    def record_step(self, record: Mapping[str, Any]) -> None:
        """Write one `step` record."""
        if self.metrics is None or self.events is None:
            return
        self.metrics.write({"kind": "step", **record})
        curves = {f"train/{name}": value for name, value in record.items() if name not in ("step", "epoch")}
        self.events.write_scalars(curves, record["step"])

    def record_epoch(self, record: Mapping[str, Any], split: str) -> None:
        """Write one `epoch` record, evaluated on `split` if it has scores, and print its line."""
        evaluated = "top1" in record
        if self.metrics is not None and self.events is not None:
            self.metrics.write({"kind": "epoch", **record, **({"split": split} if evaluated else {})})
            curves = {f"{split}/{name}": record.get(name) for name in ("loss", "top1", "top5")}
            curves["train/epoch_loss"] = record["train_loss"]
            self.events.write_scalars(curves, record["step"])
        parts = [(f"epoch {record['epoch']}/{self.epochs}", 0), (f"loss {record['train_loss']:.4f}", 3)]
        if evaluated:
            self.top1 = f"{record['top1']:.1f} %"
            parts += [(f"{split} loss {record['loss']:.4f}", 4), (f"{split} top1 {record['top1']:.2f} %", 1)]
            if record["top5"] is not None:
                parts += [(f"top5 {record['top5']:.2f} %", 5)]
        parts += [(f"lr {record['lr']:.1e}", 7), (f"{record['images_per_second']:.0f} img/s", 6)]
        parts += [(f"eta {self._remaining(record['step'])}", 2)]
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
