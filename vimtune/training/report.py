"""The result of a run: report.json and the final table."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vimtune import __version__
from vimtune.adapters import AdapterInfo
from vimtune.console import neutral, print_line
from vimtune.methods import resolve_options
from vimtune.ops import resolved_backend
from vimtune.recipe import Recipe
from vimtune.schema import STRICT, finite_json, finite_or_none, load_json
from vimtune.tasks.base import TASKS, Task
from vimtune.tasks.job import Outcome
from vimtune.training.distributed import Processes
from vimtune.training.folder import RunFolder, writing
from vimtune.training.state import Progress, steps_used_up
from vimtune.training.tracking import duration
from vimtune.utils import atomic_write, processor_name

FORMAT = "vimtune report 1"
"""What a report calls its format."""
TABLE_WIDTH = 60
"""A narrower terminal shows the final table as a list."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a run, as in report.json: the part that every task has. Times are seconds, memory MiB.

    A number that could not be measured or is not finite is None.

    `loss` is that of the saved adapter on the split `split`, which is "test" where the data have one. The
    adapter is that of epoch `best_epoch`, chosen by its scores on the split `selection_split`. When
    `selection_split` and `split` are the same, the choice makes the scores optimistic. `head_parameters` of
    the `trainable_parameters` are those of the head, `adapter_bytes` is the size of the adapter's file; both
    are None in reports of earlier versions. `backend` is the scan
    backend that really ran, `cuda_graph` says whether batches were replayed (in the run's last session, if it
    was resumed). `data` says for each split which data were used. `recipe` holds the settings of the run, and
    `history` a record of each epoch, as in metrics.jsonl.
    """

    __pydantic_config__ = STRICT

    format: str = FORMAT
    loss: float | None
    split: str
    selection_split: str
    best_epoch: int
    epochs: int
    steps: int
    stopped_early: bool
    trainable_parameters: int
    total_parameters: int
    peak_memory: float | None
    peak_memory_of: str
    seconds: float
    train_seconds: float
    model: str
    method: str
    method_config: dict[str, Any]
    data: dict[str, str]
    backend: str
    cuda_graph: bool
    device: str
    device_name: str
    processes: int
    threads: int
    amp: str
    seed: int
    deterministic: bool
    versions: dict[str, str]
    warnings: list[str]
    run_dir: str
    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    head_parameters: int | None = None
    adapter_bytes: int | None = None

    def scores_by_name(self) -> dict[str, float | None]:
        """The scores on `split`, by the names that the task gives them."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in report.json, those of the task first."""
        values = dataclasses.asdict(self)
        shared = [field.name for field in dataclasses.fields(Report)]
        order = [shared[0], *(name for name in values if name not in shared), *shared[1:]]
        plain: dict[str, Any] = finite_or_none({name: values[name] for name in order})
        return plain

    def rows(self) -> Iterator[tuple[str, str]]:
        """The final table: names and values. A task adds to it by the three methods below."""
        yield from self.score_rows()
        early = ", stopped early" if self.stopped_early else ""
        yield "best epoch", f"{self.best_epoch} of {self.epochs}{early} ({self.selected_by()})"
        trained, total = self.trainable_parameters, self.total_parameters
        yield "trainable parameters", f"{trained:,} of {total:,} ({100.0 * trained / total:.2f} %)"
        yield "training speed", self.speed()
        memory = "" if self.peak_memory is None else f"{self.peak_memory:.0f} MiB "
        yield "peak memory", f"{memory}({self.peak_memory_of})"
        yield "time", duration(self.seconds)
        yield "model, method", f"{self.model}, {self.method}"
        graph = ", CUDA graph" if self.cuda_graph else ""
        yield "device, backend", f"{self.device}, {self.backend}{graph}"
        yield "data", self.data[self.split]
        yield from self.detail_rows()

    def score_rows(self) -> Iterator[tuple[str, str]]:
        """The first rows of the final table: the scores."""
        yield f"loss ({self.split})", "not finite" if self.loss is None else f"{self.loss:.4f}"

    def selected_by(self) -> str:
        """By what the best epoch was chosen, such as "val top-1 50.00 %"."""
        return f"{self.selection_split} loss"

    def speed(self) -> str:
        """How fast the run trained, such as "512 img/s"."""
        return "not measured"

    def detail_rows(self) -> Iterator[tuple[str, str]]:
        """The last rows of the final table."""
        return iter(())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreReport(Report):
    """Result of a run of a task that has no report of its own.

    `scores` are those of the saved adapter on `split`, over `num_examples` examples; `best_scores` and
    `last_scores` those of the best and of the last evaluated epoch on `selection_split`. `rate` says on how
    many of the task's units the run trained per second, over all processes.
    """

    task: str
    scores: dict[str, float | None]
    num_examples: int
    best_scores: dict[str, float | None]
    last_scores: dict[str, float | None]
    rate: float
    rate_unit: str = ""
    """Of what `rate` speaks, in short; empty in reports of earlier versions."""

    def scores_by_name(self) -> dict[str, float | None]:
        """`scores`."""
        return self.scores

    @staticmethod
    def values(outcome: Outcome) -> dict[str, Any]:
        """The fields of this class for what a run has reached."""
        return {
            "task": outcome.task.name,
            "scores": dict(outcome.evaluation.scores),
            "num_examples": outcome.evaluation.count,
            "best_scores": dict(outcome.best),
            "last_scores": dict(outcome.last),
            "rate": outcome.rate,
            "rate_unit": outcome.task.short_unit,
        }

    def score_rows(self) -> Iterator[tuple[str, str]]:
        """A row for each score, then the loss."""
        for score in TASKS.get(self.task).scores:
            value = self.scores[score.name]
            yield f"{score.title} ({self.split})", "none" if value is None else score.show(value)
        yield from super().score_rows()

    def selected_by(self) -> str:
        """The most important score in the best epoch."""
        for score in TASKS.get(self.task).scores[:1]:
            value = self.best_scores[score.name]
            if value is not None:
                return f"{self.selection_split} {score.title} {score.show(value)}"
        return super().selected_by()

    def speed(self) -> str:
        """Units per second."""
        return f"{self.rate:.0f} {self.rate_unit or TASKS.get(self.task).short_unit}/s"


def shared_fields(
    recipe: Recipe,
    progress: Progress,
    *,
    loss: float,
    split: str,
    data: dict[str, str],
    method_config: dict[str, Any],
    trainable: int,
    head: int,
    total: int,
    adapter_bytes: int,
    processes: Processes,
    memory: tuple[float | None, str],
    cuda_graph: bool,
    run_dir: Path,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """The fields of `Report` for a run at `progress` whose saved adapter has `loss` on `split`.

    Of the `trainable` numbers `head` are those of the head, and the plain model has `total`.
    """
    return {
        "loss": loss,
        "split": split,
        "selection_split": recipe.data.selection_split,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "steps": progress.step,
        "stopped_early": progress.stopped is not None
        or (progress.epoch < recipe.optimisation.epochs and not steps_used_up(recipe.optimisation, progress)),
        "trainable_parameters": trainable,
        "head_parameters": head,
        "total_parameters": total,
        "adapter_bytes": adapter_bytes,
        "peak_memory": memory[0],
        "peak_memory_of": memory[1],
        "seconds": progress.seconds,
        "train_seconds": progress.train_seconds,
        "model": recipe.backbone.model,
        "method": recipe.method.peft,
        "method_config": method_config,
        "data": data,
        "backend": resolved_backend(processes.device),
        "cuda_graph": cuda_graph,
        "device": str(processes.device),
        "device_name": device_name(processes.device),
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
        "amp": recipe.optimisation.amp,
        "seed": recipe.run.seed,
        "deterministic": recipe.run.deterministic,
        "versions": versions(recipe.task),
        "warnings": progress.warnings,
        "run_dir": str(run_dir),
        "recipe": recipe.to_dict(),
        "history": history,
    }


def describe_method(info: AdapterInfo) -> dict[str, Any]:
    """Where an adapter acts, and every field of its methods, defaults included."""
    return {"targets": info.targets, "layers": info.layers, **resolve_options(info.method, info.options)}


def versions(task: Task) -> dict[str, str]:
    """Versions that the results of a task depend on."""
    return {
        "vimtune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in task.packages},
    }


def device_name(device: torch.device) -> str:
    """The hardware behind `device`, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def write_report(report: Report, folder: RunFolder) -> None:
    """Write report.json; a run of which it exists is finished."""
    text = finite_json(report.to_dict(), indent=2) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    with writing(folder.report):
        atomic_write(folder.report, write)


def read_report(folder: RunFolder, kind: type[Report]) -> Report | None:
    """The report in a run folder; None where there is none, or not one of class `kind` of this version."""
    try:
        return load_json(kind, folder.report.read_text(encoding="utf-8"), str(folder.report))
    except (OSError, ValueError):
        return None


def print_report(report: Report, console: Console) -> None:
    """The final table; where a terminal is too narrow for it, a list."""
    rows = report.rows()
    if console.width < TABLE_WIDTH:
        for name, value in rows:
            print_line(console, f"{name}: {value}" if name else value)
    else:
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, neutral(value, console))
        console.print(table)
    print_line(console, f"run folder: {report.run_dir}")
