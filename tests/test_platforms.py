"""What Windows and macOS ask for, as far as it can be found out elsewhere: each test stands for a rule that
fails there, and says which."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vimtune.commands import doctor
from vimtune.compare import execution, worker
from vimtune.data import build_transform, create_dataset, create_loader
from vimtune.data.loading import loader, workers
from vimtune.files import atomic_write
from vimtune.ops.cpu import cache
from vimtune.output import write_folder
from vimtune.recipe.components import OptimisationSettings
from vimtune.runtime.device import resolve_device
from vimtune.runtime.precision import build_autocast, build_scaler
from vimtune.tasks.job import Batch
from vimtune.tensor_file import read_tensors
from vimtune.training.graph import refusals
from vimtune.training.prefetch import Readback, WindowReader

MPS = torch.device("mps")


# --------------------------------------------------------------------------- files


def test_files_that_are_flushed_may_be_written(tmp_path, monkeypatch) -> None:
    """Windows refuses to flush a file that was opened to be read."""
    modes = []
    flush = os.fsync

    def noting(descriptor: int) -> None:
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    atomic_write(tmp_path / "file", lambda path: path.write_text("content"))
    assert modes == [os.O_RDWR] and (tmp_path / "file").read_text() == "content"


def test_a_folder_is_not_renamed_to_a_name_that_is_there(tmp_path, monkeypatch) -> None:
    """On Windows that is an error also where the folder in the way is empty."""
    rename = Path.replace

    def strict(source: Path, target: Path) -> Path:
        if target.exists():
            raise PermissionError(13, "Access is denied", str(target))
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", strict)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        write_folder(tmp_path / name, lambda folder: (folder / "file").touch())
        assert (tmp_path / name / "file").exists()


def test_tensors_keep_no_file_that_is_to_be_replaced(tmp_path, monkeypatch) -> None:
    """Windows replaces no file that is mapped into memory, such as the state of the run that goes on."""
    path = tmp_path / "state.safetensors"
    save_file({"w": torch.arange(70_000)}, path)
    monkeypatch.setattr(sys, "platform", "win32")
    tensors = read_tensors(path)
    assert torch.equal(tensors["w"], torch.arange(70_000))
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_library_is_read_as_it_is(tmp_path, monkeypatch) -> None:
    """Windows changes line ends in a file that is not opened as a binary one."""
    asked = []
    open_file = os.open
    monkeypatch.setattr(os, "O_BINARY", 0x8000_0000, raising=False)

    def noting(path: Any, flags: int) -> int:
        asked.append(flags)
        return open_file(path, flags & ~0x8000_0000)

    path = tmp_path / "library.so"
    path.write_bytes(b"\r\n\x1a")
    path.chmod(0o600)
    monkeypatch.setattr(os, "open", noting)
    assert cache.read_private(path) == b"\r\n\x1a" and asked[0] & 0x8000_0000


def test_a_fingerprint_has_the_same_names_everywhere(tmp_path, monkeypatch) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    found = create_dataset("folder", "train", tmp_path)
    expected = found.fingerprint()
    # As Windows has it; the files are looked at under their own names.
    sizes = {path.replace("/", "\\"): os.stat(path).st_size for path in found.paths}
    monkeypatch.setattr("vimtune.data.base._size", sizes.__getitem__)
    monkeypatch.setattr("vimtune.data.base.os.sep", "\\")
    monkeypatch.setattr(os.path, "join", lambda *parts: "\\".join(map(str, parts)).replace("/", "\\"))
    found.paths = [path.replace("/", "\\") for path in found.paths]
    assert found.fingerprint() == expected


# --------------------------------------------------------------------------- processes


def test_processes_that_are_spawned_prepare_the_same_images(monkeypatch) -> None:
    """macOS and Windows start them anew: everything they need has to travel there."""
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(loader, "worker_context", lambda count: spawn if count else None)
    dataset = create_dataset("synthetic_flowers", "train", img_size=(16, 16), species=2, train_per_species=3)

    def batches(num_workers: int) -> list[Tensor]:
        made = create_loader(
            dataset,
            build_transform("light", (16, 16), train=True),
            batch_size=4,
            shuffle=True,
            drop_last=False,
            num_workers=num_workers,
            seed=0,
        )
        try:
            return [images for images, _ in made]
        finally:
            made.close()

    assert all(torch.equal(one, other) for one, other in zip(batches(0), batches(1), strict=True))


def test_workers_start_as_the_system_can(monkeypatch) -> None:
    assert workers.worker_context(1).get_start_method() == "fork"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert workers.worker_context(1) is None
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(sys, "platform", "win32")
    assert workers.worker_context(1) is None


def test_a_worker_does_without_the_signals_that_windows_lacks(monkeypatch) -> None:
    handled = {}
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.update({number: handler}))
    monkeypatch.delattr(signal, "alarm")
    monkeypatch.delattr(signal, "SIGCHLD")
    workers.prepare_worker(0)
    assert handled == {signal.SIGINT: signal.SIG_IGN}
    with workers.death_noticed_later():
        pass


def test_a_run_of_a_comparison_is_asked_to_stop_and_not_ended(monkeypatch) -> None:
    """On Windows `os.kill` ends a process at once, and sessions are called groups."""
    asked = []
    monkeypatch.setattr(signal, "raise_signal", asked.append)
    monkeypatch.setattr(os, "kill", lambda *what: pytest.fail("it would end before it has saved"))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    reading, writing = os.pipe()
    os.close(writing)
    worker._read(reading, None)  # type: ignore[arg-type]  # of which nothing is asked
    os.close(reading)
    assert asked == [signal.SIGTERM] and execution._apart() == {"creationflags": 512}


# --------------------------------------------------------------------------- Apple's GPU


@pytest.fixture
def apple(monkeypatch) -> None:
    """A Mac with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 14)


def test_apples_gpu_is_what_auto_means_on_a_mac(apple, monkeypatch) -> None:
    assert resolve_device("auto") == resolve_device("mps") == MPS
    assert doctor._devices() == [torch.device("cpu"), MPS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda", 0)


def test_several_processes_do_not_share_it(apple) -> None:
    assert resolve_device("auto", 1, 2) == torch.device("cpu")
    with pytest.raises(ValueError, match="'mps' cannot be shared by 2 processes: use cpu, or one"):
        resolve_device("mps", 0, 2)


def test_precisions_and_graphs_there(apple, monkeypatch) -> None:
    assert build_autocast("none", MPS)() is not None
    with build_autocast("bf16", MPS)():
        assert torch.is_autocast_enabled("mps") and torch.get_autocast_dtype("mps") == torch.bfloat16
    assert not build_scaler("none", MPS).is_enabled()
    with pytest.raises(ValueError, match="amp = 'fp16' needs a CUDA GPU and the device is mps: use bf16"):
        build_autocast("fp16", MPS)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    with pytest.raises(ValueError, match="amp = 'bf16' on mps needs macOS 14 or newer: use none"):
        build_autocast("bf16", MPS)
    assert refusals(OptimisationSettings(), MPS) == ["the device is mps"]
    assert not WindowReader(MPS, 1).ahead


class Elsewhere:
    """A tensor on a device that is no NVIDIA GPU, and how it is asked to move."""

    is_cuda = False

    def __init__(self) -> None:
        self.asked: list[tuple[Any, bool]] = []

    def to(self, device: Any, non_blocking: bool = False, copy: bool = False) -> Tensor:
        self.asked.append((str(device), non_blocking))
        return torch.ones(2)


def test_nothing_is_read_from_it_before_it_has_arrived(apple) -> None:
    """Copies that nobody waits for are for CUDA, whose events say when they are done."""
    tensor = Elsewhere()
    assert Readback(tensor).read() == [1.0, 1.0]  # type: ignore[arg-type]
    Batch({"images": tensor}, 1).to(MPS)  # type: ignore[dict-item]
    assert tensor.asked == [("cpu", False), ("mps", False)]


def test_its_random_state_is_put_back(apple, monkeypatch) -> None:
    from vimtune.recipe.components import RunSettings
    from vimtune.training.settings import process_settings

    states = ["before"]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    with process_settings(RunSettings(backend="torch"), MPS):
        states.append("drawn from")
    assert states == ["before", "drawn from", "before"]
