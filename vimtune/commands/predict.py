"""Answers for a user's images or texts, with an adapter file that knows its task, model, head and classes.

    predictor = load_predictor("runs/my-run/adapter.safetensors")
    for prediction in predictor.predict(["flower.jpg"], top_k=3):
        print(prediction.path, prediction.classes[0], prediction.probabilities[0])

What is done with an input belongs to the task that the adapter was trained on (`Task.read_inputs`,
`Task.open_predictor`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vimtune.adapters import read_adapter_info
from vimtune.models.merged import is_merged_file, read_merged_info
from vimtune.output import check_output
from vimtune.runtime.device import resolve_device
from vimtune.tasks import TASKS, Task
from vimtune.tasks.answers import FORMATS, Answer, print_answers, write_answers
from vimtune.tasks.origin import adapter_path, given_base, task_of
from vimtune.tasks.predictor import LeftOut, Predictor
from vimtune.text import counted, printable, quote

logger = logging.getLogger(__name__)


def load_predictor(
    adapter: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    force: bool = False,
) -> Predictor:
    """Build everything that an adapter file (or run folder), or a merged file, describes.

    Args:
        adapter: the file, or the folder of a run.
        checkpoint: base weights of the adapter; those it was trained on if None.
        model: the base model of an adapter of texts, where it is in another place now.
        tokenizer: the same of its tokenizer.
        device: "auto", "cpu", "cuda", "cuda:<index>" or "mps".
        backend: scan backend, see `vimtune.ops`.
        force: use the adapter although the base weights differ from those that it was trained on.

    Returns:
        A predictor of the task: `vimtune.tasks.images.predictor.ImagePredictor`, or for texts
        `ChoicePredictor` or `CompletionPredictor` of `vimtune.tasks.text.predictor`.

    Raises:
        ValueError: no such file, base weights that are missing or others than it was trained on, parts that
            do not fit together, or a device or backend that is not there.
    """
    path = adapter_path(adapter)
    base = given_base(checkpoint, model, tokenizer)
    task, _ = _task_and_classes(path)
    return task.open_predictor(path, base, resolve_device(device), backend, force)


def _task_and_classes(path: Path) -> tuple[Task, list[str]]:
    """The task of an adapter file or a merged file, and the names of its classes."""
    if is_merged_file(path):
        return TASKS.get(read_merged_info(path).task)(), []
    info = read_adapter_info(path)
    return task_of(info), info.classes


def run_predict(
    *,
    inputs: Sequence[str],
    adapter: Path,
    options: Mapping[str, Any],
    outputs: Sequence[Path],
    base: Mapping[str, Any],
    device: str,
    backend: str,
    force: bool,
) -> int:
    """`vimtune predict`: write the files asked for, print a table. Returns the exit code.

    The files come first, so that no trouble with the terminal can lose them. When the run is interrupted or
    fails between two inputs, they hold what is known by then.

    Args:
        inputs: what is asked about; the task says what that may be.
        adapter: an adapter file, a run folder or a merged file.
        options: values of the task's `predict_options`, as flags give them.
        outputs: .csv or .json files.
        base: keys of the recipe that say where the base weights are now, or None.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
        force: use the adapter although base weights or tokenizer are others.

    Raises:
        ValueError: an input, an option, the model or the adapter does not allow it, or a file cannot be
            written.
    """
    from vimtune.console import build_console, print_line  # `load_predictor` prints nothing.

    path = adapter_path(adapter)
    for output in outputs:
        check_output(output, FORMATS, _files([*inputs, path, base.get("checkpoint")]))
    task, classes = _task_and_classes(path)
    chosen = task.predict_options.build(options, f"predictions of task {quote(task.name)}")
    asked = task.read_inputs(inputs, classes)
    predictor = task.open_predictor(path, given_base(**base), resolve_device(device), backend, force)
    nouns = f"{predictor.kind.noun}s"
    left_out: list[LeftOut] = []
    answers: list[Answer] = []
    try:
        for answer in predictor.answers(asked, chosen, left_out.append):
            answers.append(answer)
    except BaseException as error:  # Ctrl-C is among these, too.
        if answers and outputs and not isinstance(error, predictor.all_or_nothing):
            _write_all(outputs, answers, predictor)
            logger.warning(
                "stopped after %d of %s; those are written",
                len(answers),
                counted(len(asked), nouns),
            )
        raise
    _write_all(outputs, answers, predictor)
    for missing in left_out:
        logger.warning("left out %s: %s", printable(missing.name), printable(missing.reason))
    console = build_console(is_result=not outputs)
    print_answers(answers, predictor.kind, console)
    for output in outputs:
        print_line(console, f"{counted(len(answers), 'predictions')} written to {output}")
    if left_out:
        logger.warning("%d of %s could not be read", len(left_out), counted(len(asked), nouns))
    passed_over = answers and all(missing.accepted for missing in left_out)
    return 1 if left_out and not passed_over else 0


def _files(names: Sequence[str | Path | None]) -> list[Path]:
    """What among arguments is a file or a folder; others may be texts."""
    return [Path(name) for name in names if name is not None and os.path.exists(name)]


def _write_all(outputs: Sequence[Path], answers: Sequence[Answer], predictor: Predictor) -> None:
    for output in outputs:
        write_answers(output, answers, predictor.kind)
