"""The result of a run: report.json and the final table."""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vimtune import __version__
from vimtune.adapters import AdapterInfo
from vimtune.console import neutral, print_line
from vimtune.methods import resolve_options
from vimtune.ops import resolved_backend
from vimtune.recipe import Recipe
from vimtune.schema import STRICT, finite_json, finite_or_none, load_json
from vimtune.text import shorten
from vimtune.train.distributed import Processes
from vimtune.train.evaluate import Evaluation
from vimtune.train.folder import RunFolder, writing
from vimtune.train.state import Progress
from vimtune.train.tracking import duration
from vimtune.utils import atomic_write, processor_name

FORMAT = "vimtune report 1"
TABLE_WIDTH = 60
"""A narrower terminal shows the final table as a list."""
MOST_CONFUSED = 10
"""Pairs of classes that the report lists."""
SHOWN_CONFUSED = 3
"""Pairs of them that the final table shows."""
MAX_NAME = 40
"""Characters of a class name in the final table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a run, as in report.json. Accuracies are percent, times seconds, memory MiB.

    A number that could not be measured or is not finite is None.

    `top1`, `top5`, `loss` and `per_class` are scores of the saved adapter on `split`, which is
    "test" where the data set has one. The adapter is that of epoch `best_epoch`, chosen by
    its `best_top1` on `selection_split`; `last_top1` is the last epoch's score there. When
    `selection_split` and `split` are the same, the choice makes `top1` optimistic.
    `images_per_second` counts training alone, over all processes. `backend` is the scan backend that
    really ran, `cuda_graph` whether batches were replayed (in the run's last session, if it was resumed).
    `data` says for each split which images were used. `top5` is None for five classes or fewer.
    `most_confused` lists pairs of classes, the most frequent first: of the `of` images of the class `true`,
    `images` were taken for the class `predicted`. `recipe` holds the settings of the run.
    """

    __pydantic_config__ = STRICT

    format: str
    top1: float
    top5: float | None
    loss: float | None
    per_class: dict[str, float | None]
    most_confused: list[dict[str, Any]]
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
    peak_memory: float | None
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
    recipe: dict[str, Any]
    history: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in report.json."""
        return finite_or_none(dataclasses.asdict(self))


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
    memory: tuple[float | None, str],
    cuda_graph: bool,
    run_dir: Path,
) -> Report:
    """The report of a run that stands at `progress` and whose saved adapter reached `scores` on `split`."""
    return Report(
        format=FORMAT,
        top1=scores.top1,
        top5=scores.top5,
        loss=scores.loss,
        per_class=dict(zip(classes, scores.per_class, strict=True)),
        most_confused=most_confused(scores.confusion, classes),
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
        recipe=recipe.to_dict(),
        history=progress.history,
    )


def most_confused(confusion: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of classes with the most wrong answers, as `Report.most_confused` lists them.

    Args:
        confusion: counts of images by true class and answer, (C, C).
        classes: C names.
    """
    wrong = confusion - confusion.diag().diag()
    order = wrong.flatten().sort(descending=True, stable=True).indices[:MOST_CONFUSED]
    pairs = [divmod(place, len(classes)) for place in order.tolist()]
    return [
        {
            "true": classes[true],
            "predicted": classes[predicted],
            "images": int(wrong[true, predicted]),
            "of": int(confusion[true].sum()),
        }
        for true, predicted in pairs
        if wrong[true, predicted] > 0
    ]


def describe_method(info: AdapterInfo) -> dict[str, Any]:
    """Where an adapter acts, and every field of its methods, defaults included."""
    return {"targets": info.targets, "layers": info.layers, **resolve_options(info.method, info.options)}


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    return {
        "vimtune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "torchvision": version("torchvision"),
    }


def peak_memory(device: torch.device) -> tuple[float | None, str]:
    """Most memory used so far in MiB, and whose: the GPU's allocations, or this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "GPU allocations"
    if sys.platform == "win32":
        return None, "not measured on Windows"
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10), "process"


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


def read_report(folder: RunFolder) -> Report | None:
    """The report in a run folder; None where there is none, or not one that this version writes."""
    try:
        return load_json(Report, folder.report.read_text(encoding="utf-8"), str(folder.report))
    except (OSError, ValueError):
        return None


def print_report(report: Report, console: Console) -> None:
    """The final table; where a terminal is too narrow for it, a list."""
    rows = _rows(report)
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


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield f"top-1 ({report.split})", f"{report.top1:.2f} %"
    none = f"not counted: there are only {report.num_classes} classes"
    yield f"top-5 ({report.split})", none if report.top5 is None else f"{report.top5:.2f} %"
    early = ", stopped early" if report.stopped_early else ""
    best = f"{report.selection_split} top-1 {report.best_top1:.2f} %"
    yield "best epoch", f"{report.best_epoch} of {report.epochs}{early} ({best})"
    trained, total = report.trainable_parameters, report.total_parameters
    yield "trainable parameters", f"{trained:,} of {total:,} ({100.0 * trained / total:.2f} %)"
    yield "training speed", f"{report.images_per_second:.0f} img/s"
    memory = "" if report.peak_memory is None else f"{report.peak_memory:.0f} MiB "
    yield "peak memory", f"{memory}({report.peak_memory_of})"
    yield "time", duration(report.seconds)
    yield "model, method", f"{report.model}, {report.method}"
    graph = ", CUDA graph" if report.cuda_graph else ""
    yield "device, backend", f"{report.device}, {report.backend}{graph}"
    yield "data", report.data[report.split]
    title = "most confused"
    for pair in report.most_confused[:SHOWN_CONFUSED]:
        true, predicted = shorten(pair["true"], MAX_NAME), shorten(pair["predicted"], MAX_NAME)
        yield title, f"{true} taken for {predicted}: {pair['images']} of {pair['of']}"
        title = ""
