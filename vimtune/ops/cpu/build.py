"""Compile the kernels with the machine's own C++ compiler, once, and keep the library in a cache folder.

The library has a plain C interface: it depends neither on torch's headers nor on the Python version,
compiles in seconds and stays valid across updates of both. A file of the cache is named after what
it was made from (sources, compiler, flags, processor) and after its own content, so it is never
half-written, never stale and never taken for good when damaged.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vimtune.utils import atomic_write

SOURCES = ("scan.cpp", "conv.cpp")
HEADERS = ("simd.h", "threads.h")
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    # No -ffast-math: linking with it switches denormals off for the whole process.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
# How compilers spell "this very processor"; the last resort is their default target.
MACHINE_FLAGS: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_SECONDS = 300


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message says why in one line."""


def load_library() -> ctypes.CDLL:
    """Return the compiled kernels, from the cache where possible.

    Raises:
        BuildError: no compiler, a compiler error, or compiling is forbidden and nothing is cached.
    """
    compiler = find_compiler()
    try:
        return _load(compiler)
    except OSError as error:
        raise BuildError(f"the library cannot be built here: {error}") from error


def _load(compiler: list[str]) -> ctypes.CDLL:
    key = _key(compiler)
    folders = list(_cache_folders())
    for folder in folders:
        for path in sorted(folder.glob(f"cpu-{key}-*.so")):
            library = _open_if_intact(path)
            if library is not None:
                return library
    if os.environ.get("VIMTUNE_NO_COMPILE", "0") not in ("", "0"):
        raise BuildError("compiling is switched off (VIMTUNE_NO_COMPILE is set) and no library is cached")
    with tempfile.TemporaryDirectory(prefix="vimtune-build-") as scratch:
        built = Path(scratch) / "cpu.so"
        _compile(compiler, built)
        content = built.read_bytes()

        def write(path: Path) -> None:
            path.write_bytes(content)

        for folder in folders:
            path = folder / f"cpu-{key}-{_digest(content)}.so"
            try:
                atomic_write(path, write)
                return _open(path)
            except (OSError, BuildError):
                continue  # read-only, full, or mounted without execution: the next folder may do
        return _open(built)  # a loaded library outlives its file


def find_compiler() -> list[str]:
    """Return the compiler's command line start: `$CXX` if set, else the first one on the PATH.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX", "").strip()
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        program = shutil.which(command[0])
        if program:
            return [program, *command[1:]]
    if chosen:
        raise BuildError(f"the C++ compiler of the environment variable CXX ({chosen}) was not found")
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}) on the PATH")


def _key(compiler: list[str]) -> str:
    """Everything the machine code depends on."""
    here = Path(__file__).parent
    parts = [(here / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    parts += [*compiler, _run([*compiler, "--version"]).stdout, *FLAGS, _processor()]
    return _digest("\0".join(parts).encode())


def _processor() -> str:
    """Model and instruction sets: a home folder may be shared by unequal machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _cache_folders() -> Iterator[Path]:
    """Folders that may hold the library, best first."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = os.path.expanduser(os.environ.get("VIMTUNE_CACHE") or os.path.join(caches, "vimtune"))
    if not folder.startswith("~"):  # no home folder is known
        yield Path(folder)
    private = _private_temporary_folder()
    if private is not None:
        yield private


def _private_temporary_folder() -> Path | None:
    """A folder beside other users' files: only good when nobody else could have put a library there."""
    if not hasattr(os, "getuid"):
        return None
    try:
        folder = Path(tempfile.gettempdir()) / f"vimtune-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return folder if mine and not status.st_mode & 0o022 else None


def _open_if_intact(path: Path) -> ctypes.CDLL | None:
    """Open a cached library whose content matches its name; remove it otherwise."""
    try:
        # Checked before loading: opening a truncated library can end the process.
        if _digest(path.read_bytes()) == path.stem.rpartition("-")[2]:
            return _open(path)
        path.unlink()
    except (OSError, BuildError):
        pass  # vanished, not ours to remove, or lying where nothing may be executed: build anew
    return None


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled library cannot be loaded: {error}") from error


def _compile(compiler: list[str], target: Path) -> None:
    here = Path(__file__).parent
    sources = [str(here / name) for name in SOURCES]
    failures = []
    for machine in MACHINE_FLAGS:
        result = _run([*compiler, *FLAGS, *machine, *sources, "-o", str(target)])
        if result.returncode == 0 and target.exists():
            return
        failures.append(_first_error(result))
    raise BuildError(f"{Path(compiler[0]).name} failed: {failures[0]}")


def _first_error(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit code {result.returncode} without a message"])[0]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(command[0]).name} could not be run: {error}") from error
