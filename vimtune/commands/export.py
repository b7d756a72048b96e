"""`vimtune export`: a model for programs that do without vimtune, checked before the file is kept.

What is written belongs to the task (`Task.export`), how to the format (`vimtune.export`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vimtune import parsers
from vimtune.adapters import AdapterFileError, read_adapter_info
from vimtune.console import build_console, print_line
from vimtune.models import MODELS
from vimtune.models.merged import is_merged_file, read_merged_info
from vimtune.recipe import TASK
from vimtune.tasks import TASKS, Task
from vimtune.tasks.exporting import Exported
from vimtune.tasks.origin import adapter_path, given_base, task_of
from vimtune.text import quote


def export_to_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Exported:
    """Write a model as ONNX or for torch.export, and check that the file computes what the model does.

    The file takes preprocessed images (B, channels, height, width) for any B and gives logits (B, classes),
    and says in its metadata how images are prepared and what the classes are called. An adapter is merged
    first; one that cannot be merged becomes part of the graph.

    Args:
        source: an adapter file, a run folder, a merged file, or a plain checkpoint of `model`.
        output: the file, `.onnx` or `.pt2`.
        model: the model of a plain checkpoint. Other files name theirs, and it has to be this one if given.
        checkpoint: base weights of an adapter; those it was trained on if None.
        force: use the adapter although the base weights differ from those that it was trained on.

    Raises:
        ValueError: the model cannot be loaded or exported, `output` cannot be written, or a package is
            missing.
        MergeError: the merged model computes something else than base and adapter.
        ExportError: the file computes something else than the model; nothing is left behind.
    """
    path = adapter_path(source, "source")
    stated = _stated(path, model)
    if stated is None:
        task: Task = TASKS.get(TASK.default)()
    else:
        task, own = stated
        if model is not None and own is not None:
            _demand_same(path, own, model)
            model = None
    target = parsers.given_path("output", output, "the file to write")
    return task.export(path, target, given_base(checkpoint, model), force)


def _stated(path: Path, model: str | None) -> tuple[Task, str | None] | None:
    """The task of an adapter file or a merged file and the name of its model, if it has one of images; None
    for a plain checkpoint, which says nothing of the kind, so that `model` is its model.

    Raises:
        ValueError: no such file, or one of neither kind and no `model`.
    """
    if is_merged_file(path):
        merged = read_merged_info(path)
        return TASKS.get(merged.task)(), merged.model
    try:
        info = read_adapter_info(path)
    except AdapterFileError as error:
        if not path.is_file():
            raise
        if model is not None:
            return None
        raise AdapterFileError(f"{error} (of a plain checkpoint give the model, with --model)") from error
    return task_of(info), info.model["name"] if info.model else None


def _demand_same(path: Path, own: str, given: str) -> None:
    """Raise ValueError unless the model that a file names is the one that is given."""
    if MODELS.get(own).architecture != MODELS.get(MODELS.parse(given)).architecture:
        raise ValueError(
            f"{quote(str(path))} holds a {own}, and --model is {quote(given)}: leave --model out, which is "
            "for plain checkpoints"
        )


def run_export(*, source: Path, output: Path, **options: Any) -> int:
    """`vimtune export`: write the file, print what the check has found. Returns the exit code.

    Args:
        source, output, **options: those of `export_to_file`.
    """
    exported, console = export_to_file(source, output, **options), build_console()
    print_line(console, f"{exported.model} written to {output}")
    if exported.left_beside is not None:
        print_line(console, f"the adapter is part of the graph: {exported.left_beside}")
    print_line(
        console,
        f"maximum logit error {exported.max_error:.1e} on {exported.inputs} (largest logit "
        f"{exported.max_logit:.1f}), the file against PyTorch",
    )
    print_line(
        console,
        f"{exported.size / 1e6:.1f} MB, {exported.size / exported.weights:.2f} times the weights; "
        f"{1e3 * exported.seconds:.0f} ms for one image on this CPU, PyTorch "
        f"{1e3 * exported.seconds_before:.0f} ms",
    )
    return 0
