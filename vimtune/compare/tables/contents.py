"""Which tables a comparison has, and the texts of their columns and cells, whatever format shows them.

There are three kinds: methods by data sets with one score each, the differences from one method, and a table
about each data set with all that is known of the methods there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vimtune.compare.paired import Difference, differences_from
from vimtune.compare.results import Row, Spread, by_data, score_label
from vimtune.pages.section import Table
from vimtune.text import duration
from vimtune.training.result import Result

NONE = "-"
"""What a cell has where there is nothing."""

NUMBERS: dict[str, Callable[[Result], float | None]] = {
    "train_seconds": lambda result: result.report.train_seconds,
    "peak_memory_mib": lambda result: result.report.peak_memory,
    "adapter_bytes": lambda result: result.report.adapter_bytes,
}
"""Numbers of a run besides its scores, by their names in CSV files."""


def overview(rows: Sequence[Row]) -> Table | None:
    """Methods by data sets with the most important score of each, and its mean over the data sets; None where
    there are not several of these."""
    groups = by_data(rows)
    if len(groups) < 2:
        return None
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = {row.data: row for row in rows if row.method == method}
        spreads = [own[data].score if data in own else None for data in groups]
        percent = [data in own and own[data].scores[0].percent for data in groups]
        known = [spread.mean for spread in spreads if spread is not None]
        whole = len(known) == len(spreads) and all(percent)
        mean = f"{statistics.mean(known):.1f}" if whole else NONE
        lines.append([method, *map(_show_score, spreads, percent), mean])
    return Table("all data sets", ["method", *groups, "mean"], lines)


def shown_differences(rows: Sequence[Row], reference: str | None) -> list[Difference]:
    """The differences of all methods from one of them, the first if none is named; none of them where no
    method has several runs to tell an error from."""
    if not rows:
        return []
    found = differences_from(rows, reference or rows[0].method)
    return found if any(each.error is not None for each in found) else []


def paired(differences: Sequence[Difference]) -> Table:
    """Methods by data sets with their differences from one method, of which there is at least one."""
    data = list(dict.fromkeys(each.data for each in differences if each.data is not None))
    columns: list[str | None] = [*data, *([None] if any(each.data is None for each in differences) else [])]
    shown = {(each.method, each.data): each.show(2) for each in differences}
    lines = [
        [method, *(shown.get((method, name), NONE) for name in columns)]
        for method in dict.fromkeys(each.method for each in differences)
    ]
    heading = ["method", *("mean" if name is None else name for name in columns)]
    return Table(f"Difference from {differences[0].against}", heading, lines)


def details(data: str, rows: Sequence[Row]) -> Table:
    """All that is known of the methods on one data set, of which `rows` are."""
    shown = _columns(rows)
    return Table(
        data, [column.title for column in shown], [[column.cell(row) for column in shown] for row in rows]
    )


@dataclass(frozen=True)
class _Column:
    """A column of the table about one data set."""

    title: str
    cell: Callable[[Row], str]


def _columns(rows: Sequence[Row]) -> list[_Column]:
    """The columns of the table about the rows of one data set."""
    return [
        _Column("method", lambda row: row.method),
        *_score_columns(rows),
        *([_Column("soup", _show_soup)] if any(row.soup for row in rows) else []),
        *([_Column("published", _show_published)] if any(row.published is not None for row in rows) else []),
        _Column("seeds" if all(row.has_a_run_per_seed for row in rows) else "runs", _show_count),
        _Column("lr", lambda row: NONE if row.lr is None else f"{row.lr:g}"),
        _Column("trained", lambda row: NONE if row.parameters is None else f"{row.parameters:,}"),
        *([_Column("size", lambda row: row.size or NONE)] if any(row.size for row in rows) else []),
        _Column("with head", lambda row: NONE if row.trainable is None else f"{row.trainable:,}"),
        _Column("training", lambda row: _show_time(row.spread(NUMBERS["train_seconds"]))),
        _Column("memory", lambda row: _show_mean(row.spread(NUMBERS["peak_memory_mib"]), "{:,.0f} MiB")),
        _Column("adapter", lambda row: _show_mean(row.spread(NUMBERS["adapter_bytes"]), "{:,.0f} kB", 1e-3)),
    ]


def _score_columns(rows: Sequence[Row]) -> list[_Column]:
    """A column for each score that a row has; the loss alone where the task has no scores."""
    first = next((row for row in rows if row.results), None)
    if first is None:
        return []
    splits = "/".join(dict.fromkeys(row.split for row in rows if row.results))
    wanted = first.scores[:-1] or first.scores
    return [
        _Column(score_label(score, splits), partial(_show_score_of, name=score.name))
        for score in wanted
        if any(row.score_named(score.name) for row in rows)
    ]


def _show_score_of(row: Row, name: str) -> str:
    percent = any(score.percent for score in row.scores if score.name == name)
    return _show_score(row.score_named(name), percent)


def _show_soup(row: Row) -> str:
    return _show_score(row.soup, row.scores[0].percent)


def _show_score(spread: Spread | None, percent: bool) -> str:
    return NONE if spread is None else spread.show(1 if percent else 3)


def _show_published(row: Row) -> str:
    return NONE if row.published is None else f"{row.published:.{2 if row.scores[0].percent else 3}f}"


def _show_count(row: Row) -> str:
    count = len(row.results)
    return f"{count} of {count + row.missing}" if row.missing else f"{count}"


def _show_mean(spread: Spread | None, form: str, factor: float = 1.0) -> str:
    return NONE if spread is None else form.format(factor * spread.mean)


def _show_time(spread: Spread | None) -> str:
    if spread is None:
        return NONE
    return f"{spread.mean:.1f} s" if spread.mean < 60 else duration(spread.mean)
