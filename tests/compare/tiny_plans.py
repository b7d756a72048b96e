"""A plan small enough for a test, runs without processes, and results that nobody has trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vimtune.compare.plan import Cell
from vimtune.compare.worker import LOG_FILE
from vimtune.recipe import Recipe, load_recipe
from vimtune.tasks.images.report import ImageReport
from vimtune.training import train
from vimtune.training.result import Result

TINY: dict[str, Any] = {
    "dataset_kwargs": {"species": 2, "train_per_species": 2, "val_per_species": 1, "test_per_species": 1},
    "num_workers": 0,
    "model": "test_vim",
    "pretrained": False,
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 8,
    "device": "cpu",
    "backend": "torch",
    "threads": 1,
}
"""Keys of the recipes of all runs, which take one step on four images."""


@dataclass
class InProcess:
    """Stands in for `Processes`: a run is made in this process as soon as it is started."""

    started: list[Cell] = field(default_factory=list)
    """The runs that were started, in order."""
    dies_at: int | None = None
    """Before which of them the whole comparison is killed."""
    fails: str = ""
    """Runs of the method of this name fail."""
    waiting: list[Any] = field(default_factory=list)

    def __call__(self, *arguments: Any) -> InProcess:
        """What the comparison calls to make the processes."""
        return self

    @property
    def has_room(self) -> bool:
        return not self.waiting

    @property
    def running(self) -> list[Any]:
        return self.waiting

    def start(self, cell: Cell, folder: Path) -> None:
        if self.dies_at == len(self.started):
            raise SystemExit("killed")
        self.started.append(cell)
        code = 0
        if cell.method == self.fails:
            (folder / LOG_FILE).write_text("training ...\nerror: the loss is \x1b[31mnot finite\n")
            code = 2
        else:
            train(load_recipe(None, {"resume": str(folder)}))
        failure = "the loss is not finite"
        self.waiting.append(
            SimpleNamespace(cell=cell, folder=folder, code=code, started=0.0, failure=lambda: failure)
        )

    def ended(self) -> Iterator[Any]:
        while self.waiting:
            yield self.waiting.pop()

    def ask_to_stop(self) -> None:
        pass

    def kill(self) -> None:
        pass


def result(
    top1: float = 80.0,
    *,
    val: float = 70.0,
    lr: float = 1e-3,
    seed: int = 0,
    trained: int = 1000,
    recipe: dict[str, Any] | None = None,
    **changes: Any,
) -> Result:
    """A result with these scores."""
    settings = Recipe(**{**TINY, "peft": "lora", "lr": lr, "seed": seed, **(recipe or {})})
    values: dict[str, Any] = {
        "loss": 0.5,
        "split": "test",
        "selection_split": "val",
        "best_epoch": 1,
        "epochs": 2,
        "steps": 4,
        "stopped_early": False,
        "trainable_parameters": trained,
        "head_parameters": 100,
        "total_parameters": 10 * trained,
        "adapter_bytes": 4 * trained,
        "peak_memory": 100.0,
        "peak_memory_of": "process",
        "seconds": 2.0,
        "train_seconds": 1.0,
        "model": "test_vim",
        "method": settings.method.peft,
        "method_config": settings.method.all_options,
        "data": {"test": "images"},
        "backend": "torch",
        "cuda_graph": False,
        "device": "cpu",
        "device_name": "a processor",
        "processes": 1,
        "threads": 1,
        "amp": "none",
        "seed": seed,
        "deterministic": False,
        "versions": {},
        "warnings": [],
        "run_dir": "runs/x",
        "recipe": settings.to_dict(),
        "history": [{"epoch": 1, "loss": 1.0, "top1": val, "top5": None}],
        "top1": top1,
        "top5": None,
        "per_class": {},
        "most_confused": [],
        "num_images": 8,
        "num_classes": 4,
        "best_top1": val,
        "last_top1": val,
        "images_per_second": 10.0,
    }
    return Result(settings, ImageReport(**{**values, **changes}))
