"""Soups: the average of the adapters of all seeds, scored as its parts are (Wortsman et al. 2022, arXiv
2203.05482).

The average is that of the weights (`vimtune.adapters.arithmetic`), and of the heads. It is kept in the folder
of the comparison with its scores, and made anew where an adapter has changed since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vimtune.commands.combine import combine_on
from vimtune.compare.plan import Cell
from vimtune.output import write_text
from vimtune.run_folder import RunFolder
from vimtune.runtime.distributed import open_processes
from vimtune.schema import STRICT, dump_json, load_json
from vimtune.training.evaluate import evaluate_trial
from vimtune.training.result import Result
from vimtune.training.settings import process_settings

SCORES = "scores.json"
"""Name of the file with the scores of a soup, beside its adapter."""


@dataclass(frozen=True)
class _Stored:
    """What the file of scores holds."""

    __pydantic_config__ = STRICT

    parts: dict[str, str]
    """The run folders of the parts, with digests of their adapters."""
    scores: dict[str, float | None]
    """Scores of the soup, and the loss."""


def soup_of(runs: Mapping[Cell, Result], folder: Path, make: bool) -> dict[str, float | None] | None:
    """The scores of the average of some runs, which differ by their seeds alone.

    Args:
        runs: two or more finished runs.
        folder: that of their comparison.
        make: whether the average is made and scored where that has not been done.

    Returns:
        Scores by name; None where there are none, and `make` is false.

    Raises:
        ValueError: the adapters do not average, as where each seed has drawn base weights of its own.
    """
    cells = sorted(runs, key=lambda cell: cell.seed)
    paths = [RunFolder(folder / cell.path).adapter for cell in cells]
    parts = {str(cell.path): _digest(path) for cell, path in zip(cells, paths, strict=True)}
    first = cells[0]
    draw = f"-data{first.data_seed}" if first.data_seed else ""
    own = folder / "soups" / first.data / f"{first.method}-lr{first.lr!r}{draw}"
    try:
        stored = load_json(_Stored, (own / SCORES).read_text(encoding="utf-8"), str(own / SCORES))
        if stored.parts == parts:
            return stored.scores
    except (OSError, ValueError):  # There is none yet, or one that somebody has changed.
        pass
    if not make:
        return None
    own.mkdir(parents=True, exist_ok=True)
    scores = _make(runs[first], paths, own / RunFolder(own).adapter.name)
    text = dump_json(_Stored, {"parts": parts, "scores": scores}, "the scores of a soup")
    write_text(own / SCORES, text + "\n")
    return scores


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make(result: Result, paths: Sequence[Path], output: Path) -> dict[str, float | None]:
    """Write the average of adapters and score it on the split on which its parts were."""
    recipe = result.recipe
    with (
        open_processes(recipe.run.device) as processes,
        process_settings(recipe.run, processes.device),
    ):
        options = recipe.task.evaluate_options(calibrate=False)
        trial = recipe.task.open_trial(recipe, processes, result.report.split, paths[0], options, False)
        try:
            combine_on(trial.model, paths, output, [1 / len(paths)] * len(paths))
            found, _ = evaluate_trial(trial, recipe, processes)
        finally:
            trial.close()
    return {**found.scores, "loss": found.loss}
