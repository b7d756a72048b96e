"""Runs as processes of their own: a few at a time on each device, stopped and continued without loss.

Each run has a process, so that its memory is measured from zero, and that one that fails or is killed takes
no other with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vimtune.compare.plan import Cell
from vimtune.machine import CORES, usable_cores
from vimtune.text import printable, shorten

LOG_FILE = "log.txt"
"""Name of the file in a run folder that has what the run has printed."""

POLL_SECONDS = 0.05
"""How often the processes are asked whether they have ended."""


@dataclass
class Process:
    """A run that has been started."""

    cell: Cell
    folder: Path
    """The folder of the run."""
    device: str | None
    """The device that it occupies, if devices were named."""
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_start: int
    """Where in the log this session of the run begins."""
    started: float = field(default_factory=time.monotonic)
    """When it began."""

    def failure(self) -> str:
        """Why it failed: the last line of what it has printed, where that is an error."""
        said_now = (self.folder / LOG_FILE).read_bytes()[self.log_start :]
        lines = said_now.decode("utf-8", "replace").splitlines()
        said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        reason = (
            f"it ended with code {self.process.returncode}" if said is None else said.removeprefix("error: ")
        )
        return printable(shorten(reason, 300))


class Processes:
    """The runs that are being made."""

    def __init__(self, jobs: int, devices: Sequence[str] | None, packages: Sequence[str]) -> None:
        """No run yet.

        Args:
            jobs: how many at a time on each device.
            devices: those that share the runs; None for the one that their recipes name.
            packages: what each run imports before anything else.
        """
        named: Sequence[str | None] = devices or [None]
        self._slots = [*named] * jobs
        self._all_slots, self._packages = len(self._slots), packages
        self.running: list[Process] = []

    @property
    def has_room(self) -> bool:
        """Whether another run can be started."""
        return bool(self._slots)

    def start(self, cell: Cell, folder: Path) -> None:
        """Start or continue the run in a folder that has its recipe."""
        device = self._slots.pop(0)
        log = open(folder / LOG_FILE, "ab")  # noqa: SIM115 - it is closed when the run has ended
        process = subprocess.Popen(
            [sys.executable, "-m", "vimtune.compare.worker", str(folder), *self._packages],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment(device),
            start_new_session=True,  # Ctrl-C is for the comparison, which stops its runs itself.
        )
        self.running.append(Process(cell, folder, device, process, log, log.tell()))

    def ended(self) -> Iterator[Process]:
        """Those of the runs that have ended by now."""
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.running.remove(run)
            self._slots.append(run.device)
            run.log.close()
            if run.process.stdin is not None:
                run.process.stdin.close()
            yield run

    def ask_to_stop(self) -> None:
        """Have every run save its state and end."""
        for run in self.running:
            if run.process.stdin is not None:
                run.process.stdin.close()

    def kill(self) -> None:
        """End every run at once; what it has saved before stays."""
        for run in self.running:
            run.process.kill()
        for run in self.running:
            run.process.wait()
        list(self.ended())

    def _environment(self, device: str | None) -> Mapping[str, str]:
        """The environment of a run: it sees its GPU alone, and takes its share of the processor."""
        environment = dict(os.environ)
        kind, _, index = (device or "").partition(":")
        if kind == "cuda" and index:
            visible = environment.get("CUDA_VISIBLE_DEVICES", "")
            listed = [part for part in visible.split(",") if part]
            environment["CUDA_VISIBLE_DEVICES"] = listed[int(index)] if int(index) < len(listed) else index
        if self._all_slots > 1:
            share = max(1, usable_cores() // self._all_slots)
            environment[CORES] = str(share)
            environment.setdefault("OMP_NUM_THREADS", str(share))
            environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        return environment
