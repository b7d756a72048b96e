"""Fixtures of the kernel tests."""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from vimtune.ops.cpu.build import BuildError, find_compiler
from vimtune.ops.nvrtc import runtime
from vimtune.ops.nvrtc.backend import NvrtcBackend

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests for which CUDA kernels are compiled: they are run by themselves."""
    for item in items:
        if {"emulated_kernels", "nvrtc"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kernels)


class EmulatedKernel:
    """Stands in for `runtime.Kernel`: the same source, compiled for the CPU with cuda_on_cpu.h."""

    backwards = False
    """Whether threads and blocks take their turns from the last to the first."""

    def __init__(self, threads: ctypes.CDLL, library: ctypes.CDLL, name: str) -> None:
        self.function = getattr(library, f"emulate_{name}")
        self.threads = threads

    def __call__(self, grid, threads, arguments, shared=0) -> None:
        assert shared <= runtime.shared_memory(torch.device("cpu"))
        self.threads.emulate_next(int(self.backwards), shared)
        values = runtime.packed(arguments)
        self.function(*grid, threads, runtime.pointers(values))
        assert self.threads.emulate_kept_within(), f"more than the {shared} bytes of shared memory asked for"


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory):
    """A replacement of `runtime.load_kernel` that needs a C++ compiler instead of a GPU."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(f"the emulator needs a C++ compiler: {error}")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    # Hidden symbols, because otherwise units that are loaded later would use the static variables of inline
    # functions of earlier ones, whose sizes are others.
    flags = [*compiler, "-std=c++17", "-fPIC", "-fvisibility=hidden"]
    threads = folder / "cuda_on_cpu.so"
    _compile([*flags, "-O2", "-shared", str(HERE / "cuda_on_cpu.cpp"), "-o", str(threads)])
    # Some 250 units are compiled, each for one test or a few: optimising them takes longer than they run, and
    # reading the standard library is half of the rest. So its headers are compiled once, into a .gch.
    flags.append("-O0")
    headers = folder / "standard.h"
    headers.write_text("".join(re.findall(r"^#include <.*>\n", (HERE / "cuda_on_cpu.h").read_text(), re.M)))
    _compile([*flags, "-x", "c++-header", str(headers), "-o", f"{headers}.gch"])
    # Of the libraries of C++ they need none, which the linker would search through.
    libraries = [str(threads), "-nodefaultlibs", "-lm", "-lc", "-lgcc"]

    @cache
    def library(source: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
        stem = "-".join([source, *(f"{name}{value}" for name, value in constants)])
        unit = folder / f"{stem}.cpp"
        kernels = re.findall(r"__launch_bounds__\(.*?\) (\w+)\(", (runtime.SOURCES / source).read_text())
        if not dict(constants).get("SEGMENTED", 1):
            kernels = [name for name in kernels if not name.startswith("scan_ends")]
        exports = "".join(f"EXPORT({name})\n" for name in kernels)
        included = (HERE / "cuda_on_cpu.h", runtime.SOURCES / "common.cuh", runtime.SOURCES / source)
        # Constants are no flags -D, because a compiled header serves only where the same are given.
        defines = "".join(f"#define {name} {value}\n" for name, value in constants)
        includes = "".join(f'#include "{path}"\n' for path in included)
        unit.write_text(f'#include "{headers.name}"\n{defines}{includes}{exports}')
        target = unit.with_suffix(".so")
        _compile([*flags, "-shared", str(unit), *libraries, "-o", str(target)])
        return ctypes.CDLL(str(target))

    emulator = ctypes.CDLL(str(threads))
    return lambda source, name, constants, device: EmulatedKernel(emulator, library(source, constants), name)


@pytest.fixture
def on_cpu(emulated_kernels, backends, monkeypatch):
    """Run the kernels of backend `nvrtc` on CPU tensors; the few of Triton need its interpreter."""
    monkeypatch.setattr(NvrtcBackend, "refusals", lambda self, device: [])
    monkeypatch.setattr(runtime, "load_kernel", emulated_kernels)


@pytest.fixture
def in_both_orders(on_cpu, monkeypatch):
    """Results of a function with the emulator's threads taking turns forwards and backwards."""

    def call(function):
        results = []
        for backwards in (False, True):
            monkeypatch.setattr(EmulatedKernel, "backwards", backwards)
            results.append(function())
        return results

    return call


@pytest.fixture
def nvrtc():
    """Skips where there is none."""
    try:
        runtime._nvrtc()
    except runtime.CompileError as error:
        pytest.skip(str(error))


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=pytest.mark.kernels),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def device(request):
    """Where the kernels of backend `nvrtc` run in a test: in the emulator or on a GPU."""
    if request.param == "gpu":
        return "cuda"
    request.getfixturevalue("on_cpu")
    return "cpu"
