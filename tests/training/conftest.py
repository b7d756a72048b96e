"""Fixtures that the tests of training share."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorders import RepeatingRecorder
from tiny_runs import TINY

from vimtune.data import CorruptImageError
from vimtune.data.synthetic import SyntheticFlowers
from vimtune.recipe import Recipe
from vimtune.training import run, saving, trained, trainer
from vimtune.training.optim import build_optimizer
from vimtune.training.prefetch import WindowReader

REPOSITORY = Path(__file__).resolve().parents[2]

LAUNCHED = """
import sys
from vimtune.recipe import Recipe
from vimtune.training import train

train(Recipe(**eval(sys.argv[1])))
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Recipe]:
    """`tiny("name", **changes)`: recipe of a run into the folder `name`."""

    def build(name: str = "run", **changes: Any) -> Recipe:
        return Recipe(**{**TINY, "output_dir": str(tmp_path / name), **changes})

    return build


@pytest.fixture(scope="session", autouse=True)
def images_of_runs(each_flower_is_painted_once: None) -> None:
    """Runs of the same recipe see the same images; processes that a run starts paint anew."""


@pytest.fixture(scope="session", autouse=True)
def short_runs_are_meant() -> Iterator[None]:
    """Runs of tests are short, and their reports have the warnings alone that a test is about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "few_steps_warning", lambda *run: None)
        yield


@pytest.fixture
def saving_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every epoch is worth saving, however soon it is over."""
    monkeypatch.setattr(saving, "SHARE", 1.0)


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], bool]], None]:
    """`damaged(which)`: training images of which `which(index, turn)` is true cannot be read; `turn` counts
    from 1 the training images that have been read since the call."""
    load = SyntheticFlowers.load

    def install(which: Callable[[int, int], bool]) -> None:
        turns = itertools.count(1)

        def read(self: SyntheticFlowers, index: int) -> Any:
            if self.split == "train" and which(index, next(turns)):
                raise CorruptImageError(self.describe(index), "damaged")
            return load(self, index)

        monkeypatch.setattr(SyntheticFlowers, "load", read)

    return install


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[torch.optim.Optimizer]]:
    """Runs have the optimizer of a GPU, which skips updates by itself; gives those that were made."""
    made: list[torch.optim.Optimizer] = []

    def install() -> list[torch.optim.Optimizer]:
        def build(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer = build_optimizer(*args, **kwargs)
            for settings in (optimizer.defaults, *optimizer.param_groups):
                settings["fused"] = True
            made.append(optimizer)
            return optimizer

        monkeypatch.setattr(trained, "build_optimizer", build)
        return made

    return install


@pytest.fixture
def reading_ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Runs read ahead, as on a GPU, and with the optimizer of a GPU read a step's numbers late."""

    class Ahead(WindowReader):
        def __init__(self, device: torch.device, size: int) -> None:
            super().__init__(device, size)
            self.ahead = True

    return lambda: monkeypatch.setattr(trainer, "WindowReader", Ahead)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[RepeatingRecorder]]:
    """Have the runs of a test replay, with the given recorder class; gives the recorders that were made."""

    def install(recorder_class: type[RepeatingRecorder] = RepeatingRecorder) -> list[RepeatingRecorder]:
        made: list[RepeatingRecorder] = []
        monkeypatch.setattr(trainer, "refusals", lambda recipe, device: [])
        monkeypatch.setattr(
            trainer, "CudaRecorder", lambda device: made.append(recorder_class(device)) or made[-1]
        )
        return made

    return install


@pytest.fixture
def launch(tmp_path):
    """Run a recipe with torchrun on two processes of this machine."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)

    def run(recipe) -> subprocess.CompletedProcess[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += [str(script), repr(recipe.to_dict())]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=200)

    return run
