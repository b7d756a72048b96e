"""What a run leaves behind: report.json, the final table, a learning curve and a confusion matrix."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vimtune import __version__
from vimtune.adapters import AdapterInfo
from vimtune.adapters.base import build_methods
from vimtune.ops import resolved_backend
from vimtune.recipe import Recipe
from vimtune.schema import STRICT, load_json
from vimtune.train.checkpoint import Progress
from vimtune.train.distributed import Processes
from vimtune.train.evaluate import Evaluation
from vimtune.train.folder import RunFolder, writing
from vimtune.train.tracking import duration
from vimtune.utils import atomic_write, processor_name

MAX_NAMED_CLASSES = 30
"""More names than these cannot be read beside a confusion matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a run. Accuracies are percent, times seconds, memory MiB.

    `top1`, `top5`, `loss` and `per_class` are scores of the saved adapter on `split`, which is
    "test" where the data set has one. The adapter is that of epoch `best_epoch`, chosen by
    its `best_top1` on `selection_split`; `last_top1` is the last epoch's score there. When
    `selection_split` and `split` are the same, the choice makes `top1` optimistic.
    `images_per_second` counts training alone, over all processes. `backend` is the scan backend that
    really ran, `cuda_graph` whether batches were replayed (in the run's last session, if it was resumed).
    `data` says for each split which images were used.
    """

    __pydantic_config__ = STRICT

    top1: float
    top5: float
    loss: float
    per_class: dict[str, float | None]
    split: str
    num_images: int
    selection_split: str
    best_epoch: int
    best_top1: float
    last_top1: float
    epochs: int
    steps: int
    stopped_early: bool
    trainable_parameters: int
    total_parameters: int
    images_per_second: float
    peak_memory: float
    peak_memory_of: str
    seconds: float
    train_seconds: float
    model: str
    method: str
    method_config: dict[str, Any]
    num_classes: int
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
    history: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in report.json."""
        return dataclasses.asdict(self)


def build_report(
    recipe: Recipe,
    progress: Progress,
    scores: Evaluation,
    *,
    classes: list[str],
    data: dict[str, str],
    split: str,
    method_config: dict[str, Any],
    trainable: int,
    total: int,
    processes: Processes,
    memory: tuple[float, str],
    cuda_graph: bool,
    run_dir: Path,
) -> Report:
    """The report of a run that stands at `progress` and whose saved adapter reached `scores` on `split`."""
    return Report(
        top1=scores.top1,
        top5=scores.top5,
        loss=scores.loss,
        per_class=dict(zip(classes, scores.per_class, strict=True)),
        split=split,
        num_images=scores.num_images,
        selection_split=recipe.selection_split,
        best_epoch=progress.best_epoch,
        best_top1=progress.best_top1,
        last_top1=[record["top1"] for record in progress.history if "top1" in record][-1],
        epochs=progress.epoch,
        steps=progress.step,
        stopped_early=progress.epoch < recipe.epochs,
        trainable_parameters=trainable,
        total_parameters=total,
        images_per_second=progress.images / max(1e-9, progress.train_seconds),
        peak_memory=memory[0],
        peak_memory_of=memory[1],
        seconds=progress.seconds,
        train_seconds=progress.train_seconds,
        model=recipe.model,
        method=recipe.peft,
        method_config=method_config,
        num_classes=len(classes),
        data=data,
        backend=resolved_backend(processes.device),
        cuda_graph=cuda_graph,
        device=str(processes.device),
        device_name=device_name(processes.device),
        processes=processes.world_size,
        threads=torch.get_num_threads(),
        amp=recipe.amp,
        seed=recipe.seed,
        deterministic=recipe.deterministic,
        versions=versions(),
        warnings=progress.warnings,
        run_dir=str(run_dir),
        history=progress.history,
    )


def describe_method(info: AdapterInfo) -> dict[str, Any]:
    """Where an adapter acts, and every field of its methods, defaults included."""
    fields = {method.name: dataclasses.asdict(method) for method in build_methods(info.method, info.options)}
    return {"targets": info.targets, "layers": info.layers, **fields}


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    return {
        "vimtune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "torchvision": version("torchvision"),
    }


def peak_memory(device: torch.device) -> tuple[float, str]:
    """Most memory used so far in MiB, and whose: the GPU's allocations, or this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "GPU allocations"
    if sys.platform == "win32":
        return float("nan"), "not measured on Windows"
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10), "process"


def device_name(device: torch.device) -> str:
    """The hardware behind `device`, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def write_report(report: Report, confusion: Tensor, folder: RunFolder) -> None:
    """Write the pictures and report.json into the run folder; the report last, as the sign of completion."""
    classes = list(report.per_class)
    _save(draw_learning_curve(report), folder.learning_curve)
    _save(draw_confusion_matrix(confusion, classes, report), folder.confusion_matrix)
    text = json.dumps(report.to_dict(), indent=2) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    with writing(folder.report):
        atomic_write(folder.report, write)


def read_report(folder: RunFolder) -> Report | None:
    """The report in a run folder; None where there is none, or not one that this version writes."""
    try:
        return load_json(Report, folder.report.read_text(encoding="utf-8"), str(folder.report))
    except (OSError, ValueError):
        return None


def print_report(report: Report, console: Console) -> None:
    """The final table."""
    share = 100.0 * report.trainable_parameters / report.total_parameters
    early = ", stopped early" if report.stopped_early else ""
    rows = {
        f"top-1 ({report.split})": f"{report.top1:.2f} %",
        f"top-5 ({report.split})": f"{report.top5:.2f} %",
        "best epoch": f"{report.best_epoch} of {report.epochs}{early} "
        f"({report.selection_split} top-1 {report.best_top1:.2f} %)",
        "trainable parameters": f"{report.trainable_parameters:,} of {report.total_parameters:,} "
        f"({share:.2f} %)",
        "training speed": f"{report.images_per_second:.0f} img/s",
        "peak memory": f"{report.peak_memory:.0f} MiB ({report.peak_memory_of})",
        "time": duration(report.seconds),
        "model, method": f"{report.model}, {report.method}",
        "device, backend": f"{report.device}, {report.backend}"
        + (", CUDA graph" if report.cuda_graph else ""),
        "data": report.data[report.split],
        "run folder": report.run_dir,
    }
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def draw_learning_curve(report: Report) -> Figure:
    """Losses on the left axis, accuracy on the right, over epochs."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    losses = figure.add_subplot()
    epochs = [record["epoch"] for record in report.history]
    evaluated = [record for record in report.history if "top1" in record]
    at = [record["epoch"] for record in evaluated]
    losses.plot(
        epochs, [r["train_loss"] for r in report.history], color="tab:blue", marker=".", label="train loss"
    )
    losses.plot(
        at,
        [r["loss"] for r in evaluated],
        color="tab:orange",
        marker=".",
        label=f"{report.selection_split} loss",
    )
    losses.set(xlabel="epoch", ylabel="loss")
    losses.set_ylim(0, 1.05 * losses.dataLim.ymax)
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy = losses.twinx()
    accuracy.plot(
        at,
        [r["top1"] for r in evaluated],
        color="tab:green",
        marker=".",
        label=f"{report.selection_split} top-1",
    )
    accuracy.axvline(report.best_epoch, color="0.6", linestyle=":", linewidth=1)
    accuracy.set(ylabel="top-1 (%)", ylim=(0, 100))
    lines = [*losses.get_lines(), accuracy.get_lines()[0]]
    losses.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    losses.set_title(f"{report.model}, {report.method}")
    return figure


def draw_confusion_matrix(confusion: Tensor, classes: list[str], report: Report) -> Figure:
    """Share of each true class (row) that was given each answer (column)."""
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    named = len(classes) <= MAX_NAMED_CLASSES
    side = min(12.0, 4.0 + 0.28 * len(classes)) if named else 8.0
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if named:
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=90, fontsize=8)
        axes.set_yticks(ticks, classes, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{report.split}: {report.top1:.1f} % of {report.num_images} images right")
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    return figure


def _save(figure: Figure, path: Path) -> None:
    # Figure and canvas alone: pyplot would keep a list of figures for the whole process.
    FigureCanvasAgg(figure)
    with writing(path):
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
