"""The end of a run: the result first, then what decorates it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from vimtune.files import OutputError, atomic_write_text
from vimtune.pages import style
from vimtune.pages.page import Page
from vimtune.pages.section import Picture, Section
from vimtune.run_folder import RunFolder, writing
from vimtune.tasks.details import Details
from vimtune.tasks.job import Outcome
from vimtune.tasks.report import Report
from vimtune.text import shorten
from vimtune.training import pictures
from vimtune.training.logs import MAX_REASON, Logs
from vimtune.training.report import print_report, write_report
from vimtune.training.tracking import Tracker

Files = Mapping[str, Callable[[Path], None]]
"""Names of files in the run folder, and functions that write them."""


def conclude(
    report: Report,
    outcome: Outcome,
    details: Details,
    files: Files,
    folder: RunFolder,
    tracker: Tracker,
    logs: Logs,
) -> Report:
    """Write, draw and print the result of a run, and close its tracker and its loggers.

    report.json comes first, and with it the run is finished: when something after it fails, only that
    is missing, and a warning says why.

    Args:
        report: the result.
        outcome: what it was made from.
        details: what the page says beyond the scores.
        files: what the task adds to the run folder: names of files, and functions that write them.
        folder: that of the run.
        tracker: shows the report.
        logs: get the final scores.

    Returns:
        The report with these warnings, as the file has it.

    Raises:
        OutputError: report.json cannot be written.
    """
    write_report(report, folder)
    told = len(report.warnings)
    problems = list(_decorate(report, outcome, details, files, folder))
    tracker.close()
    scores = final_scores(report, outcome)
    problems += _attempt("final scores in the logs", lambda: logs.write_result(scores, report.steps))
    logs.close()
    if problems or len(report.warnings) > told:  # loggers have warned of themselves
        report = dataclasses.replace(report, warnings=[*report.warnings, *problems])
        problems += _attempt("warnings about it in report.json", lambda: write_report(report, folder))
    for problem in problems:
        tracker.message(f"warning: {problem}")
    for problem in _attempt("final table", lambda: print_report(report, tracker.console)):
        tracker.message(f"warning: {problem}")
    return report


def final_scores(report: Report, outcome: Outcome) -> dict[str, float | None]:
    """The scores by which the tables of loggers compare runs."""
    found, selected = outcome.evaluation, outcome.task.scores[:1]
    final = {f"final/{report.split}_{name}": value for name, value in found.scores.items()}
    best = {f"final/best_{report.selection_split}_{s.name}": outcome.best[s.name] for s in selected}
    return {**final, f"final/{report.split}_loss": found.loss, **best}


def _decorate(
    report: Report, outcome: Outcome, details: Details, files: Files, folder: RunFolder
) -> Iterator[str]:
    """Do everything that is not the result itself; yield a line for each part that did not succeed."""

    def draw_curve(path: Path) -> None:
        score = outcome.task.scores[0] if outcome.task.scores else None
        style.save_picture(pictures.draw_learning_curve(report, score), path)

    paths = {folder.path / name: make for name, make in files.items()} | {folder.learning_curve: draw_curve}
    for path, make in paths.items():
        if report.recipe["pictures"] or path.suffix != pictures.SUFFIX:
            yield from _attempt(path.name, partial(_renew, path, make))
    if report.recipe["pictures"]:
        write_page = partial(_write_page, report=report, details=details, folder=folder)
        yield from _attempt(folder.page.name, partial(_renew, folder.page, write_page))


def _write_page(path: Path, report: Report, details: Details, folder: RunFolder) -> None:
    """Write the result as one page, with the pictures that were drawn before."""
    curve = Section(
        title="Learning curve",
        explanation="Losses and the score by which the best epoch was chosen, epoch by epoch.",
        findings=[f"The best epoch is {report.best_epoch} of {report.epochs} ({report.selected_by()})."],
        numbers={},
        pictures=[Picture("The dotted line marks the best epoch.", folder.learning_curve)],
    )
    sections = [curve, *details.sections(folder.path).values()]
    rows = [*report.rows(), *(("warning", warning) for warning in report.warnings)]
    html = Page("vimtune train", f"{report.model}, {report.method}", rows, sections).to_html()
    with writing(path):
        atomic_write_text(path, html)


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
