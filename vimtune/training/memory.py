"""The most memory that a run has used."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
"""Where Linux says what memory this process has and has had at most."""
_CLEAR = Path("/proc/self/clear_refs")
"""Where Linux lets a process count its peak anew."""
_PEAK = "5"
"""What is written there for that."""


def restart_peak(device: torch.device) -> None:
    """Count the most memory from here on: what runs before this one in the same process have used is no part
    of it. Where the system cannot do so, it counts from the start of the process."""
    if device.type == "cuda":
        if torch.cuda.is_initialized():  # Else nothing has been used, and torch refuses to count it anew.
            torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _CLEAR.write_text(_PEAK, encoding="ascii")


def peak_memory(device: torch.device) -> tuple[float | None, str]:
    """Most memory used since then in MiB, and whose: the GPU's allocations, or this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "GPU allocations"
    if sys.platform == "win32":
        return None, "not measured on Windows"
    with suppress(OSError, StopIteration, ValueError):
        lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**10, "process"
    import resource  # does not exist on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10), "process"
