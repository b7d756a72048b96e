"""A process that makes runs of a comparison, one after the other.

    python -m vimtune.compare.worker [PACKAGE ...]

Each line of its standard input is a run folder, as a JSON string. The run is continued as `vimtune train
--resume FOLDER` does, from the beginning where there is only the recipe, and what it prints is appended to
`LOG_FILE` there. Then a line with the exit code goes to standard output. So the next run finds the imports,
the context of the GPU, the compiled kernels and the decoded images that runs before it have needed, while
everything that decides its result is its own. After a run that has failed the process ends, since memory that
ran out or an error of the GPU may stay behind. Packages are those that `--import` names.

When standard input ends, because the comparison is stopped or was killed, a run saves its state and ends as
after Ctrl-C.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from vimtune import cli
from vimtune.machine import free_memory

KEPT_BYTES = 2**30
"""Decoded images that a process keeps for its next runs, where they go to a device as they are."""
KEPT_SHARE = 0.01
"""Share of the free memory that they may take, of which other processes of a comparison want as much."""
LOG_FILE = "log.txt"
"""Name of the file in a run folder that has what the run has printed."""


def main(packages: Sequence[str]) -> int:
    """Make the runs that are asked for; returns the exit code, that of a run that failed."""
    answers = os.dup(1)
    os.dup2(2, 1)  # Nothing else goes there.
    orders = _Orders()
    threading.Thread(target=orders.read, args=(sys.stdin.fileno(),), daemon=True).start()
    imports = [part for package in packages for part in ("--import", package)]
    from vimtune.data.resident.store import keep_decoded  # Late, since the comparison reads this module, too.

    keep_decoded(min(KEPT_BYTES, int(KEPT_SHARE * free_memory())))
    while (folder := orders.next()) is not None:
        with _printing_into(Path(folder) / LOG_FILE):
            code = cli.main(["train", "--resume", folder, *imports])
        orders.running = False
        os.write(answers, f"{code}\n".encode())
        if code != 0:
            return code
        _forget()
    return 0


class _Orders:
    """The runs that are asked for, as a thread reads them from a pipe."""

    def __init__(self) -> None:
        self.running = False
        """Whether a run is being made."""
        self._folders: SimpleQueue[str | None] = SimpleQueue()

    def next(self) -> str | None:
        """Wait for the next run; its folder, or None if there is none to come."""
        folder = self._folders.get()
        self.running = folder is not None
        return folder

    def read(self, descriptor: int) -> None:
        """Note what comes through a pipe, and when nobody holds its other end, ask a run to stop."""
        with open(descriptor, encoding="utf-8", closefd=False) as lines:
            for line in lines:
                self._folders.put(json.loads(line))
        self._folders.put(None)
        if self.running:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _printing_into(path: Path) -> Iterator[None]:
    """Append what this process prints to a file, also what others than Python print."""
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    yield
    sys.stdout.flush()
    sys.stderr.flush()


def _forget() -> None:
    """Give back what a run has left: its memory, and what `--compile` has made of its model, of which torch
    keeps only a few versions."""
    import torch

    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
