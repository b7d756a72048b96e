"""A run of a comparison in a process of its own: `python -m vimtune.compare.worker FOLDER [PACKAGE ...]`.

It continues the run folder as `vimtune train --resume FOLDER` does, and does so from the beginning where
there is only the recipe. Packages are those that `--import` names. It watches its standard input, which the
comparison holds open: when that ends, because the comparison is stopped or was killed, the run saves its
state and ends as after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

from vimtune import cli


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    folder, *packages = arguments
    threading.Thread(target=_stop_with_parent, args=(sys.stdin.fileno(),), daemon=True).start()
    imports = [part for package in packages for part in ("--import", package)]
    return cli.main(["train", "--resume", folder, *imports])


def _stop_with_parent(descriptor: int) -> None:
    """Wait until nobody holds the other end of a pipe, then ask this process to stop."""
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
