"""The picture of a comparison: score over trained parameters, and which methods no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from vimtune.compare.results import Row
from vimtune.text import printable, shorten
from vimtune.training.pictures import picture_style

ACROSS = 3
"""Data sets side by side."""
MAX_NAME = 30
"""Characters of a method's name that are shown."""


def draw_pareto(rows: Sequence[Row]) -> Figure:
    """For each data set the most important score over the trained parameters, head included, which nothing
    trains without; the line joins the methods that no other one beats in both."""
    names = list(dict.fromkeys(row.data for row in rows))
    across = min(ACROSS, len(names))
    down = math.ceil(len(names) / across)
    with picture_style():
        figure = Figure(figsize=(5.6 * across, 4.2 * down), layout="constrained")
        for number, name in enumerate(names, 1):
            own = [row for row in rows if row.data == name and row.score is not None and row.trainable]
            axes = figure.add_subplot(down, across, number)
            axes.set_title(shorten(printable(name), 2 * MAX_NAME))
            if own:
                _draw(axes, own)
            else:
                axes.set_axis_off()
        return figure


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    """Points with their deviations and names, and the line of those that nobody beats."""
    score = rows[0].scores[0]
    front = pareto(rows)
    axes.set_xscale("log")
    for row in rows:
        spread = row.score
        assert spread is not None and row.trainable is not None, "the others are left out"
        color = "tab:blue" if row in front else "0.55"
        axes.errorbar(
            row.trainable, spread.mean, spread.deviation or 0.0, fmt="o", color=color, capsize=3, markersize=5
        )
        axes.annotate(
            shorten(printable(row.method), MAX_NAME),
            (row.trainable, spread.mean),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize="small",
            color=color,
        )
    steps = [(row.trainable, row.score.mean) for row in front if row.trainable and row.score]
    axes.plot(
        *zip(*steps, strict=True), color="tab:blue", linewidth=1, alpha=0.5, drawstyle="steps-post", zorder=0
    )
    unit = " (%)" if score.percent else ""
    axes.set(xlabel="trained parameters, head included", ylabel=f"{score.title}, {rows[0].split}{unit}")
    axes.margins(x=0.18, y=0.12)
    sizes = [row.trainable for row in rows if row.trainable]
    if max(sizes) < 10 * min(sizes):  # Minor ticks would have numbers that run into each other.
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted(set(sizes)) if len(set(sizes)) < 4 else [min(sizes), max(sizes)])
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows with a score than which no other one is better with as few or fewer parameters, by size."""
    scored = [row for row in rows if row.score is not None and row.trainable is not None]
    sign = 1.0 if scored and scored[0].scores[0].higher_is_better else -1.0
    front: list[Row] = []
    best = -math.inf
    for row in sorted(
        scored, key=lambda row: (row.trainable or 0, -sign * row.score.mean if row.score else 0.0)
    ):
        assert row.score is not None, "the others are left out"
        if sign * row.score.mean > best:
            front.append(row)
            best = sign * row.score.mean
    return front
