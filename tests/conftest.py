"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from quick_runs import NO_PICTURES, painting_once, replace_until_undone

from vimtune import plugins

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything imports torch: workers whose threads wait for each other's cores are slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
SLOW_TIMEOUT = 1800
"""Seconds for a test that is marked as slow; the usual limit is for those that take seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests a limit that holds where the machine has other work, too, unless they have one."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector away from what is imported and collected: a million objects.

    All of them stay to the end. While they are made, looking through them again and again takes a tenth of
    the time. Afterwards each full collection would visit them once more, three quarters of what collections
    cost the tests; `gc.freeze` takes them out. And a collection for every 700 new objects, Python's default,
    comes too often where models are traced and compiled.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(5000, *gc.get_threshold()[1:])
        gc.enable()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real data and weights beside the project (VIMTUNE_SHARED, or ../shared)."""
    folder = Path(os.environ.get("VIMTUNE_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set VIMTUNE_SHARED to a folder that has it)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def files_may_stay_in_memory() -> Iterator[None]:
    """No file is flushed to the disk, which every run of a test would wait for several times.

    Other processes see a file without it, also after the one that wrote it was killed; what a power failure
    leaves behind no test can find out.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def no_package_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of other tests were commands of other processes, as far as `--import` goes."""
    monkeypatch.setattr(plugins, "_imported", [])


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what runs draw, almost half of the time of a tiny one."""
    replace_until_undone(NO_PICTURES, monkeypatch)


@pytest.fixture(scope="module")
def no_pictures_in_this_file() -> Iterator[None]:
    """The same also for the fixtures that are made once for a file, as a run that several tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        replace_until_undone(NO_PICTURES, patch)
        yield


@pytest.fixture(scope="session")
def each_flower_is_painted_once() -> Iterator[None]:
    """For runs with the same images; it lasts until the last test."""
    with pytest.MonkeyPatch.context() as patch:
        replace_until_undone(painting_once(), patch)
        yield


@pytest.fixture
def backends(monkeypatch):
    """`register_backend` for the duration of a test; what the test changes in backends is asked for anew."""
    from vimtune.ops import dispatch

    monkeypatch.setattr(dispatch.BACKENDS, "_things", dict(dispatch.BACKENDS._things))
    monkeypatch.setattr(dispatch, "_KERNELS", dict(dispatch._KERNELS))
    dispatch._offers.cache_clear()
    yield dispatch.register_backend
    dispatch._offers.cache_clear()
