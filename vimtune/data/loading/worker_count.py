"""How many processes prepare the images of a loader where the user does not say it.

The number changes how long a run takes and nothing of what comes of it. A GPU waits for whoever prepares its
images, so all cores but that of the main process do so, as far as there is work and memory for them. A model
on the CPU computes on all cores itself, and processes beside it take from it what they give: it gets some
where there are many cores, because it has parts that only one core computes.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from vimtune.data.errors import CorruptImageError, ImageReadError
from vimtune.data.loading.samples import Key, Samples
from vimtune.machine import free_memory, free_shared_memory, usable_cores
from vimtune.text import counted

MOST = 16
"""Processes of a loader, at most: more of them wait for memory and disk."""
CORES_OF_A_HELPER = 4
"""So many cores of a model on the CPU go with one process that prepares images."""
WORTH_A_START = 0.2
"""Seconds of work in an epoch below which starting processes takes longer than it saves."""
PROBES = 4
"""Images that are prepared to see how long one takes."""
WAITING = 3
"""Batches of each process that may wait in memory: the two that DataLoader orders, and one in the making."""
MEMORY_SHARE = 0.25
"""Share of the free memory that the waiting batches of one loader may take."""


class WorkerCount(NamedTuple):
    """A number of processes, and in a few words why it is that one."""

    number: int
    reason: str

    def __str__(self) -> str:
        """The number in words, such as "this process alone (2 cores)"."""
        who = counted(self.number, "processes") if self.number else "this process alone"
        return f"{who} ({self.reason})"


AS_ASKED = "as asked for"
"""The reason for a number that a user gave."""
HERE = WorkerCount(0, AS_ASKED)
"""No process besides the one that trains."""


def choose_num_workers(
    samples: Samples,
    *,
    batch_size: int,
    world_size: int,
    local_size: int,
    on_gpu: bool,
    cached: bool,
) -> WorkerCount:
    """Choose for one loader of one process of a run.

    Args:
        samples: what the processes are to make.
        batch_size: images of a batch, over all processes of the run together.
        world_size: processes of the run.
        local_size: those of them on this machine, which share its cores and its memory.
        on_gpu: whether the model computes elsewhere than on the cores.
        cached: whether images are decoded before the epochs begin.
    """
    cores = usable_cores() // local_size
    most = min(MOST, cores - 1 if on_gpu else cores // CORES_OF_A_HELPER)
    shown = f"{counted(cores, 'cores')}{' a process' if local_size > 1 else ''}"
    if most < 1:
        return WorkerCount(0, shown)
    dataset = samples.dataset
    seconds = _seconds_per_image(samples, cached)
    shown = f"{shown}, {1000 * seconds:.1f} ms an image"
    if seconds * len(dataset) / world_size < WORTH_A_START:
        return WorkerCount(0, f"{shown}, {counted(len(dataset), 'images')}")
    height, width = samples.img_size
    waiting = WAITING * -(-batch_size // world_size) * 3 * height * width
    room = int(MEMORY_SHARE * min(free_memory(), free_shared_memory()) / local_size / waiting)
    limits = {
        shown: most,
        f"{shown}, batches of an epoch": -(-len(dataset) // batch_size),
        f"{shown}, memory for batches": room,
    }
    reason = min(limits, key=limits.__getitem__)
    return WorkerCount(limits[reason], reason)


def _seconds_per_image(samples: Samples, cached: bool) -> float:
    """How long decoding, unless images are `cached`, and preparing take: the median of a few images from all
    over the data.

    What cannot be read is reported when its turn comes.
    """
    times = []
    for probe in range(PROBES + 1):
        place = probe * (len(samples.dataset) - 1) // PROBES
        start = time.perf_counter()
        try:
            image = samples.dataset.load(place)
            start = time.perf_counter() if cached else start
            samples.prepare([image], [Key(0, place)])
        except (CorruptImageError, ImageReadError):
            continue
        times.append(time.perf_counter() - start)
    warm = sorted(times[1:] or times)  # libraries are loaded with the first one
    return warm[len(warm) // 2] if warm else 0.0
