"""The pictures of a comparison: scores as they rose in training, score over trained parameters with the
methods that no other one beats, or by method where most have about one size, and the differences from one of
them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from vimtune.compare.paired import Difference
from vimtune.compare.results import Row, by_data, score_label
from vimtune.pages.style import picture_style
from vimtune.text import printable, shorten

ACROSS = 3
"""Data sets side by side."""
MAX_NAME = 30
"""Characters of a name that are shown."""
CHARACTERS_PER_INCH = 11
"""About as many characters of the legend stand in an inch."""
MARK_WIDTH = 8
"""Characters that the mark before a name and the gap behind it take."""
LINE_HEIGHT = 0.21
"""Inches of a line of the legend."""
ONE_SIZE = 2**0.5
"""Methods are about as large as the middle one if they train up to so many times as much, or as little."""
MOST = 0.75
"""The share of the methods of a data set that have to be of one size, so that they stand at a budget."""
ENOUGH_FOR_QUARTILES = 8
"""From so many methods on one may be far behind the others."""
WHISKER = 1.5
"""How many ranges between the quartiles the whisker of a box plot is long at the most."""
MARKERS = "osD^vP*X<>"
"""Marks of the methods; with ten colours they tell a hundred of them apart."""


Looks = Mapping[str, dict[str, Any]]
"""Mark and colour of each method, as `Axes.errorbar` takes them."""


def draw_pareto(rows: Sequence[Row]) -> Figure:
    """For each data set the most important score, with its deviation over the seeds, over the trained
    parameters. The head counts here, because no method trains without it. The line joins the methods than
    which no other one is better with as few parameters.

    Where most methods have about one size on each data set, as at a budget, their points would lie on each
    other. The scores then stand side by side instead, a line for each method, the best one on top; methods of
    another size have it with their names.
    """
    drawn = [row for row in rows if _has_a_point(row)]
    groups = by_data(drawn)
    others = {name: _of_other_sizes(own) for name, own in groups.items()}
    if any(len(own) > 1 for own in groups.values()) and all(
        len(others[name]) <= (1 - MOST) * len(own) for name, own in groups.items()
    ):
        return _draw_ranks(drawn, set().union(*others.values()))
    return _panels(rows, _has_a_point, _draw_points)


def _of_other_sizes(rows: Sequence[Row]) -> set[str]:
    """The methods that train far more or far less than most on a data set."""
    sizes = {row.method: row.trainable or 0 for row in rows}
    middle = statistics.median(sizes.values())
    return {method for method, size in sizes.items() if max(size, middle) > ONE_SIZE * min(size, middle)}


def _has_a_point(row: Row) -> bool:
    return row.score is not None and bool(row.trainable)


def _draw_ranks(rows: Sequence[Row], of_other_sizes: Collection[str]) -> Figure:
    """A picture with a panel for each data set, where methods stand one below the other, each at its score.

    Their order is that of their mean scores over the data sets on which all of them have one; scores far
    behind all others stand at the edge. The names of some say how many numbers they train beside the head.
    """
    groups = by_data(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    sign = 1.0 if rows[0].scores[0].higher_is_better else -1.0
    own = {method: {row.data: row for row in rows if row.method == method} for method in methods}
    shared = [name for name in groups if all(name in of_data for of_data in own.values())]
    methods.sort(key=lambda method: sign * sum(_mean(own[method][name]) for name in shared))
    sizes = {row.method: row.parameters for row in rows if row.method in of_other_sizes}
    across = min(ACROSS, len(groups))
    down = math.ceil(len(groups) / across)
    with picture_style():
        height = 1.1 + LINE_HEIGHT * len(methods)
        figure = Figure(figsize=(2.2 + 3.4 * across, height * down), layout="constrained")
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes in grid.flat[len(groups) :]:
            axes.set_axis_off()
        for axes, (name, group) in zip(grid.flat, groups.items(), strict=False):
            far = _far_behind(group)
            look = {"fmt": "o", "color": "tab:blue"}
            for row in group:
                assert row.score is not None, "the others are left out"
                line = methods.index(row.method)
                if row in far:
                    _draw_at_the_edge(axes, row, line, look, upright=False)
                else:
                    error = row.score.deviation or None
                    axes.errorbar(row.score.mean, line, xerr=error, markersize=5, capsize=2, **look)
            axes.set_title(shorten(printable(name), 2 * MAX_NAME))
            axes.set_xlabel(score_label(group[0].scores[0], group[0].split))
            _name_lines(axes, methods, sizes)
            axes.grid(alpha=0.3)
        return figure


def _mean(row: Row) -> float:
    assert row.score is not None, "rows without a score are left out"
    return row.score.mean


def draw_curves(rows: Sequence[Row]) -> Figure:
    """For each data set the most important score on the selection split while each run was trained, over the
    share of its epochs."""
    return _panels(rows, lambda row: bool(row.results), _draw_curves)


def _panels(
    rows: Sequence[Row],
    has_something: Callable[[Row], bool],
    draw: Callable[[Axes, Sequence[Row], Looks], dict[str, Any]],
) -> Figure:
    """A picture with a panel for each data set.

    Args:
        rows: those of the comparison.
        has_something: which of them are drawn.
        draw: draws those of one data set, and gives what is drawn by method, for the legend.
    """
    names = list(dict.fromkeys(row.data for row in rows))
    across = min(ACROSS, len(names))
    down = math.ceil(len(names) / across)
    looks = _looks(list(dict.fromkeys(row.method for row in rows)))
    with picture_style():
        figure = Figure(figsize=(1.2 + 4.8 * across, 1.2 + 3.8 * down), layout="constrained")
        handles: dict[str, Any] = {}
        for number, name in enumerate(names, 1):
            axes = figure.add_subplot(down, across, number)
            axes.set_title(shorten(printable(name), 2 * MAX_NAME))
            own = [row for row in rows if row.data == name and has_something(row)]
            if own:
                handles |= draw(axes, own, looks)
            else:
                axes.set_axis_off()
        if handles:
            # Names beside the points would run into each other, above all at equal budgets.
            labels = [shorten(printable(method), MAX_NAME) for method in handles]
            room = CHARACTERS_PER_INCH * figure.get_figwidth()
            columns = max(1, int(room / (max(map(len, labels)) + MARK_WIDTH)))
            figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns)
            figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * math.ceil(len(labels) / columns))
        return figure


def draw_differences(differences: Sequence[Difference]) -> Figure:
    """How far all other methods are from one of them: the mean over the data sets with its standard error,
    where there are several, and a small mark for each data set.

    Args:
        differences: those from one method, at least one.
    """
    data = list(dict.fromkeys(each.data for each in differences if each.data is not None))
    means = {each.method: each for each in differences if each.data is None or len(data) == 1}
    methods = list(dict.fromkeys(each.method for each in differences))
    methods.sort(key=lambda method: means[method].mean if method in means else -math.inf)
    places = {method: place for place, method in enumerate(methods)}
    looks = _looks(data)
    with picture_style():
        figure = Figure(figsize=(7.5, 1.8 + 0.27 * len(methods)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="0.6", linewidth=1, zorder=0)
        for name in data if len(data) > 1 else ():
            own = [each for each in differences if each.data == name]
            marks = {"marker": looks[name]["fmt"], "color": looks[name]["color"]}
            axes.scatter(
                [each.mean for each in own],
                [places[each.method] for each in own],
                s=14,
                alpha=0.6,
                label=shorten(printable(name), MAX_NAME),
                **marks,
            )
        for each in means.values():
            axes.errorbar(
                each.mean,
                places[each.method],
                xerr=each.error,
                fmt="|" if len(data) > 1 else "o",  # There are points of data sets around a mean alone.
                color="0.1",
                markersize=11 if len(data) > 1 else 5,
                capsize=3,
            )
        _name_lines(axes, methods)
        against = shorten(printable(differences[0].against), MAX_NAME)
        over = "mean and data sets" if len(data) > 1 else shorten(printable(data[0]), MAX_NAME)
        axes.set_xlabel(f"difference from {against}, with standard error ({over})")
        axes.grid(alpha=0.3, axis="x")
        if len(data) > 1:
            figure.legend(loc="outside lower center", ncols=4)
        return figure


def _name_lines(
    axes: Axes, methods: Sequence[str], sizes: Mapping[str, int | None] = MappingProxyType({})
) -> None:
    """Name lines that stand one below the other at 0, 1, 2, ..., the last one on top.

    Args:
        axes: where the lines are.
        methods: their names.
        sizes: how many numbers some of them train, which stands with their names.
    """
    names = {method: shorten(printable(method), MAX_NAME) for method in methods}
    names |= {method: f"{names[method]} ({short_count(size)})" for method, size in sizes.items() if size}
    axes.set_yticks(range(len(methods)), list(names.values()))
    axes.set_ylim(-0.6, len(methods) - 0.4)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mark and colour of each name, the same in all parts of a picture."""
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]  # a map of a list
    return {
        name: {
            "fmt": MARKERS[(number + number // 10) % len(MARKERS)],
            "color": colors[number % len(colors)],
        }
        for number, name in enumerate(names)
    }


def _draw_curves(axes: Axes, rows: Sequence[Row], looks: Looks) -> dict[str, Any]:
    """Draw a line for each run of one data set; see `_panels`."""
    score, handles = rows[0].scores[0], {}
    for row in rows:
        for result in row.results:
            curve = [(100 * share, value) for share, value in result.curve(score.name)]
            if curve:
                look = looks[row.method]
                (handles[row.method],) = axes.plot(
                    *zip(*curve, strict=True), look["fmt"], color=look["color"], linestyle="-", markersize=3
                )
    split = "/".join(dict.fromkeys(result.report.selection_split for row in rows for result in row.results))
    axes.set(xlabel="epochs, %", ylabel=score_label(score, split))
    axes.set_xlim(0, 102)
    axes.grid(alpha=0.3)
    return handles


def _draw_points(axes: Axes, rows: Sequence[Row], looks: Looks) -> dict[str, Any]:
    """Draw the points of one data set, and the line of those that nobody beats.

    Scores far behind all others stand at the edge.

    Returns:
        The drawn points by method, for a legend.
    """
    score, handles, far = rows[0].scores[0], dict[str, Any](), _far_behind(rows)
    for row in rows:
        if row in far:
            continue
        spread = row.score
        assert spread is not None and row.trainable is not None, "the others are left out"
        error = spread.deviation or None
        handles[row.method] = axes.errorbar(
            row.trainable, spread.mean, error, capsize=3, markersize=6, alpha=0.85, **looks[row.method]
        )
    front = [(row.trainable, row.score.mean) for row in pareto(rows) if row.trainable and row.score]
    front.append((max(row.trainable or 0 for row in rows), front[-1][1]))
    axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, drawstyle="steps-post", zorder=0)
    axes.set_xscale("log")
    axes.set(
        xlabel="trained parameters, head included",
        ylabel=score_label(score, rows[0].split),
    )
    axes.margins(x=0.12, y=0.12)
    _label_sizes(axes, [row.trainable for row in rows if row.trainable])
    if score.percent:  # A deviation may reach further, a score cannot.
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -1), min(top, 101))
    for row in far:
        look, size = looks[row.method], row.trainable or 0
        handles[row.method] = _draw_at_the_edge(axes, row, size, look, upright=True)
    axes.grid(alpha=0.3)
    return handles


def _far_behind(rows: Sequence[Row]) -> list[Row]:
    """Rows whose score is so much worse than most that it would press the others together on an axis.

    Each is beyond the whisker of a box plot (Tukey 1977), which is worse than the worse quartile by more than
    one and a half times the range between the quartiles, and without them the axis is less than half as long.
    """
    if len(rows) < ENOUGH_FOR_QUARTILES:
        return []
    sign = 1.0 if rows[0].scores[0].higher_is_better else -1.0
    low, _, high = statistics.quantiles((sign * _mean(row) for row in rows), n=4)
    far = [row for row in rows if low - sign * _mean(row) > WHISKER * (high - low)]
    every, near = ([_mean(row) for row in some] for some in (rows, [row for row in rows if row not in far]))
    return far if max(near) - min(near) < (max(every) - min(every)) / 2 else []


def _draw_at_the_edge(axes: Axes, row: Row, other: float, look: dict[str, Any], *, upright: bool) -> Any:
    """Draw a row whose score the axis does not reach, with its score.

    Args:
        axes: where.
        row: has the score.
        other: its place on the axis that has no scores.
        look: mark and colour.
        upright: whether the vertical axis is that of the scores.

    Returns:
        The mark, for a legend.
    """
    score = row.scores[0]
    share, inwards = (0.03, 1) if score.higher_is_better else (0.97, -1)
    place, gap = ((other, share), (0, 7 * inwards)) if upright else ((share, other), (7 * inwards, 0))
    across = axes.get_xaxis_transform() if upright else axes.get_yaxis_transform()
    (mark,) = axes.plot(*place, look["fmt"], color=look["color"], linestyle="none", transform=across)
    axes.annotate(
        score.show(_mean(row), 1),
        place,
        xycoords=across,
        xytext=gap,
        textcoords="offset points",
        ha="center" if upright else "left" if inwards > 0 else "right",
        va="center" if not upright else "bottom" if inwards > 0 else "top",
        fontsize="small",
    )
    return mark


def _label_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """Put numbers of parameters on the horizontal axis, also where they lie close together."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if max(sizes) < 10 * min(sizes):  # There may be no power of ten in between.
        axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
        # Two labels would run into each other where one data set has methods of nearly one size, others not.
        apart = max(sizes) > 1.25 * min(sizes)
        axes.set_xticks([min(sizes), max(sizes)] if apart else [max(sizes)])


def short_count(value: float) -> str:
    """A number of parameters in three digits: "950", "36.9k", "5.31M"."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows with a score than which no other one is better with as few or fewer parameters, by size."""
    found = [(row.trainable, row.score.mean, row) for row in rows if row.trainable is not None and row.score]
    sign = 1.0 if found and found[0][2].scores[0].higher_is_better else -1.0
    front: list[Row] = []
    best = -math.inf
    for _, mean, row in sorted(found, key=lambda item: (item[0], -sign * item[1])):
        if sign * mean > best:
            front.append(row)
            best = sign * mean
    return front
