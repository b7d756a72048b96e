"""CUDA C++ compiled at run time with NVRTC, which CUDA builds of torch bring along: no nvcc, no build step.

Only the few functions of NVRTC and of the driver that this takes are bound, by ctypes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vimtune.ops.operation import constant_for_compiler

SOURCES = Path(__file__).parent
"""The folder of the CUDA sources."""
PRELUDE = ("intrinsics.cuh", "common.cuh")
"""Files that stand in front of every source."""

Argument: TypeAlias = Tensor | int | float
"""What a kernel takes."""
CValue: TypeAlias = ctypes.c_void_p | ctypes.c_int | ctypes.c_float
"""The same as C has it."""

_MAX_SHARED = 8
"""CUDA's number of the attribute CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_USUAL_SHARED = 48 * 1024
"""Bytes of shared memory that a kernel gets without asking."""


class CompileError(RuntimeError):
    """NVRTC is missing, or does not compile for this device; the message says why."""


@constant_for_compiler
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; where there is no GPU, those of an A100."""
    return 160 * 1024 if device.type != "cuda" else _shared_memory_of_gpu(device)


@cache
def _shared_memory_of_gpu(device: torch.device) -> int:
    """Bytes of shared memory that a block may have, remembered because it is asked at every call."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack this field.
    return int(properties.shared_memory_per_block_optin)


def num_multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


class Kernel:
    """A compiled kernel on one device."""

    def __init__(self, module: ctypes.c_void_p, name: str) -> None:
        """Find the kernel `name` in a loaded module."""
        self._function = ctypes.c_void_p()
        self._shared = _USUAL_SHARED
        _call("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())

    def __call__(
        self, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        """Launch on torch's current stream, with `shared` bytes of shared memory beside the static ones.

        Tensors become pointers, ints and floats those of C.
        """
        if shared > self._shared:
            _call("cuFuncSetAttribute", self._function, _MAX_SHARED, shared)
            self._shared = shared
        values = packed(arguments)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (threads, 1, 1)
        _call("cuLaunchKernel", self._function, *grid, *block, shared, stream, pointers(values), None)


def packed(arguments: Sequence[Argument]) -> list[CValue]:
    """Arguments as C values."""
    return [_packed(value) for value in arguments]


def _packed(value: Argument) -> CValue:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


def pointers(values: Sequence[CValue]) -> ctypes.Array[ctypes.c_void_p]:
    """The array of addresses that a launch wants."""
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))


@cache
def load_kernel(source: str, name: str, constants: tuple[tuple[str, int], ...], device_index: int) -> Kernel:
    """Compile `source` of this folder with `constants` defined, and return its kernel `name`.

    Raises:
        CompileError: NVRTC is missing or refuses.
    """
    return Kernel(_load_module(source, constants, device_index), name)


@cache
def _load_module(source: str, constants: tuple[tuple[str, int], ...], device_index: int) -> ctypes.c_void_p:
    """Compile a source for a device and load it there, as a module of the driver."""
    major, minor = torch.cuda.get_device_capability(device_index)
    image = compile_source(source, constants, f"sm_{major}{minor}")
    module = ctypes.c_void_p()
    with torch.cuda.device(device_index):
        _call("cuModuleLoadData", ctypes.byref(module), image)
    return module


def compile_source(source: str, constants: Sequence[tuple[str, int]], architecture: str) -> bytes:
    """Machine code for `architecture` ("sm_90"). Needs no GPU.

    Raises:
        CompileError: NVRTC is missing or refuses.
    """
    nvrtc = _nvrtc()
    text = "\n".join((SOURCES / name).read_text(encoding="utf-8") for name in (*PRELUDE, source))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", f"--include-path={SOURCES}"]
    options += [f"-D{k}={v}" for k, v in constants]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), source.encode(), 0, None, None)
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), flags) != 0:
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().rstrip("\0")
            lines = [line for line in log.splitlines() if "error" in line] or [log.strip() or "no message"]
            raise CompileError(f"NVRTC does not compile {source} for {architecture}: {lines[0]}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(get_size: Callable[..., Any], get: Callable[..., Any], program: ctypes.c_void_p) -> bytes:
    """What NVRTC has of a program: machine code or messages, by its two functions for size and content."""
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


@cache
def _nvrtc() -> ctypes.CDLL:
    """The library NVRTC.

    Raises:
        CompileError: it cannot be loaded.
    """
    failures = []
    for candidate in _nvrtc_candidates():
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            failures.append(f"{candidate}: {error}")
    raise CompileError(f"NVRTC cannot be loaded ({'; '.join(failures)})")


def _nvrtc_candidates() -> Iterator[str]:
    """NVRTC of the CUDA version that torch was built for: from pip's packages, beside torch, or installed."""
    major = (torch.version.cuda or "").partition(".")[0]
    beside_torch = Path(torch.__file__).parent / "lib"
    if os.name == "nt":
        yield from (str(path) for path in sorted(beside_torch.glob(f"nvrtc64_{major}*.dll")))
        yield f"nvrtc64_{major}0_0.dll"
        return
    name = f"libnvrtc.so.{major}"
    for folder in sys.path:
        yield from (str(path) for path in sorted(Path(folder).glob(f"nvidia/*/lib/{name}")))
    yield from (str(path) for path in sorted(beside_torch.glob(f"libnvrtc*.so.{major}")))
    yield name


@cache
def _driver() -> ctypes.CDLL:
    """The CUDA driver.

    Raises:
        CompileError: it cannot be loaded.
    """
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise CompileError(f"the CUDA driver cannot be loaded: {error}") from error


def _call(function: str, *arguments: Any) -> None:
    """Call the driver, in the context of torch's current device.

    torch gives a thread this context when it first calls CUDA there, which on autograd's threads may be later
    than our call.
    """
    driver, context = _driver(), ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device()))
        _check(driver.cuCtxSetCurrent(context))
    _check(getattr(driver, function)(*arguments))


def _check(status: int) -> None:
    """Raise RuntimeError with the driver's message for a status that is not success."""
    if status != 0:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"CUDA driver error {status}: {(message.value or b'unknown').decode()}")
