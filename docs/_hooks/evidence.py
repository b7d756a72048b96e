"""What was measured of the methods: rows of benchmarks/RESULTS.md, and scores from benchmarks/results/*.csv.

A file of scores has a line for each run, with the columns `method`, `data`, `lr` and `seed`, the score on the
images or texts that chose the learning rate (`val` or `val_acc`), that on the test split (`test` or `acc`,
in percent; empty in all lines where the test stayed closed) and, if there were several, the `model`. `chosen`
says whether a line has the learning rate that was chosen; without it the first seed has chosen. Beside
NAME.csv may lie NAME_paired.csv with the differences between any two methods, whose first lines have those
from the method that all others are compared with, and pictures. The plan of the comparison is the one in
benchmarks/ whose command writes to runs/NAME; what its comments say are the conditions.
"""

from __future__ import annotations

import csv
import re
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
PICTURES = {
    "{}.png": "Score and standard deviation of each method; where their sizes differ, over the trained "
    "numbers, and the line joins the methods than which no other one is better with as few. Scores far "
    "behind all others stand at the edge.",
    "{}_paired.png": "Differences from one method: the mean over the data sets with its standard error, and "
    "a mark for each data set.",
}
"""Pictures that may lie beside the file of this name, and what they show."""
Run = dict[str, str]
"""A line of a file."""
NONE = "-"
"""What a cell has where there is nothing."""


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
    seeds: list[int]
    """The seeds of the runs."""
    devices: list[str]
    """What the runs were made on, where the file says so."""

    @property
    def data(self) -> list[str]:
        """The data sets in the order of the file."""
        return list(dict.fromkeys(name for found in self.by_method.values() for name in found))

    def cells(self, method: str) -> list[str]:
        """What the line of a method has, by data set."""
        return [_shown(self.by_method[method].get(name, ())) for name in self.data]

    def mean(self, method: str, data: Sequence[str] | None = None) -> float | None:
        """The mean of a method over data sets, by default all; None where it has no score on one of them."""
        found = [self.by_method[method].get(name) for name in data or self.data]
        means = [statistics.mean(scores) for scores in found if scores]
        return statistics.mean(means) if len(means) == len(found) else None

    @property
    def ranked(self) -> list[str]:
        """The methods, the best mean first; those that have none come last, in the order of the file."""
        return sorted(self.by_method, key=lambda method: -(self.mean(method) or 0))

    @property
    def link(self) -> str:
        """A link to the section about it on the page of scores."""
        return f"[{self.title}](#{slugify(self.title, '-')})"


def all_scores() -> str:
    """A section with a table for each file and model."""
    parts = []
    for scores in read_scores():
        address = f"benchmarks/results/{scores.path.name}"
        subject, notes = conditions(scores.path.stem)
        parts += [
            f"## {scores.title}",
            *subject,
            _table(scores),
            *_differences(scores.path.stem),
        ]
        for form, caption in PICTURES.items():
            name = form.format(scores.path.stem)
            if scores.path.with_name(name).exists():
                parts.append(f"![{Path(name).stem}](benchmarks/results/{name})\n*{caption}*")
        where = f", on {', '.join(scores.devices)}" if scores.devices else ""
        seeds = ", ".join(map(str, scores.seeds))
        runs = f"All runs: [{address}]({address}); seeds {seeds}{where}."
        parts.append("\n".join(["Conditions:", "", *(f"- {note}" for note in (runs, *notes))]))
    return "\n\n".join(parts)


def _table(scores: Scores) -> str:
    """Methods by data sets, the best mean first; the best scores are bold."""
    rows = []
    for method in scores.ranked:
        mean = scores.mean(method)
        shown = [*scores.cells(method), NONE if mean is None else f"{mean:.1f}"]
        rows.append([f"`{method}`", *shown, scores.trained.get(method, NONE)])
    for column in range(1, len(scores.data) + 2):
        values = [float(row[column].split()[0].rstrip("*")) for row in rows if row[column] != NONE]
        for row in rows:
            if row[column] != NONE and float(row[column].split()[0].rstrip("*")) == max(values):
                row[column] = f"**{row[column]}**"
    return write_table(["method", *scores.data, "mean", "trained"], rows)


def conditions(stem: str) -> tuple[list[str], list[str]]:
    """What the plan of a comparison says about it: its subject, and what else its comments have; nothing
    where no plan is the one of this file."""
    path = next(
        (
            path
            for path in sorted(BENCHMARKS.glob("*.yaml"))
            if re.search(rf"-o runs/{re.escape(stem)}$", path.read_text(encoding="utf-8"), re.M)
        ),
        None,
    )
    if path is None:
        return [], []
    return plan_comments(path.read_text(encoding="utf-8"))


def plan_comments(text: str) -> tuple[list[str], list[str]]:
    """The comments at the top of a plan: its subject, and a note for each further paragraph.

    A paragraph begins one space behind the `#`, and its further lines stand further in. One that begins with
    "Command:" has a command on each line; a line of more flags goes on with the one before it.
    """
    comments = [line[1:] for line in text.partition("\n\n")[0].splitlines() if line.startswith("#")]
    paragraphs: list[list[str]] = []
    for comment in comments:
        if not comment.startswith("  "):
            paragraphs.append([])
        paragraphs[-1].append(comment.strip())
    subject, *others = paragraphs
    return [" ".join(subject)], [_note(lines) for lines in others]


def _note(lines: Sequence[str]) -> str:
    """A paragraph of comments on one line; commands are code."""
    kind, colon, first = lines[0].partition(": ")
    if kind == "Command":
        commands = re.sub(r"\n(?=-)", " ", "\n".join((first, *lines[1:]))).splitlines()
        return f"{kind}: " + ", then ".join(f"`{command.strip()}`" for command in commands)
    return " ".join((kind + colon + first.strip(), *lines[1:]))


def differences(stem: str) -> list[Run]:
    """The lines of a file with the differences between any two methods; none where there is no such file."""
    path = BENCHMARKS / "results" / f"{stem}_paired.csv"
    return _read(path) if path.exists() else []


def _differences(stem: str) -> Iterator[str]:
    """The table of all differences from the method with which the first line of a file compares."""
    lines = differences(stem)
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
        "standard error. A mean over the data sets of less than two standard errors may be chance; so may a "
        "larger one where there are many methods (about one of 14 with three seeds and five data sets)."
    )
    heading = ["method", *(name or "mean" for name in data), *(["in standard errors"] if "" in data else [])]
    ranked = sorted(by_method, key=lambda method: -float(by_method[method].get("", {}).get("difference", 0)))
    yield write_table(
        heading,
        [
            [
                f"`{method}`",
                *(show_difference(by_method[method].get(name)) for name in data),
                *([in_errors(by_method[method].get(""))] if "" in data else []),
            ]
            for method in ranked
        ],
    )


def show_difference(line: Run | None) -> str:
    """A difference with its standard error, if it has one."""
    if line is None:
        return NONE
    error = f" ± {float(line['standard_error']):.2f}" if line["standard_error"] else ""
    return f"{round(float(line['difference']), 2) + 0.0:+.2f}{error}"  # + 0.0 keeps -0.00 away


def in_errors(line: Run | None) -> str:
    """How many standard errors a difference is."""
    if line is None or not float(line["standard_error"] or 0):
        return NONE
    return f"{round(float(line['difference']) / float(line['standard_error']), 1) + 0.0:+.1f}"


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


def scores_of(stem: str) -> Scores | None:
    """The scores of the file of this name; None where there are none."""
    return next((scores for scores in read_scores() if scores.path.stem == stem), None)


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
            seeds = sorted({int(run["seed"]) for run in runs})
            devices = list(dict.fromkeys(run["device"] for run in runs if run.get("device")))
            yield Scores(path, title, by_method, _trained(runs), seeds, devices)


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
    """How many numbers each method trains beside the head: the fewest and the most of all data sets."""
    column = next((name for name in TRAINED if runs and name in runs[0]), None)
    sizes: dict[str, dict[int, None]] = {}
    for run in runs if column is not None else ():
        if run[column]:
            sizes.setdefault(run["method"], {})[int(run[column])] = None
    ends = {method: dict.fromkeys((min(found), max(found))) for method, found in sizes.items()}
    return {method: " to ".join(f"{size:,}" for size in found) for method, found in ends.items()}


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
        return NONE
    if len(scores) == 1:
        return f"{scores[0]:.1f}*"
    return f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"


@cache
def _cost() -> Table:
    tables = read_tables((BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8"))
    return next(table for table in tables if table.title == COST)
