"""Compile the kernels with the machine's own C++ compiler, once, and keep the library in a cache folder.

The library has a plain C interface: it depends neither on torch's headers nor on the Python version,
compiles in seconds and stays valid across updates of both. A file of the cache is named after what
it was made from (sources, compiler, flags, processor) and after its own content, so it is never
half-written, never stale and never taken for good when damaged. Which folders are trusted says `cache.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from vimtune.files import atomic_write
from vimtune.ops.cpu import cache
from vimtune.text import printable, quote, shorten

logger = logging.getLogger(__name__)

SOURCES = ("scan.cpp", "conv.cpp")
"""Files that the compiler translates."""
HEADERS = ("simd.h", "threads.h")
"""Files that the sources include; a change in one makes the library another one, too."""
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    # No -ffast-math: linking with it switches denormals off for the whole process.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
"""Options of the compiler on every machine."""
MACHINE_FLAGS: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
"""How compilers spell "this very processor"; the last resort is their default target."""
COMPILERS = ("g++", "clang++", "c++")
"""Compilers that are looked for, in this order, unless the environment names one."""
VERSION_SECONDS, COMPILE_SECONDS = 30, 300
"""How long a compiler may take to say its version, and to compile."""


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
    folders = cache.usable_folders()
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
                atomic_write(path, write, mode=0o600)  # The file is private, whatever the umask says.
                return _open(path)
            except (OSError, BuildError):
                continue  # It is read-only, full, or mounted without execution, and the next folder may do.
        return _open(built)  # A loaded library outlives its file.


def find_compiler() -> list[str]:
    """Return the compiler's command line start: `$CXX` if set, else the first one on the PATH.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX", "").strip()
    for command in [_split(chosen)] if chosen else [[name] for name in COMPILERS]:
        program = shutil.which(command[0])
        if program:
            return [program, *command[1:]]
    if chosen:
        raise BuildError(f"the C++ compiler of the environment variable CXX ({quote(chosen)}) was not found")
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}) on the PATH")


def _split(chosen: str) -> list[str]:
    """What `$CXX` means: a program, whose path may have spaces, or else a command with options."""
    if shutil.which(chosen):
        return [chosen]
    try:
        return shlex.split(chosen) or [chosen]
    except ValueError as error:
        raise BuildError(f"the environment variable CXX ({quote(chosen)}) is no command: {error}") from error


def _key(compiler: list[str]) -> str:
    """Everything the machine code depends on."""
    here = Path(__file__).parent
    parts = [(here / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    parts += [*compiler, _run([*compiler, "--version"], VERSION_SECONDS).stdout, *FLAGS, _processor()]
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


def _open_if_intact(path: Path) -> ctypes.CDLL | None:
    """Open a cached library that is ours and whose content matches its name; remove any other."""
    try:
        # Checked before loading: opening a truncated library can end the process. Nobody else can exchange
        # the file in between, for the folder is private.
        content = cache.read_private(path)
        if _digest(content) == path.stem.rpartition("-")[2]:
            return _open(path)
    except cache.Untrusted as error:
        logger.warning("A compiled library is not loaded but removed: %s.", error)
    except (OSError, BuildError):
        return None  # It vanished, or lies where nothing may be executed, so it is built anew.
    with contextlib.suppress(OSError):
        path.unlink()
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
        result = _run([*compiler, *FLAGS, *machine, *sources, "-o", str(target)], COMPILE_SECONDS)
        if result.returncode == 0:
            if target.exists():
                return
            raise BuildError(f"{Path(compiler[0]).name} wrote no library; is it a C++ compiler?")
        failures.append(_first_error(result))
    raise BuildError(f"{Path(compiler[0]).name} failed: {failures[0]}")


def _first_error(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    found = (errors or lines or [f"exit code {result.returncode} without a message"])[0]
    return printable(shorten(found))


def _run(command: list[str], seconds: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(command[0]).name} could not be run: {error}") from error
