"""What was measured of the methods: rows of benchmarks/RESULTS.md, and scores from benchmarks/results/*.csv.

A file of scores has a line for each run, with the columns `method`, `data`, `lr` and `seed`, the score on the
images or texts that chose the learning rate (`val` or `val_acc`), that on the test split (`test` or `acc`,
in percent) and, if there were several, the `model`.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown.extensions.toc import slugify
from markdown_tables import Table, read_tables, write_table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
"""Where results lie."""
TEST, CHOOSING = ("test", "acc"), ("val", "val_acc")
"""Columns of scores: on the test split, and on what the learning rate was chosen by."""
Run = dict[str, str]
"""A line of a file."""


COST = "All methods side by side"
"""The section of RESULTS.md that has what every method costs."""


@dataclass(frozen=True)
class Scores:
    """The scores of a file, of one model if it has several."""

    path: Path
    """The file."""
    title: str
    """What it is about."""
    by_method: dict[str, dict[str, list[float]]]
    """Method -> data set -> scores of the seeds in percent."""

    @property
    def data(self) -> list[str]:
        """The data sets in the order of the file."""
        return list(dict.fromkeys(name for found in self.by_method.values() for name in found))

    def cells(self, method: str) -> list[str]:
        """What the line of a method has, by data set."""
        return [_shown(self.by_method[method].get(name, ())) for name in self.data]


def all_scores() -> str:
    """A table for each file and model."""
    parts = []
    for scores in read_scores():
        rows = [[f"`{method}`", *scores.cells(method)] for method in scores.by_method]
        address = f"benchmarks/results/{scores.path.name}"
        parts += [
            f"## {scores.title}",
            f"From [{address}]({address}).",
            write_table(["method", *scores.data], rows),
        ]
        for picture in sorted(scores.path.parent.glob(f"{scores.path.stem}*.png")):
            parts.append(f"![{picture.stem}](benchmarks/results/{picture.name})")
    return "\n\n".join(parts)


def about(method: str) -> str:
    """What was measured of one method, as tables; empty if nothing was."""
    parts = []
    cost = _cost()
    for row in cost.rows:
        if row[0] == method:
            parts.append(f"What it costs, from [{cost.title}](benchmarks/RESULTS.md#{cost.anchor}):")
            parts.append(write_table(cost.header[1:], [row[1:]]))
    for scores in read_scores():
        if method in scores.by_method:
            parts.append(f"[{scores.title}](evidence.md#{slugify(scores.title, '-')}), top-1 in %:")
            parts.append(write_table(scores.data, [scores.cells(method)]))
    return "\n\n".join(parts)


@cache
def read_scores() -> tuple[Scores, ...]:
    """The scores of all files; other files of results are left out."""
    return tuple(_read_scores())


def _read_scores() -> Iterator[Scores]:
    for path in sorted((BENCHMARKS / "results").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        columns = lines[0].keys() if lines else ()
        test = next((name for name in TEST if name in columns), None)
        choosing = next((name for name in CHOOSING if name in columns), None)
        if test is None or choosing is None or not {"method", "data", "lr", "seed"} <= set(columns):
            continue
        for model in dict.fromkeys(line.get("model") for line in lines):
            runs = [line for line in lines if line.get("model") == model and line[test] and line[choosing]]
            title = ", ".join(filter(None, [path.stem.replace("_", " ").capitalize(), model]))
            yield Scores(path, title, _by_method(runs, test, choosing))


def _by_method(runs: Sequence[Run], test: str, choosing: str) -> dict[str, dict[str, list[float]]]:
    """The test scores at the learning rate that is best on what chooses it, which the first seed decides."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault(run["method"], {}).setdefault(run["data"], []).append(run)
    return {
        method: {data: _at_the_best_rate(same, test, choosing) for data, same in by_data.items()}
        for method, by_data in found.items()
    }


def _at_the_best_rate(runs: Sequence[Run], test: str, choosing: str) -> list[float]:
    first = min(int(run["seed"]) for run in runs)
    best = max((run for run in runs if int(run["seed"]) == first), key=lambda run: float(run[choosing]))
    return [float(run[test]) for run in runs if run["lr"] == best["lr"]]


def _shown(scores: Sequence[float]) -> str:
    """Mean and standard deviation of the seeds; of one seed the score, with a star."""
    if not scores:
        return "-"
    if len(scores) == 1:
        return f"{scores[0]:.1f}*"
    return f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"


@cache
def _cost() -> Table:
    tables = read_tables((BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8"))
    return next(table for table in tables if table.title == COST)
