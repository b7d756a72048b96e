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
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from vimtune.exits import prepare_streams, run_guarded
from vimtune.machine import free_memory
from vimtune.plugins import import_package
from vimtune.recipe import load_recipe

KEPT_BYTES = 2**30
"""Decoded images that a process keeps for its next runs, where they go to a device as they are."""
KEPT_SHARE = 0.01
"""Share of the free memory that they may take, of which other processes of a comparison want as much."""
LOG_FILE = "log.txt"
"""Name of the file in a run folder that has what the run has printed."""


def main(packages: Sequence[str]) -> int:
    """Make the runs that are asked for, until one fails; returns its exit code."""
    answers = os.dup(1)
    os.dup2(2, 1)  # Nothing else goes there.
    folders: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.fileno(), folders), daemon=True).start()
    # This comes late, because the comparison reads this module, too.
    from vimtune.data.loading.resident.store import keep_decoded

    prepare_streams()
    keep_decoded(min(KEPT_BYTES, int(KEPT_SHARE * free_memory())))
    while True:
        folder = folders.get()
        with _printing_into(Path(folder) / LOG_FILE):
            code = run_guarded(partial(_continue, folder, packages), show_traceback=False)
        os.write(answers, f"{code}\n".encode())
        if code != 0:
            return code
        _forget()


def _continue(folder: str, packages: Sequence[str]) -> int:
    """Continue the run in a folder as `vimtune train --resume FOLDER` does; returns the exit code."""
    from vimtune.training import train  # This comes late, so that the log of the run has what fails in it.

    for package in packages:
        import_package(package)
    train(load_recipe(None, {"resume": folder}))
    return 0


def _read(descriptor: int, folders: SimpleQueue[str]) -> None:
    """Note which runs are asked for through a pipe, and when nobody holds its other end, ask this process to
    stop. It then ends at once where no run is there to save its state."""
    with open(descriptor, encoding="utf-8", closefd=False) as lines:
        for line in lines:
            folders.put(json.loads(line))
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGTERM)  # There `os.kill` would end the process before it has saved.
    else:
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
