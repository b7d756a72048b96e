"""Jobs timed in turns, so that a machine that gets slower meanwhile slows all of them; and what it is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping

import torch

from vimtune.machine import processor_name


def take_turns(
    jobs: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """The times of jobs in milliseconds, one for each of so many rounds.

    Args:
        jobs: what is timed, by name.
        device: where they compute; a GPU is waited for.
        rounds: how often each is timed.
        warmup: rounds before those.
        clock: what tells the time in seconds. By default it is that of the wall for a GPU, and on a CPU the
            time of this process, which the load of others lengthens less.
    """
    on_gpu = device.type == "cuda"
    clock = clock or (time.perf_counter if on_gpu else time.process_time)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        for name, job in jobs.items():
            start = clock()
            job()
            if on_gpu:
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(1000 * (clock() - start))
    return times


def describe_machine(device: torch.device) -> str:
    """The machine that computes, how busy it is, and what it computes with."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor_name()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
