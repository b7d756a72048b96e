"""The machine: its processor, what is installed, and the cores and memory that this process may use of it."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

CORES = "VIMTUNE_CORES"
"""Environment variable with the cores that a process may use, set by whoever starts several of them."""

_CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of groups of processes."""
_OWN_CGROUP = Path("/proc/self/cgroup")
"""Where it says to which group this process belongs."""
_MEMORY = Path("/proc/meminfo")
"""Where it says how much memory is free."""
_SHARED_MEMORY = Path("/dev/shm")
"""Where the memory lies that processes hand each other."""


def usable_cores() -> int:
    """Cores that this process may use, at least 1: those it may run on, as far as its group may use them."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not on macOS and Windows
        cores = float(os.cpu_count() or 1)
    limits = [limit for folder in _groups() if (limit := _core_limit(folder)) is not None]
    if os.environ.get(CORES, "").isdecimal():
        limits.append(float(os.environ[CORES]))
    return max(1, math.floor(min([cores, *limits])))


def free_memory() -> int:
    """Bytes of memory that are available now; `sys.maxsize` where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        names = getattr(os, "sysconf_names", {})
        if "SC_PAGE_SIZE" in names and "SC_PHYS_PAGES" in names:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        else:
            free = sys.maxsize
    limits = [limit for folder in _groups() if (limit := _memory_left(folder)) is not None]
    return min([free, *limits])


def free_shared_memory() -> int:
    """Bytes that processes may still hand each other; `sys.maxsize` where the system does not say."""
    try:
        state = os.statvfs(_SHARED_MEMORY)
    except (OSError, AttributeError):
        return sys.maxsize
    return state.f_bavail * state.f_frsize


def spin_briefly() -> None:
    """Have idle threads of OpenMP go to sleep soon, unless the user has said how they wait.

    Those of libgomp, which torch brings along on Linux, spin for milliseconds, and on a machine that is busy
    with something else they take the cores from those that have work: a run on two cores beside another
    process was two to four times slower. Threads that sleep at once make a run that is alone a tenth slower.
    The library reads this when torch is imported, so this comes before.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None when it is not there. Imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_requirements(package: str) -> list[str]:
    """Distributions that an installed one requires without any extra and that are not there, as in a thin
    installation (`pip install --no-deps`)."""
    try:
        requirements = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:  # It runs from a copy of its sources.
        return []
    names = (re.match(r"[\w.-]+", each) for each in requirements if "extra" not in each.partition(";")[2])
    return [name[0] for name in names if name is not None and installed_version(name[0]) is None]


def processor_name() -> str:
    """Name of the CPU; its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _groups() -> Iterator[Path]:
    """Folders with the limits of the groups that hold this process, of both versions of cgroups.

    In a container its own group is often the root of what can be seen.
    """
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        roots = [_CGROUPS / name for name in controllers.split(",") if name] or [_CGROUPS]
        for root in roots:
            own = root / path.lstrip("/")
            yield from [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]


def _core_limit(folder: Path) -> float | None:
    """How many cores a group may use; None where it is not limited."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        return int(quota) / int(period)
    return None


def _memory_left(folder: Path) -> int | None:
    """Bytes that a group may still use; None where it is not limited.

    Its pages that only mirror files count as free: the system gives them up when memory is needed.
    """
    limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
    if not limit:
        limit, used = _read(folder / "memory.limit_in_bytes"), _read(folder / "memory.usage_in_bytes")
    if not (limit.isdecimal() and used.isdecimal()):
        return None
    fields = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    mirrored = fields.get("total_inactive_file", fields.get("inactive_file", "0"))
    return max(0, int(limit) - int(used) + (int(mirrored) if mirrored.isdecimal() else 0))


def _read(file: Path) -> str:
    """The text of a small file of the system; "" where there is none."""
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
