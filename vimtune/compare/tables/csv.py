"""The numbers of a comparison as CSV files, which programs read: unrounded, and with all runs behind them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from vimtune.compare.paired import all_differences
from vimtune.compare.results import Row
from vimtune.compare.tables.contents import NUMBERS
from vimtune.text import table_cell

OF_PAIRS = ("method", "against", "data", "pairs", "difference", "standard_error")
"""Columns of paired.csv."""


def to_csv(rows: Sequence[Row]) -> str:
    """A line for each row with means and standard deviations of all its numbers, unrounded."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {
            "method": row.method,
            "data": row.data,
            "lr": row.lr,
            "seeds": len(row.seeds),
            "data_seeds": len(row.data_seeds),
            "runs": len(row.results),
            "missing": row.missing,
            "size": row.size,
            "split": row.split,
            "method_parameters": row.parameters,
            "trainable_parameters": row.trainable,
            **({} if row.published is None else {"published": row.published}),
            **({} if row.soup is None else {"soup_mean": row.soup.mean, "soup_sd": row.soup.deviation}),
        }
        spreads = {score.name: row.score_named(score.name) for score in row.scores}
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
                    "method": row.method,
                    "data": row.data,
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
                    "device": report.device_name,
                    "run_dir": report.run_dir,
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
                    "method": row.method,
                    "data": row.data,
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
    lines = [
        {
            "method": each.method,
            "against": each.against,
            "data": each.data,
            "pairs": each.pairs,
            "difference": each.mean,
            "standard_error": each.error,
        }
        for each in all_differences(rows)
    ]
    return _csv(lines, OF_PAIRS)


def _csv(lines: Sequence[Mapping[str, Any]], first: Sequence[str]) -> str:
    """A file with a column for each name; what is text in a cell is harmless, whoever has written it.

    Args:
        lines: the cells of each line by column.
        first: the columns with which it begins, also where there is no line.
    """
    names = list(dict.fromkeys([*first, *(name for line in lines for name in line)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: table_cell(value) for name, value in line.items()} for line in lines)
    return text.getvalue()
