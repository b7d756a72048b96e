"""Building, caching and refusing: what happens on machines unlike the developer's."""

from __future__ import annotations

import logging
import multiprocessing
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from vimtune.commands.doctor import compiler
from vimtune.ops import BackendUnavailable, causal_conv1d, dispatch
from vimtune.ops.cpu import CpuBackend, build
from vimtune.ops.cpu.build import BuildError, load_library
from vimtune.ops.cpu.library import Library

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache folder with the library in it, built once for all tests here."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIMTUNE_CACHE", str(folder))
        patch.delenv("VIMTUNE_NO_COMPILE", raising=False)
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
        try:
            build.find_compiler()
        except BuildError as error:
            pytest.skip(str(error))
        load_library()
    return folder


@pytest.fixture
def cache(built, tmp_path, monkeypatch) -> Path:
    """A private copy of that folder, in use."""
    folder = tmp_path / "cache"
    shutil.copytree(built, folder)
    monkeypatch.setenv("VIMTUNE_CACHE", str(folder))
    monkeypatch.delenv("VIMTUNE_NO_COMPILE", raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return folder


@pytest.fixture
def copying(cache, monkeypatch) -> None:
    """An empty folder, and a compiler that copies what the real one has made before."""
    content, write = library_in(cache).read_bytes(), Path.write_bytes
    library_in(cache).unlink()
    monkeypatch.setattr(build, "_compile", lambda compiler, target: write(target, content))


@pytest.fixture
def no_compiling(cache, monkeypatch) -> Path:
    monkeypatch.setenv("VIMTUNE_NO_COMPILE", "1")
    return cache


def library_in(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def fake_compiler(tmp_path: Path, script: str) -> str:
    path = tmp_path / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_second_use_does_not_compile(no_compiling):
    assert Library(load_library()).chunk > 0


def test_import_and_choice_of_another_backend_do_not_compile(cache):
    """Building waits for the first use on a CPU."""
    shutil.rmtree(cache)
    code = "import torch, vimtune.ops as ops; ops.resolved_backend('cpu', 'torch')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not cache.exists()


def test_missing_compiler_falls_back_with_a_reason(cache, tmp_path, monkeypatch, caplog, backends):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    backends(CpuBackend())
    with caplog.at_level(logging.INFO, logger="vimtune.ops"):
        assert dispatch.resolved_backend("cpu") == "torch"
        assert dispatch.resolved_backend("cpu") == "torch"
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler"):
        dispatch.resolved_backend("cpu", "cpu")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "install g++" in warnings[0]
    assert any("not cpu: no C++ compiler" in record.getMessage() for record in caplog.records)


def test_chosen_compiler_must_exist(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(BuildError, match=r"CXX.*no-such-compiler"):
        load_library()


def test_compiler_error_is_quoted(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo 'scan.cpp:7:1: error: sorcery' >&2; exit 1"))
    before = sorted(cache.iterdir())
    with pytest.raises(BuildError, match=r"fake-c\+\+ failed: scan\.cpp:7:1: error: sorcery"):
        load_library()
    assert sorted(cache.iterdir()) == before


def test_compiler_that_lies_is_refused(cache, tmp_path, monkeypatch):
    """Exit code 0, but what it wrote is no library."""
    script = 'for last; do :; done; [ "$last" = --version ] || echo nothing > "$last"'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    with pytest.raises(BuildError, match="cannot be loaded"):
        load_library()


ODD_COMPILERS = {
    "ccache 'g++": r"CXX .*ccache 'g\+\+.* is no command: No closing quotation",
    "g++ \\": "is no command: No escaped character",
    "''": "was not found",
    "/bin/true": "true wrote no library",
    "/bin/false": "false failed: exit code 1 without a message",
    "/bin/cat": "cat failed",
    "/": "was not found",
}


@pytest.mark.parametrize("chosen", ODD_COMPILERS)
def test_odd_compilers_are_refused_with_the_reason(cache, monkeypatch, caplog, backends, chosen):
    """And scans then take the path in plain PyTorch, as announced, at each call."""
    monkeypatch.setenv("CXX", chosen)
    backends(CpuBackend())
    (reason,) = dispatch.backend_report("cpu")[0].reasons
    assert re.search(ODD_COMPILERS[chosen], reason), reason
    for _ in range(2):
        x, weight = torch.randn(1, 5, 3, requires_grad=True), torch.randn(3, 4)
        out = causal_conv1d(x, weight)
        assert torch.equal(out, causal_conv1d(x, weight, backend="torch"))
        out.sum().backward()
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert compiler() is None or chosen.startswith("/bin")  # the doctor has an answer, too


@pytest.mark.parametrize("place", ["a folder with spaces", "it's"])
def test_a_compiler_may_lie_anywhere(cache, tmp_path, monkeypatch, place):
    folder = tmp_path / place
    folder.mkdir()
    chosen = fake_compiler(folder, "echo odd: error: here >&2; exit 1")
    monkeypatch.setenv("CXX", chosen)
    assert build.find_compiler() == [chosen]
    monkeypatch.setenv("CXX", f"{shlex.quote(chosen)} -O1")
    assert build.find_compiler() == [chosen, "-O1"]
    with pytest.raises(BuildError, match="odd: error: here"):
        load_library()


def test_a_compiler_that_hangs_is_given_up(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "sleep 60"))
    monkeypatch.setattr(build, "VERSION_SECONDS", 1)
    with pytest.raises(BuildError, match=r"could not be run: .*timed out after 1 seconds"):
        load_library()


def test_a_compiler_that_asks_gets_no_answer(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "read answer || { echo error: no input >&2; exit 1; }"))
    with pytest.raises(BuildError, match="error: no input"):
        load_library()


def test_what_a_compiler_prints_does_not_reach_the_terminal_as_it_is(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, r"printf 'error: \377\033[2J' >&2; exit 1"))
    with pytest.raises(BuildError, match=r"error: \ufffd\\x1b\[2J") as caught:
        load_library()
    assert "\x1b" not in str(caught.value)


@pytest.mark.usefixtures("copying")
def test_a_full_disk_leaves_nothing_behind_and_the_next_folder_serves(cache, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if path.parent == cache:
            path.touch()
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert Library(load_library()).chunk > 0
    assert not list(cache.iterdir())
    assert len(list((tmp_path / "tmp").iterdir())) == 1


def test_without_any_folder_for_temporary_files_there_is_a_reason(cache, monkeypatch):
    library_in(cache).unlink()

    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", nowhere)
    with pytest.raises(BuildError, match=r"cannot be built here: .*No usable temporary directory"):
        load_library()


def test_a_processor_without_description(monkeypatch):
    def unreadable(path, **options):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert build._processor()


def test_compiler_flags_change_the_name(cache, monkeypatch):
    compiler = build.find_compiler()
    assert build._key(compiler) != build._key([*compiler, "-DX"])
    assert build._key(compiler) == build._key(compiler)


def test_building_can_be_forbidden(cache, monkeypatch):
    library_in(cache).unlink()
    monkeypatch.setenv("VIMTUNE_NO_COMPILE", "1")
    backend = CpuBackend()
    assert "VIMTUNE_NO_COMPILE" in backend.refusals(CPU)[0]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_library_is_never_opened(no_compiling, damage):
    path = library_in(no_compiling)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes({"truncated": content[:1000], "flipped": content, "empty": b""}[damage])
    with pytest.raises(BuildError, match="no library is cached"):
        load_library()
    assert not path.exists()


@pytest.mark.usefixtures("copying")
def test_unusable_cache_folder_falls_back_to_a_private_one(cache, tmp_path, monkeypatch):
    file = tmp_path / "a-file"
    file.write_text("")
    monkeypatch.setenv("VIMTUNE_CACHE", str(file / "cache"))
    assert Library(load_library()).chunk > 0
    (private,) = (tmp_path / "tmp").iterdir()
    assert private.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("VIMTUNE_NO_COMPILE", "1")
    assert Library(load_library()).chunk > 0  # the next process finds it there


def _build_and_ask(ready) -> None:
    ready.wait()
    assert Library(load_library()).chunk > 0


@pytest.mark.usefixtures("copying")
def test_two_processes_build_at_once(cache):
    context = multiprocessing.get_context("fork")  # so that neither has to import torch
    ready = context.Barrier(2)
    processes = [context.Process(target=_build_and_ask, args=(ready,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    # Whoever came last may have made a byte-identical library or not: all that is there is whole.
    for path in cache.iterdir():
        assert build._digest(path.read_bytes()) == path.stem.rpartition("-")[2]


@pytest.mark.parametrize("function", ["scan_forward", "scan_backward", "conv_forward", "conv_backward"])
def test_wrong_numbers_are_refused(no_compiling, monkeypatch, function):
    original = getattr(Library, function)

    def wrong(self, *arguments):
        result = original(self, *arguments)
        results = [result] if isinstance(result, torch.Tensor) else result
        damaged = [tensor for tensor in results if tensor is not None][-1]
        damaged[..., -1] += 0.01 * damaged.abs().max()
        return result

    monkeypatch.setattr(Library, function, wrong)
    (reason,) = CpuBackend().refusals(CPU)
    assert "wrong numbers" in reason


def test_loading_inside_a_trace(no_compiling):
    """The first use may happen while torch.compile traces with fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.inference_mode():
        assert CpuBackend().refusals(CPU) == []


def test_other_devices_are_refused_without_building(cache):
    shutil.rmtree(cache)
    assert "not on meta" in CpuBackend().refusals(torch.device("meta"))[0]
    assert not cache.exists()
