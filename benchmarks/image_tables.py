"""Make what is published of comparisons of image methods: a CSV file with all runs of each, and its pictures.

    python benchmarks/image_tables.py runs/native runs/budget benchmarks/results

The last argument is the folder for the files, the others are folders of comparisons, whose names the files
get; their tables are made anew. With the files in benchmarks/results, `mkdocs build` makes the page of scores
(docs/evidence.md) of them. NAME.csv has a line for each run: method, data set, learning rate, seed, whether
the validation images have chosen this rate, top-1 on them in %, top-1 on the test images of the chosen rates
in %, numbers trained beside the head, seconds, and what it ran on. NAME_paired.csv has the differences of any
two methods with standard errors.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vimtune.compare.command import run_compare
from vimtune.compare.plan import PLAN_FILE
from vimtune.compare.tables.csv import OF_PAIRS

SCORE = "top1"
DIGITS = 3
"""Digits of a score after the point; a test of 8,041 images has steps of .012 %."""
KEY = ("method", "data", "lr", "seed", "data_seed")
OF_RATES = ("method", "data", "lr", "seed", "chosen")
"""Columns that are as they stand in rates.csv."""
PICTURES = {"pareto.png": "{}.png", "paired.png": "{}_paired.png"}
"""Pictures of a comparison, and what they are called here."""


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    *folders, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    problems = []
    for folder in folders:  # One that has no tables keeps no other from being published.
        try:
            publish(folder, target)
        except FileNotFoundError as error:
            problems.append(f"error: {error.filename} is missing: {folder} is no comparison that has tables")
        except ValueError as error:
            problems.append(f"error: {folder}: {error}")
    if problems:
        sys.exit("\n".join(problems))


def publish(folder: Path, target: Path) -> None:
    """Make the files of one comparison.

    Raises:
        FileNotFoundError: there is no finished run, or no comparison.
        ValueError: what is in the folder does not fit together.
    """
    if (folder / PLAN_FILE).is_file():  # It may have been stopped, or come from another machine.
        run_compare(runs=[folder], values={}, config=None, output_dir=folder, resume=None)
    write(target / f"{folder.name}.csv", cells(folder), OF_RATES)
    write(target / f"{folder.name}_paired.csv", read(folder / "paired.csv"), OF_PAIRS)
    for name, copy in PICTURES.items():
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / copy.format(folder.name))


def cells(folder: Path) -> Iterator[dict[str, Any]]:
    """A line for each finished run of a comparison."""
    tested = {tuple(line[name] for name in KEY): line for line in read(folder / "runs.csv")}
    for line in read(folder / "rates.csv"):
        run: Mapping[str, str] = tested.get(tuple(line[name] for name in KEY), {})
        yield {
            **{name: line[name] for name in OF_RATES},
            line["split"]: line[SCORE],
            **({} if line["split"] == "test" else {"test": run[SCORE] if run.get("split") == "test" else ""}),
            "parameters": run.get("method_parameters", ""),
            "seconds": run.get("seconds", ""),
            "device": run.get("device", ""),
        }


def read(path: Path) -> Iterator[dict[str, str]]:
    """The lines of a CSV file, by the names of its columns."""
    with open(path, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def write(path: Path, lines: Iterable[Mapping[str, Any]], first: Sequence[str]) -> None:
    """Write lines as CSV, with numbers of `DIGITS` digits after the point, but for those that name a run, as
    its learning rate does. `first` are the columns with which it begins, also where there is no line."""
    lines = list(lines)
    names = list(dict.fromkeys([*first, *(lines[0] if lines else ())]))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: value if name in KEY else short(value) for name, value in line.items()} for line in lines
        )
    print(f"{path}: {len(lines)} lines")


def short(value: str) -> str:
    """A number with fewer digits; other text as it is."""
    try:
        number = float(value)
    except ValueError:
        return value
    return value if "e" in value or len(value.partition(".")[2]) <= DIGITS else f"{number:.{DIGITS}f}"


if __name__ == "__main__":
    main()
