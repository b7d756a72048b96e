"""Runs in processes beside the comparison: a few at a time on each device, stopped and continued.

To start takes longer than to train a small data set on a GPU: libraries are imported and kernels compiled.
So a process that has made a run takes the next one. A run that fails or is killed ends its process and takes
no other run with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from vimtune.compare.plan import Cell
from vimtune.compare.worker import LOG_FILE
from vimtune.machine import CORES, usable_cores
from vimtune.plugins import imported_packages
from vimtune.text import printable, shorten

POLL_SECONDS = 0.05
"""How often is asked whether runs have ended."""
WORKER = (sys.executable, "-m", "vimtune.compare.worker")
"""The command that starts a worker; the packages that it imports follow."""


def _apart() -> dict[str, Any]:
    """Arguments of `Popen` for a process that Ctrl-C does not reach: that is for the comparison, which stops
    its runs itself."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


class Worker:
    """A process that makes one run after the other; see `vimtune.compare.worker`."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        """Start it.

        Args:
            environment: its environment variables.
            log: gets what it prints before it makes a run.
        """
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [*WORKER, *imported_packages()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                **_apart(),
            )
        self._codes: SimpleQueue[int] = SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def order(self, folder: Path) -> None:
        """Have it make the run in a folder."""
        assert self._process.stdin is not None, "it is a pipe"
        with suppress(OSError):  # It may have ended, which `code` will say.
            self._process.stdin.write(f"{json.dumps(str(folder))}\n".encode())
            self._process.stdin.flush()

    def code(self) -> int | None:
        """The exit code of its run; None as long as that goes on. Without its process no run goes on."""
        ended = self._process.poll()
        if ended is not None:
            self._listener.join(1.0)  # What it has said before may still be on its way.
        try:
            return self._codes.get_nowait()
        except Empty:
            return ended

    @property
    def is_alive(self) -> bool:
        """Whether it can take a run."""
        return self._process.poll() is None

    def dismiss(self) -> None:
        """Have it end; a run saves its state first."""
        assert self._process.stdin is not None, "it is a pipe"
        with suppress(OSError):  # It may have ended without reading what it was told.
            self._process.stdin.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.wait()

    def _listen(self) -> None:
        """Note the exit codes of its runs, until it has ended."""
        assert self._process.stdout is not None, "it is a pipe"
        for line in self._process.stdout:
            self._codes.put(int(line))


@dataclass
class StartedRun:
    """A run that has been started."""

    cell: Cell
    folder: Path
    """The folder of the run."""
    slot: Slot
    """Where it is made."""
    log_start: int
    """Where in the log this session of the run begins."""
    started: float = field(default_factory=time.monotonic)
    """When it began."""
    code: int | None = None
    """Its exit code; None as long as it goes on."""

    def failure(self) -> str:
        """Why it failed: the last line of what it has printed, where that is an error."""
        said_now = (self.folder / LOG_FILE).read_bytes()[self.log_start :]
        lines = said_now.decode("utf-8", "replace").splitlines()
        said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        reason = f"it ended with code {self.code}" if said is None else said.removeprefix("error: ")
        return printable(shorten(reason, 300))


@dataclass
class Slot:
    """Room for one run at a time."""

    device: str | None
    """The device of its runs, if devices were named."""
    worker: Worker | None = None
    """The process that has made its last run and can take another."""


class Processes:
    """The runs that are being made."""

    def __init__(self, jobs: int, devices: Sequence[str] | None) -> None:
        """No run yet.

        Args:
            jobs: how many at a time on each device.
            devices: those that share the runs; None for the one that their recipes name.
        """
        named: Sequence[str | None] = devices or [None]
        self._free = [Slot(device) for _ in range(jobs) for device in named]
        self._all_slots = len(self._free)
        self.running: list[StartedRun] = []

    @property
    def has_room(self) -> bool:
        """Whether another run can be started."""
        return bool(self._free)

    def start(self, cell: Cell, folder: Path) -> None:
        """Start or continue the run in a folder that has its recipe."""
        slot, log = self._free.pop(0), folder / LOG_FILE
        log_start = log.stat().st_size if log.exists() else 0
        if slot.worker is None or not slot.worker.is_alive:
            slot.worker = Worker(self._environment(slot.device), log)
        slot.worker.order(folder)
        self.running.append(StartedRun(cell, folder, slot, log_start))

    def ended(self) -> Iterator[StartedRun]:
        """Those of the runs that have ended by now."""
        for run in list(self.running):
            worker = run.slot.worker
            assert worker is not None, "it makes the run"
            run.code = worker.code()
            if run.code is None:
                continue
            self.running.remove(run)
            if run.code == 0:
                # A process that is there comes before those yet to be started.
                self._free.insert(0, run.slot)
            else:
                worker.dismiss()
                self._free.append(Slot(run.slot.device))
            yield run

    def ask_to_stop(self) -> None:
        """Have every run save its state and end, and every process with it."""
        for worker in self._workers():
            worker.dismiss()

    def kill(self) -> None:
        """End every process at once; what its run has saved before stays."""
        workers = self._workers()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()
            worker.dismiss()
        self.running.clear()

    def _workers(self) -> list[Worker]:
        slots = [*self._free, *(run.slot for run in self.running)]
        return [slot.worker for slot in slots if slot.worker is not None]

    def _environment(self, device: str | None) -> Mapping[str, str]:
        """The environment of a process: it sees its GPU alone, and takes its share of the processor."""
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
