"""The result of a run: report.json and the final table."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vimtune import __version__
from vimtune.adapters import AdapterInfo
from vimtune.console import neutral, print_line
from vimtune.files import atomic_write_text
from vimtune.machine import processor_name
from vimtune.methods import resolve_options
from vimtune.ops import resolved_backend
from vimtune.recipe import Recipe
from vimtune.run_folder import RunFolder, writing
from vimtune.runtime.distributed import Processes
from vimtune.schema import finite_json, load_json
from vimtune.tasks.base import Task
from vimtune.tasks.report import Report
from vimtune.training.state import Progress, steps_used_up

TABLE_WIDTH = 60
"""A narrower terminal shows the final table as a list."""


def shared_fields(
    recipe: Recipe,
    progress: Progress,
    *,
    loss: float,
    split: str,
    data: dict[str, str],
    left_out: int,
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
        "left_out": left_out,
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
    with writing(folder.report):
        atomic_write_text(folder.report, text)


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
