"""The tables of a comparison: Markdown, CSV, LaTeX, and on the terminal."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vimtune.compare.paired import Difference, all_differences, differences_from
from vimtune.compare.pictures import draw_curves, draw_differences, draw_pareto
from vimtune.compare.plan import Plan
from vimtune.compare.results import Row, Spread, by_data, score_label
from vimtune.console import neutral, print_line
from vimtune.output import write_text
from vimtune.pages.style import save_picture
from vimtune.text import csv_cell, duration, escape_markdown, printable, shorten
from vimtune.training.result import Result

NONE = "-"
"""What a cell has where there is nothing."""

Cells = list[str]
"""The texts of a line of a table."""

NUMBERS: dict[str, Callable[[Result], float | None]] = {
    "train_seconds": lambda result: result.report.train_seconds,
    "peak_memory_mib": lambda result: result.report.peak_memory,
    "adapter_bytes": lambda result: result.report.adapter_bytes,
}
"""Numbers of a run besides its scores, by their names in CSV files."""


CURVES = "curves.png"
"""Name of the picture of the scores in training."""

OF_RUNS = (
    "Runs that differ in nothing but the seed and the data seed are one row, of which scores are means and "
    "standard deviations (n - 1)."
)
"""What is said above tables of runs that no plan knows."""


def protocol_of(plan: Plan) -> str:
    """How the learning rates of a comparison are chosen, and on what its scores are, in words."""
    chosen_with, over = f"seeds {_listed(plan.lr_seeds)}", f"the seeds ({_listed(plan.options.seeds)})"
    others = "the other seeds are"
    if (data_seeds := plan.options.data_seeds) is not None:
        count = len(data_seeds) * len(plan.options.seeds)
        over = f"the {count} pairs of {over} and the data seeds ({_listed(data_seeds)})"
        chosen_with += f", data seed {data_seeds[0]}"
        others = "the other seeds and data seeds are"
    words = f"Scores are means and standard deviations (n - 1) over {over}."
    if len(plan.options.seeds) * len(plan.data_seeds) == 1:
        words = f"Each score is that of one run, with seed {plan.options.seeds[0]}."
    if any(len(plan.rates(*pair)) > 1 for pair in plan.pairs):
        words = (
            "For each method on each data set the validation split chooses the learning rate among those of "
            f"its grid ({chosen_with}); {others} run with that one alone. {words}"
        )
    if plan.options.jobs > 1:
        words += f" {plan.options.jobs} runs at a time shared a device, which the times include."
    return words


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


@dataclass(frozen=True)
class Column:
    """A column of the table about one data set."""

    title: str
    cell: Callable[[Row], str]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the table about the rows of one data set."""
    return [
        Column("method", lambda row: row.method),
        *_score_columns(rows),
        *([Column("soup", _show_soup)] if any(row.soup for row in rows) else []),
        *([Column("published", _show_published)] if any(row.published is not None for row in rows) else []),
        Column("seeds" if all(row.has_a_run_per_seed for row in rows) else "runs", _show_count),
        Column("lr", lambda row: NONE if row.lr is None else f"{row.lr:g}"),
        Column("trained", lambda row: NONE if row.parameters is None else f"{row.parameters:,}"),
        *([Column("size", lambda row: row.size or NONE)] if any(row.size for row in rows) else []),
        Column("with head", lambda row: NONE if row.trainable is None else f"{row.trainable:,}"),
        Column("training", lambda row: _show_time(row.spread(NUMBERS["train_seconds"]))),
        Column("memory", lambda row: _show(row.spread(NUMBERS["peak_memory_mib"]), "{:,.0f} MiB")),
        Column("adapter", lambda row: _show(row.spread(NUMBERS["adapter_bytes"]), "{:,.0f} kB", 1e-3)),
    ]


def _score_columns(rows: Sequence[Row]) -> list[Column]:
    """A column for each score that a row has; the loss alone where the task has no scores."""
    first = next((row for row in rows if row.results), None)
    if first is None:
        return []
    splits = "/".join(dict.fromkeys(row.split for row in rows if row.results))
    wanted = first.scores[:-1] or first.scores
    return [
        Column(score_label(score, splits), partial(_show_score, name=score.name))
        for score in wanted
        if any(_score_of(row, score.name) for row in rows)
    ]


def _score_of(row: Row, name: str) -> Spread | None:
    return row.spread(lambda result: result.scores.get(name))


def _show_score(row: Row, name: str) -> str:
    spread = _score_of(row, name)
    percent = any(score.percent for score in row.scores if score.name == name)
    return NONE if spread is None else spread.show(1 if percent else 3)


def _show_published(row: Row) -> str:
    return NONE if row.published is None else f"{row.published:.{2 if row.scores[0].percent else 3}f}"


def _show_soup(row: Row) -> str:
    return NONE if row.soup is None else row.soup.show(1 if row.scores[0].percent else 3)


def _show_count(row: Row) -> str:
    count = len(row.results)
    return f"{count} of {count + row.missing}" if row.missing else f"{count}"


def _show(spread: Spread | None, form: str, factor: float = 1.0) -> str:
    return NONE if spread is None else form.format(factor * spread.mean)


def _show_time(spread: Spread | None) -> str:
    if spread is None:
        return NONE
    return f"{spread.mean:.1f} s" if spread.mean < 60 else duration(spread.mean)


def best_of(rows: Sequence[Row]) -> list[Row]:
    """The rows of a data set with the best mean score; none where fewer than two have one, or they are not
    of one split."""
    scored = [(row.score.mean, row) for row in rows if row.score is not None]
    if len(scored) < 2 or len({row.split for _, row in scored}) > 1:
        return []
    better = max if scored[0][1].scores[0].higher_is_better else min
    best = better(mean for mean, _ in scored)
    return [row for mean, row in scored if mean == best]


def overview(rows: Sequence[Row]) -> tuple[Cells, list[Cells]]:
    """Methods by data sets with the most important score of each, and its mean over the data sets: the
    heading, and a line for each method."""
    groups = by_data(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = []
    for method in methods:
        own = {row.data: row for row in rows if row.method == method}
        spreads = [own[data].score if data in own else None for data in groups]
        digits = [1 if data in own and own[data].scores[0].percent else 3 for data in groups]
        shown = [NONE if s is None else s.show(d) for s, d in zip(spreads, digits, strict=True)]
        known = [spread.mean for spread in spreads if spread is not None]
        whole = len(known) == len(spreads) and set(digits) == {1}
        lines.append([method, *shown, f"{statistics.mean(known):.1f}" if whole else NONE])
    return ["method", *groups, "mean"], lines


PAIRED = (
    "Means over pairs of runs with the same seed, ± their standard error; that of the last column takes the "
    "data sets as given. The errors say nothing of what other test images would change."
)
"""What is said above a table of differences."""


def _differences(rows: Sequence[Row], reference: str | None) -> list[Difference]:
    """The differences of all methods from one of them, the first if none is named; none of them where no
    method has several runs to tell an error from."""
    if not rows:
        return []
    found = differences_from(rows, reference or rows[0].method)
    return found if any(each.error is not None for each in found) else []


def _title_of(differences: Sequence[Difference]) -> str:
    return f"Difference from {differences[0].against}"


def paired(differences: Sequence[Difference]) -> tuple[Cells, list[Cells]]:
    """Methods by data sets with the differences from one method: the heading, and a line for each other
    method."""
    data = list(dict.fromkeys(each.data for each in differences if each.data is not None))
    columns: list[str | None] = [*data, *([None] if any(each.data is None for each in differences) else [])]
    shown = {(each.method, each.data): each.show(2) for each in differences}
    lines = [
        [method, *(shown.get((method, name), NONE) for name in columns)]
        for method in dict.fromkeys(each.method for each in differences)
    ]
    return ["method", *("mean" if name is None else name for name in columns)], lines


def details(rows: Sequence[Row]) -> tuple[Cells, list[Cells]]:
    """The table about one data set: the heading, and a line for each method."""
    shown = columns(rows)
    return [column.title for column in shown], [[column.cell(row) for column in shown] for row in rows]


# --- files

OF_PAIRS = ("method", "against", "data", "pairs", "difference", "standard_error")
"""Columns of paired.csv."""


def write_tables(
    rows: Sequence[Row], folder: Path, note: str, failures: Sequence[str], reference: str | None = None
) -> list[str]:
    """Write all tables and pictures of a comparison, each file whole or not at all.

    Args:
        rows: those of the comparison.
        folder: where the files go.
        note: what is said above the tables.
        failures: a line for each run that failed.
        reference: the method from which the differences of the others are shown; None for the first.

    Returns:
        The names of the files.

    Raises:
        OutputError: the system refuses to write.
    """
    texts = {
        "table.md": to_markdown(rows, note, failures, reference),
        "table.csv": to_csv(rows),
        "runs.csv": runs_to_csv(rows),
        "rates.csv": rates_to_csv(rows),
        "paired.csv": paired_to_csv(rows),
        "table.tex": to_latex(rows),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    pictures = {"pareto.png": draw_pareto(rows), CURVES: draw_curves(rows)}
    if differences := _differences(rows, reference):
        pictures["paired.png"] = draw_differences(differences)
    for name, picture in pictures.items():
        save_picture(picture, folder / name)
    return [*texts, *pictures]


def to_markdown(
    rows: Sequence[Row], note: str, failures: Sequence[str] = (), reference: str | None = None
) -> str:
    """Everything: the note, the overview of several data sets, the differences from the reference, a table
    for each data set, and what failed."""
    parts = ["# Comparison", note, *_remarks(rows)]
    groups = by_data(rows)
    if len(groups) > 1:
        parts.append(_markdown(*overview(rows), {}))
    if differences := _differences(rows, reference):
        title = f"## {escape_markdown(_title_of(differences))}"
        parts += [title, PAIRED, _markdown(*paired(differences), {})]
    for name, group in groups.items():
        bold = {group.index(row): 1 for row in best_of(group)}
        parts += [f"## {escape_markdown(name)}", _markdown(*details(group), bold)]
    if failures:
        parts += ["## Failed", "\n".join(f"- {escape_markdown(failure)}" for failure in failures)]
    return "\n\n".join(parts) + "\n"


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader of the tables has to know besides."""
    remarks = ["Trained parameters do not count the head; `with head` does."]
    if any(row.soup for row in rows):
        remarks.append("`soup` is the score of one adapter, the average of those of all seeds.")
    own = [row for row in rows if any(r.report.split == r.report.selection_split for r in row.results)]
    blind = [row.data for row in own]
    chosen = ["epochs"] if any(result.had_a_choice for row in own for result in row.results) else []
    chosen += ["learning rates"] if any(row.tried > 1 for row in own) else []
    if chosen:
        remarks.append(
            f"Of {', '.join(dict.fromkeys(blind))} the split of the scores also chose the "
            f"{' and '.join(chosen)}, which makes them optimistic."
        )
    if same := [row.data for row in rows if not row.data_differ]:
        remarks.append(
            f"The data seeds draw nothing of {', '.join(dict.fromkeys(same))}, whose data are the same with "
            "each: such runs are no draws of the data (shots or train_size are), and their spread says less."
        )
    return remarks


def _markdown(heading: Cells, lines: Sequence[Cells], bold: Mapping[int, int]) -> str:
    """A table; `bold` names the column of a line that is set off."""
    table = [heading, ["---", *["---:"] * (len(heading) - 1)]]
    for number, line in enumerate(lines):
        cells = [escape_markdown(cell) for cell in line]
        if number in bold:
            cells[bold[number]] = f"**{cells[bold[number]]}**"
        table.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def to_csv(rows: Sequence[Row]) -> str:
    """A line for each row with means and standard deviations of all its numbers, unrounded."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {
            "method": csv_cell(printable(row.method)),
            "data": csv_cell(printable(row.data)),
            "lr": row.lr,
            "seeds": len(row.seeds),
            "data_seeds": len(row.data_seeds),
            "runs": len(row.results),
            "missing": row.missing,
            "size": csv_cell(row.size),
            "split": row.split,
            "method_parameters": row.parameters,
            "trainable_parameters": row.trainable,
            **({} if row.published is None else {"published": row.published}),
            **({} if row.soup is None else {"soup_mean": row.soup.mean, "soup_sd": row.soup.deviation}),
        }
        spreads = {score.name: _score_of(row, score.name) for score in row.scores}
        spreads |= {name: row.spread(of) for name, of in NUMBERS.items()}
        for name, spread in spreads.items():
            line[f"{name}_mean"] = None if spread is None else spread.mean
            line[f"{name}_sd"] = None if spread is None else spread.deviation
        lines.append(line)
    return _csv(lines, ("method", "data", "lr", "seeds", "data_seeds", "runs"))


def runs_to_csv(rows: Sequence[Row]) -> str:
    """A line for each run."""
    lines = []
    for row in rows:
        for result in row.results:
            report = result.report
            lines.append(
                {
                    "method": csv_cell(printable(row.method)),
                    "data": csv_cell(printable(row.data)),
                    "lr": result.lr,
                    "seed": result.seed,
                    "data_seed": result.data_seed,
                    "split": report.split,
                    **result.scores,
                    "selection_split": report.selection_split,
                    **{f"selection_{name}": value for name, value in result.selected.items()},
                    "best_epoch": report.best_epoch,
                    "method_parameters": result.method_parameters,
                    "trainable_parameters": report.trainable_parameters,
                    "train_seconds": report.train_seconds,
                    "seconds": report.seconds,
                    "peak_memory_mib": report.peak_memory,
                    "peak_memory_of": report.peak_memory_of,
                    "adapter_bytes": report.adapter_bytes,
                    "device": csv_cell(printable(report.device_name)),
                    "run_dir": csv_cell(printable(report.run_dir)),
                }
            )
    return _csv(lines, ("method", "data", "lr", "seed", "data_seed", "split"))


def rates_to_csv(rows: Sequence[Row]) -> str:
    """A line for each run of each learning rate with its scores on the selection split, by which learning
    rates are chosen."""
    lines = []
    for row in rows:
        for result in sorted((*row.others, *row.results), key=lambda result: result.lr):
            lines.append(
                {
                    "method": csv_cell(printable(row.method)),
                    "data": csv_cell(printable(row.data)),
                    "lr": result.lr,
                    "chosen": row.lr == result.lr,
                    "seed": result.seed,
                    "data_seed": result.data_seed,
                    "split": result.report.selection_split,
                    **result.selected,
                }
            )
    return _csv(lines, ("method", "data", "lr", "chosen", "seed", "data_seed", "split"))


def paired_to_csv(rows: Sequence[Row]) -> str:
    """A line for each two methods on each data set with their difference, and one for its mean over all."""
    values = (
        (
            csv_cell(printable(each.method)),
            csv_cell(printable(each.against)),
            "" if each.data is None else csv_cell(printable(each.data)),
            each.pairs,
            each.mean,
            each.error,
        )
        for each in all_differences(rows)
    )
    return _csv([dict(zip(OF_PAIRS, own, strict=True)) for own in values], OF_PAIRS)


def _csv(lines: Sequence[Mapping[str, Any]], first: Sequence[str]) -> str:
    """A table whose columns are the keys of its lines; `first` are those with which it begins, also where
    there is no line."""
    names = list(dict.fromkeys([*first, *(name for line in lines for name in line)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def to_latex(rows: Sequence[Row]) -> str:
    """A `tabular` of the package booktabs for the overview of several data sets, and one for each of them."""
    groups = by_data(rows)
    tables = [] if len(groups) < 2 else [("all data sets", *overview(rows))]
    tables += [(name, *details(group)) for name, group in groups.items()]
    parts = [f"% {printable(name)}\n{_latex(heading, lines)}" for name, heading, lines in tables]
    return "% needs \\usepackage{booktabs}\n\n" + "\n\n".join(parts) + "\n"


def _latex(heading: Cells, lines: Sequence[Cells]) -> str:
    body = [" & ".join(map(_escape_latex, line)) + r" \\" for line in [heading, *lines]]
    rules = [r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(heading) - 1)}}}", *rules, r"\end{tabular}"])


_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}
"""How LaTeX writes the characters that it takes for something else."""


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text))


# --- on the terminal


def print_rows(rows: Sequence[Row], console: Console, reference: str | None = None) -> None:
    """Print the overview of several data sets, the differences from the reference, and the table about each
    data set."""
    groups = by_data(rows)
    if len(groups) > 1:
        _print_table("all data sets", *overview(rows), console)
    if differences := _differences(rows, reference):
        _print_table(f"{_title_of(differences)}, ± standard error", *paired(differences), console)
    for name, group in groups.items():
        _print_table(name, *details(group), console)
    for remark in _remarks(rows):
        print_line(console, remark)


def _print_table(name: str, heading: Cells, lines: Sequence[Cells], console: Console) -> None:
    print_line(console, "")
    print_line(console, name)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, title in enumerate(heading):
        text = neutral(title, console)
        table.add_column(text, justify="right" if number else "left", overflow="fold", no_wrap=number == 0)
    for line in lines:
        table.add_row(*(neutral(shorten(cell), console) for cell in line))
    console.print(table)
