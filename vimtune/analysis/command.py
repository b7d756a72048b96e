"""`vimtune analyze` and its function: what training has done to a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vimtune.analysis.registry import ANALYSES, NUM_BATCHES, NUM_IMAGES, load_analysis, parse_names
from vimtune.analysis.report import FORMATS, AnalysisReport
from vimtune.analysis.subject import NotApplicable, Subject, open_subject
from vimtune.commands.evaluate import check_split
from vimtune.console import build_console, print_line
from vimtune.output import check_output
from vimtune.pages.section import Section
from vimtune.tasks.origin import adapter_path
from vimtune.tasks.predictor import check_counts

NAME = "analysis"
"""Name, without ending, of the files beside the adapter, where no other place is given."""


def run_analyze(
    *,
    trained: Path,
    names: Sequence[str],
    values: Mapping[str, Any],
    split: str,
    num_images: int,
    num_batches: int,
    outputs: Sequence[Path],
) -> int:
    """Analyse a trained model; returns the exit code.

    Args:
        trained: a run folder, an adapter file or a merged file.
        names: which analyses of `vimtune.analysis.registry`.
        values: keys of the recipe, as flags give them.
        split: "test" or "val", from which images are taken.
        num_images: at most so many images.
        num_batches: at most so many training batches.
        outputs: .html and .json files; two files beside the adapter if there are none.

    Raises:
        ValueError: the file, the data or the settings do not allow it, or a file cannot be written.
    """
    check_split(split)
    path = adapter_path(trained)
    files = list(outputs) or [path.with_name(f"{NAME}{suffix}") for suffix in FORMATS]
    for file in files:
        check_output(file, FORMATS, [path])
    console = build_console(is_result=False)
    with open_subject(path, values, split=split, num_images=num_images, num_batches=num_batches) as subject:
        report = run_analyses(subject, names, lambda name: print_line(console, f"{name} ..."))
    for file in files:
        report.save(file)
    for section in report.sections.values():
        print_line(console, section.title)
        for finding in section.findings:
            print_line(console, f"  {finding}")
    for name, why in report.left_out.items():
        print_line(console, f"left out: {name}: {why}")
    for file in files:
        print_line(console, f"report written to {file}")
    return 0


def analyze(
    trained: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    split: str = "test",
    num_images: int = NUM_IMAGES,
    num_batches: int = NUM_BATCHES,
    **keys: Any,
) -> AnalysisReport:
    """Compare a trained model with what training found: weights, features, scans, cost.

    Args:
        trained: a run folder, an adapter file, or a merged file (of which `keys` name the data).
        only: names of analyses, such as ["similarity", "scan_maps"]; all of them if None.
        split: "test" or "val", from which images are taken.
        num_images: at most so many images.
        num_batches: at most so many training batches.
        **keys: keys of the recipe that are to be others than those of the run, such as `data_dir`.

    Returns:
        A section for each analysis, which a notebook shows as it is on the page of `vimtune analyze`.

    Raises:
        ValueError: the file, the data or the settings do not allow it, or there is no such analysis.
    """
    check_split(split)
    check_counts(num_images=num_images, num_batches=num_batches)
    names = list(ANALYSES) if only is None else parse_names(",".join(only))
    path = adapter_path(trained, "trained")
    with open_subject(path, keys, split=split, num_images=num_images, num_batches=num_batches) as subject:
        return run_analyses(subject, names)


def run_analyses(
    subject: Subject, names: Sequence[str], tell: Callable[[str], None] = lambda name: None
) -> AnalysisReport:
    """Run analyses by name on a subject.

    Args:
        subject: the model before and after training, with data.
        names: which analyses of `vimtune.analysis.registry`.
        tell: called with the name of each before it begins.
    """
    sections: dict[str, Section] = {}
    left_out: dict[str, str] = {}
    for name in names:
        tell(name)
        try:
            sections[name] = load_analysis(name)(subject)
        except NotApplicable as reason:
            left_out[name] = str(reason)
    return AnalysisReport(subject.facts, sections, left_out)
