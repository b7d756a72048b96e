"""The end of a run: the result first, then what decorates it."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from vimtune.text import csv_cell, printable, shorten
from vimtune.train import pictures
from vimtune.train.folder import OutputError, RunFolder, writing
from vimtune.train.identity import HARMLESS
from vimtune.train.report import Report, print_report, write_report
from vimtune.train.tracking import Tracker
from vimtune.utils import atomic_write

MAX_REASON = 400
"""Characters of somebody's error message that a warning repeats."""

NOT_COMPARED = frozenset(HARMLESS) - {"checkpoint", "pretrained"}
"""Settings without influence on the scores, which TensorBoard's table of runs leaves out."""


def conclude(
    report: Report, confusion: Tensor, classes: Sequence[str], folder: RunFolder, tracker: Tracker
) -> Report:
    """Write, draw and print the result of a run, and close its tracker.

    report.json comes first, and with it the run is finished: when something after it fails, only that
    is missing, and a warning says why.

    Args:
        confusion: counts of images by true class and answer, (C, C).
        classes: C names.

    Returns:
        The report with these warnings, as the file has it.

    Raises:
        OutputError: report.json cannot be written.
    """
    write_report(report, folder)
    problems = list(_decorate(report, confusion, classes, folder, tracker))
    tracker.close()
    if problems:
        report = dataclasses.replace(report, warnings=[*report.warnings, *problems])
        problems += _attempt("warnings about it in report.json", lambda: write_report(report, folder))
    for problem in problems:
        tracker.message(f"warning: {problem}")
    for problem in _attempt("final table", lambda: print_report(report, tracker.console)):
        tracker.message(f"warning: {problem}")
    return report


def write_confusion_table(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Counts of images as CSV: a row for each true class, a column for each answer."""
    names = [csv_cell(printable(name)) for name in classes]

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["number", "true class", *names])
            for number, (name, counts) in enumerate(zip(names, confusion, strict=True)):
                writer.writerow([number, name, *counts.tolist()])

    with writing(path):
        atomic_write(path, write)


def final_scores(report: Report) -> dict[str, float | None]:
    """The scores by which TensorBoard's table compares runs."""
    return {
        f"final/{report.split}_top1": report.top1,
        f"final/{report.split}_top5": report.top5,
        f"final/{report.split}_loss": report.loss,
        f"final/best_{report.selection_split}_top1": report.best_top1,
    }


def _decorate(
    report: Report, confusion: Tensor, classes: Sequence[str], folder: RunFolder, tracker: Tracker
) -> Iterator[str]:
    """Do everything that is not the result itself; yield a line for each part that did not succeed."""
    makers: dict[Path, Callable[[Path], None]] = {
        folder.confusion_table: lambda path: write_confusion_table(confusion, classes, path),
        folder.confusion_matrix: lambda path: pictures.save_picture(
            pictures.draw_confusion_matrix(confusion, classes, report), path
        ),
        folder.learning_curve: lambda path: pictures.save_picture(pictures.draw_learning_curve(report), path),
    }
    for path, make in makers.items():
        yield from _attempt(path.name, partial(_renew, path, make))
    settings = {name: value for name, value in report.recipe.items() if name not in NOT_COMPARED}
    yield from _attempt(
        "final scores in TensorBoard", lambda: tracker.record_result(settings, final_scores(report))
    )


def _renew(path: Path, make: Callable[[Path], None]) -> None:
    """Make the file `path`; one of an earlier session does not stay beside the new result."""
    path.unlink(missing_ok=True)
    make(path)


def _attempt(what: str, action: Callable[[], None]) -> Iterator[str]:
    """Call `action`; yield one line if it fails."""
    try:
        action()
    except Exception as error:  # whatever a drawing library raises, the result has been written
        reason = shorten(" ".join(str(error).split()), MAX_REASON)
        kind = "" if isinstance(error, OutputError) else f"{type(error).__name__}: "
        yield f"no {what}: {kind}{reason}"
