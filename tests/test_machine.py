"""Cores and memory of this process, on file systems that look like Linux's in and outside of containers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vimtune import machine


@pytest.fixture
def system(tmp_path, monkeypatch):
    """`system(cores, files, own)`: a machine of 8 GB free memory whose groups have these files."""

    def build(cores: int = 16, files: dict[str, str] | None = None, own: str = "0::/\n") -> None:
        monkeypatch.delenv(machine.CORES, raising=False)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        for name, text in {"own": own, "meminfo": "MemAvailable:  8000000 kB\n", **(files or {})}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
        monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
        monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")

    return build


@pytest.mark.parametrize(
    ("cores", "files", "own", "usable"),
    [
        (16, {}, "0::/", 16),
        (16, {"cpu.max": "max 100000"}, "0::/", 16),
        (16, {"cpu.max": "250000 100000"}, "0::/", 2),
        (16, {"cpu.max": "50000 100000"}, "0::/", 1),
        (3, {"cpu.max": "800000 100000"}, "0::/", 3),
        (16, {"slice/cpu.max": "600000 100000", "slice/job/cpu.max": "max 100000"}, "0::/slice/job", 6),
        (16, {"slice/cpu.max": "600000 100000"}, "0::/elsewhere", 16),
        (16, {"cpu/job/cpu.cfs_quota_us": "350000", "cpu/job/cpu.cfs_period_us": "100000"}, "4:cpu:/job", 3),
        (16, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", 16),
        (16, {"cpu.max": "nonsense"}, "nonsense", 16),
    ],
)
def test_cores_are_those_that_the_process_and_its_groups_may_use(system, cores, files, own, usable):
    system(cores, files, own + "\n")
    assert machine.usable_cores() == usable


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_idle_threads_sleep_soon_unless_the_user_says_otherwise(monkeypatch, given, expected):
    monkeypatch.setattr(machine.os, "environ", dict(given))
    monkeypatch.setattr(machine.sys, "modules", {"torch": None})
    machine.spin_briefly()  # torch has been imported, and it would have no effect.
    assert machine.os.environ == given
    monkeypatch.setattr(machine.sys, "modules", {})
    machine.spin_briefly()
    assert machine.os.environ.get("GOMP_SPINCOUNT") == expected


def test_commands_have_idle_threads_sleep_soon_before_torch_is_imported():
    program = "import os, vimtune.cli; vimtune.cli.main(['--version']); print(os.environ['GOMP_SPINCOUNT'])"
    given = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=given, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split()[-1] == "1000"


@pytest.mark.parametrize(("given", "usable"), [("5", 5), ("64", 16), ("0", 1), ("many", 16), ("", 16)])
def test_who_starts_several_processes_shares_the_cores_out(system, monkeypatch, given, usable):
    system()
    monkeypatch.setenv(machine.CORES, given)
    assert machine.usable_cores() == usable


@pytest.mark.parametrize(
    ("files", "own", "free"),
    [
        ({}, "0::/", 8_192_000_000),
        ({"memory.max": "max", "memory.current": "5"}, "0::/", 8_192_000_000),
        (
            {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 1\ninactive_file 300"},
            "0::/",
            400,
        ),
        ({"memory.max": "1000", "memory.current": "1200"}, "0::/", 0),
        ({"memory/a/memory.limit_in_bytes": "90", "memory/a/memory.usage_in_bytes": "20"}, "4:memory:/a", 70),
    ],
)
def test_memory_is_what_machine_and_groups_leave(system, files, own, free):
    system(files=files, own=own + "\n")
    assert machine.free_memory() == free


def test_a_system_without_these_files_is_as_large_as_it_says(system, tmp_path, monkeypatch):
    system()
    for place in ("_OWN_CGROUP", "_MEMORY", "_SHARED_MEMORY"):
        monkeypatch.setattr(machine, place, tmp_path / "missing")
    assert machine.usable_cores() == 16
    assert machine.free_shared_memory() == sys.maxsize
    assert machine.free_memory() > 2**20
