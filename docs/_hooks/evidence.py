"""What was measured of the methods: rows of benchmarks/RESULTS.md, and scores from benchmarks/results/*.csv.

A file of scores has a line for each run, with the columns `method`, `data`, `lr` and `seed`, the score on the
images or texts that chose the learning rate (`val` or `val_acc`), that on the test split (`test` or `acc`,
in percent; empty in all lines where the test stayed closed) and, if there were several, the `model`. `chosen`
says whether a line has the learning rate that was chosen; without it the first seed has chosen. Beside
NAME.csv may lie NAME_paired.csv, whose first lines have the differences from the method that all others are
compared with, and pictures.
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
TRAINED = ("parameters", "trained")
"""Columns with the numbers that are trained beside the head."""
PICTURES = ("{}.png", "{}_paired.png")
"""Pictures that may lie beside the file of this name."""
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
    trained: dict[str, str]
    """Method -> how many numbers it trains beside the head, where the file says so."""

    @property
    def data(self) -> list[str]:
        """The data sets in the order of the file."""
        return list(dict.fromkeys(name for found in self.by_method.values() for name in found))

    def cells(self, method: str) -> list[str]:
        """What the line of a method has, by data set."""
        return [_shown(self.by_method[method].get(name, ())) for name in self.data]

    def mean(self, method: str) -> str:
        """The mean of a method over all data sets."""
        found = [self.by_method[method].get(name) for name in self.data]
        means = [statistics.mean(scores) for scores in found if scores]
        return f"{statistics.mean(means):.1f}" if len(means) == len(found) else "-"


def all_scores() -> str:
    """A table for each file and model."""
    parts = []
    for scores in read_scores():
        rows = [
            [f"`{method}`", *scores.cells(method), scores.mean(method), scores.trained.get(method, "-")]
            for method in scores.by_method
        ]
        address = f"benchmarks/results/{scores.path.name}"
        parts += [
            f"## {scores.title}",
            f"From [{address}]({address}).",
            write_table(["method", *scores.data, "mean", "trained"], rows),
            *_differences(scores.path.with_name(f"{scores.path.stem}_paired.csv")),
        ]
        for name in (form.format(scores.path.stem) for form in PICTURES):
            if scores.path.with_name(name).exists():
                parts.append(f"![{Path(name).stem}](benchmarks/results/{name})")
    return "\n\n".join(parts)


def _differences(path: Path) -> Iterator[str]:
    """The table of all differences from the method with which the first line of a file compares."""
    if not path.exists():
        return
    lines = _read(path)
    if not lines or not any(line["standard_error"] for line in lines):
        return
    against = lines[0]["against"]
    own = [line for line in lines if line["against"] == against]
    data = list(dict.fromkeys(line["data"] for line in own))
    by_method: dict[str, dict[str, Run]] = {}
    for line in own:
        by_method.setdefault(line["method"], {})[line["data"]] = line
    yield (
        f"Differences from `{against}` in points: means over pairs of runs with the same seed, ± their "
        "standard error. A mean over the data sets of less than two standard errors may be chance."
    )
    heading = ["method", *(name or "mean" for name in data), *(["in standard errors"] if "" in data else [])]
    yield write_table(
        heading,
        [
            [
                f"`{method}`",
                *(_difference(found.get(name)) for name in data),
                *([_in_errors(found.get(""))] if "" in data else []),
            ]
            for method, found in by_method.items()
        ],
    )


def _difference(line: Run | None) -> str:
    if line is None:
        return "-"
    error = f" ± {float(line['standard_error']):.2f}" if line["standard_error"] else ""
    return f"{float(line['difference']):+.2f}{error}"


def _in_errors(line: Run | None) -> str:
    if line is None or not float(line["standard_error"] or 0):
        return "-"
    return f"{float(line['difference']) / float(line['standard_error']):+.1f}"


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
        lines = _read(path)
        columns = lines[0].keys() if lines else ()
        test = next((name for name in TEST if name in columns), None)
        choosing = next((name for name in CHOOSING if name in columns), None)
        if test is None or choosing is None or not {"method", "data", "lr", "seed"} <= set(columns):
            continue
        closed = not any(line[test] for line in lines)
        for model in dict.fromkeys(line.get("model") for line in lines):
            runs = [line for line in lines if line.get("model") == model and line[choosing]]
            split = "validation split" if closed else None
            title = ", ".join(filter(None, [path.stem.replace("_", " ").capitalize(), model, split]))
            by_method = _by_method(runs, choosing if closed else test, choosing)
            yield Scores(path, title, by_method, _trained(runs))


def _read(path: Path) -> list[Run]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _by_method(runs: Sequence[Run], test: str, choosing: str) -> dict[str, dict[str, list[float]]]:
    """The test scores at the learning rate that is best on what chooses it, which the first seed decides."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault(run["method"], {}).setdefault(run["data"], []).append(run)
    return {
        method: {data: _at_the_best_rate(same, test, choosing) for data, same in by_data.items()}
        for method, by_data in found.items()
    }


def _trained(runs: Sequence[Run]) -> dict[str, str]:
    """How many numbers each method trains beside the head: on data sets that give it several sizes, all."""
    column = next((name for name in TRAINED if runs and name in runs[0]), None)
    sizes: dict[str, dict[int, None]] = {}
    for run in runs if column is not None else ():
        if run[column]:
            sizes.setdefault(run["method"], {})[int(run[column])] = None
    return {method: ", ".join(f"{size:,}" for size in found) for method, found in sizes.items()}


def _at_the_best_rate(runs: Sequence[Run], test: str, choosing: str) -> list[float]:
    chosen = [run for run in runs if run.get("chosen") == "True"]
    if "chosen" not in runs[0]:
        first = min(int(run["seed"]) for run in runs)
        best = max((run for run in runs if int(run["seed"]) == first), key=lambda run: float(run[choosing]))
        chosen = [run for run in runs if run["lr"] == best["lr"]]
    return [float(run[test]) for run in chosen if run[test]]


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
