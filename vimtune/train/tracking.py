"""What a run shows and records while it goes: metrics.jsonl, TensorBoard, and the console."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from vimtune.train.folder import RunFolder, writing


def build_console(is_main: bool = True) -> Console:
    """Console on stdout; silent in all but the main process, and wide enough for tables in log files."""
    console = Console(quiet=not is_main, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 110
    return console


def duration(seconds: float) -> str:
    """`95` -> `1:35`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class MetricsLog:
    """metrics.jsonl: one JSON object per line, appended whole or not at all.

    `keep_bytes` is the length at the checkpoint that the run continues from; what was written after
    it is dropped, because the run is about to write the same lines again.
    """

    def __init__(self, folder: RunFolder, keep_bytes: int = 0) -> None:
        self.path = folder.metrics
        with writing(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
            self._file.truncate(min(keep_bytes, self._file.tell()))

    def write(self, record: Mapping[str, Any]) -> None:
        line = memoryview((json.dumps(record) + "\n").encode())
        length = os.fstat(self._file.fileno()).st_size
        with writing(self.path):
            try:
                while line:  # a full disk may take a part before it refuses the rest
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(length)
                raise

    def sync(self) -> int:
        """Have everything on disk and return the length in bytes."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


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
        self.metrics: MetricsLog | None = None
        self.board: SummaryWriter | None = None
        self.bar: Progress | None = None
        if not is_main:
            return
        self.metrics = MetricsLog(folder, keep_bytes)
        with writing(folder.tensorboard):
            # Events after the checkpoint are hidden, all of them where there is none: the run is about to
            # write them again.
            self.board = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                TextColumn("{task.completed}/{task.total}  {task.fields[status]}"),
                console=console,
            )
            self.task = self.bar.add_task("", total=total_steps, completed=first_step, status="")

    def message(self, text: str) -> None:
        """Print a line; above the progress bar if there is one."""
        self.console.print(text, soft_wrap=True)

    def show_step(self, epoch: int, step: int, loss: float, lr: float, images_per_second: float) -> None:
        """Move the progress bar to `step` optimizer steps done."""
        if self.bar is not None:
            self.bar.start()  # only now, below what is said before the first step
            status = (
                f"loss {loss:.3f}  lr {lr:.1e}  top1 {self.top1}  "
                f"{images_per_second:.0f} img/s  eta {self._remaining(step)}"
            )
            self.bar.update(
                self.task, completed=step, status=status, description=f"epoch {epoch + 1}/{self.epochs}"
            )

    def record_step(self, record: Mapping[str, Any]) -> None:
        """Write one `step` record."""
        self._write("step", record)

    def record_epoch(self, record: Mapping[str, Any], split: str) -> None:
        """Write one `epoch` record and print its line."""
        self._write("epoch", record)
        parts = [f"epoch {record['epoch']}/{self.epochs}", f"loss {record['train_loss']:.4f}"]
        if "top1" in record:
            self.top1 = f"{record['top1']:.1f} %"
            parts += [
                f"{split} loss {record['loss']:.4f}",
                f"top1 {record['top1']:.2f} %",
                f"top5 {record['top5']:.2f} %",
            ]
        parts += [f"lr {record['lr']:.1e}", f"{record['images_per_second']:.0f} img/s"]
        parts += [f"eta {self._remaining(record['step'])}"]
        self.message("  ".join(parts))

    def sync(self) -> int:
        """Put everything on disk; the length of metrics.jsonl, 0 where nothing is written."""
        if self.metrics is None or self.board is None:
            return 0
        self.board.flush()
        return self.metrics.sync()

    def close(self) -> None:
        """End the progress bar and close the files."""
        if self.bar is not None:
            self.bar.stop()
        if self.board is not None:
            self.board.close()
        if self.metrics is not None:
            self.metrics.close()

    def _write(self, kind: str, record: Mapping[str, Any]) -> None:
        if self.metrics is None or self.board is None:
            return
        self.metrics.write({"kind": kind, **record})
        with writing(self.board.log_dir):
            for name, value in record.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(f"{kind}/{name}", value, record["step"])

    def _remaining(self, step: int) -> str:
        done = step - self.first_step
        if done <= 0:
            return "-"
        return duration((time.monotonic() - self.started) / done * (self.total_steps - step))
