"""The pictures of a run: a learning curve and a confusion matrix.

Matplotlib's objects are used directly: pyplot would keep a list of figures for the whole process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vimtune.text import printable, shorten
from vimtune.train.folder import writing
from vimtune.utils import atomic_write

if TYPE_CHECKING:
    from vimtune.train.report import Report

MAX_NAMED_CLASSES = 30
"""More names than these cannot be read beside a confusion matrix."""
MAX_COUNTED_CLASSES = 20
"""More numbers than the square of this cannot be read in a confusion matrix."""
MAX_NAME = 28
"""Characters of a class name that are shown."""
MAX_MARKED_EPOCHS = 40
"""More points than these are drawn as a line alone."""

FALLBACK_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans CJK KR",
    "WenQuanYi Micro Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Nirmala UI",
    "Arial Unicode MS",
)
"""Fonts with many scripts, one of which most systems have, for names that DejaVu Sans cannot show."""


def draw_learning_curve(report: Report) -> Figure:
    """Losses on the left axis, accuracy on the right, over epochs."""
    with _style():
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        losses = figure.add_subplot()
        epochs = [record["epoch"] for record in report.history]
        evaluated = [record for record in report.history if "top1" in record]
        at = [record["epoch"] for record in evaluated]
        marker = "o" if len(epochs) <= MAX_MARKED_EPOCHS else None
        shape: dict[str, Any] = {"marker": marker, "markersize": 4, "clip_on": False}
        split = report.selection_split
        train_losses = [record["train_loss"] for record in report.history]
        losses.plot(epochs, train_losses, color="tab:blue", label="train loss", **shape)
        losses.plot(
            at, [record["loss"] for record in evaluated], color="tab:orange", label=f"{split} loss", **shape
        )
        losses.set(xlabel="epoch", ylabel="loss", ylim=(0, _top_of(losses)))
        losses.xaxis.set_major_locator(_whole_numbers())
        margin = 0.5 if len(epochs) == 1 else min(0.5, 0.02 * len(epochs))
        losses.set_xlim(epochs[0] - margin, epochs[-1] + margin)
        accuracy = losses.twinx()
        accuracy.plot(
            at, [record["top1"] for record in evaluated], color="tab:green", label=f"{split} top-1", **shape
        )
        accuracy.axvline(
            report.best_epoch, color="0.6", linestyle=":", label=f"best epoch ({report.best_epoch})", zorder=0
        )
        accuracy.set(ylabel="top-1 (%)", ylim=(0, 100))
        # Below the axes, where there is no curve to hide.
        lines = [*losses.get_lines(), *accuracy.get_lines()]
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
        losses.set_title(shorten(f"{report.model}, {report.method}", 60))
        return figure


def draw_confusion_matrix(confusion: Tensor, classes: Sequence[str], report: Report) -> Figure:
    """Share of each true class (row) that was given each answer (column).

    Few classes have their counts of images in the cells. Where names cannot be read or drawn, numbers in
    the order of the data set stand for them, as in confusion_matrix.csv.

    Args:
        confusion: counts of images, (C, C).
        classes: C names.
    """
    with _style():
        number = len(classes)
        shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
        named, counted = number <= MAX_NAMED_CLASSES, number <= MAX_COUNTED_CLASSES
        names = class_labels(classes) if named else []
        numbered = not named or bool(undrawable(classes))
        cells = number * (0.42 if counted else 0.26) if named else 7.0
        side = max(3.0, cells) + 0.075 * max(map(len, names), default=0)
        figure = Figure(figsize=(side + 1.6, side + 0.8), layout="constrained")
        axes = figure.add_subplot()
        picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        hint = " (numbers: see confusion_matrix.csv)" if numbered else ""
        axes.set(xlabel=f"predicted class{hint}", ylabel=f"true class{hint}")
        if named:
            axes.set_xticks(range(number), names, rotation=90, fontsize=8)
            axes.set_yticks(range(number), names, fontsize=8)
        else:
            axes.xaxis.set_major_locator(_whole_numbers())
            axes.yaxis.set_major_locator(_whole_numbers())
        if counted:
            _write_counts(axes, confusion, shares)
        axes.set_title(f"{report.split}: {report.top1:.1f} % of {report.num_images:,} images right")
        figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
        return figure


def save_picture(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG file, in one step."""
    FigureCanvasAgg(figure)
    with _style(), writing(path):
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def class_labels(classes: Sequence[str]) -> list[str]:
    """Short names on one line; a class whose name no font can show is called by its number."""
    unshown = set(undrawable(classes))
    return [
        f"class {index}" if index in unshown else shorten(printable(name), MAX_NAME)
        for index, name in enumerate(classes)
    ]


def undrawable(classes: Sequence[str]) -> list[int]:
    """Numbers of the classes whose names have a character that no font at hand has."""
    shown = [printable(name) for name in classes]
    if all(map(str.isascii, shown)):
        return []
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in _families()]
    known = {character for font in fonts for character in font.get_charmap()}
    return [index for index, name in enumerate(shown) if not known.issuperset(map(ord, name))]


def _families() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(family for family in FALLBACK_FONTS if family in installed)]


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's own style, whatever the user has set, and no name is read as a formula."""
    changes = {"text.parse_math": False, "font.family": _families()}
    with matplotlib.style.context(["default", changes]):
        yield


def _top_of(axes: Axes) -> float:
    """Upper limit of an axis from 0 that holds a bit more than the curves, also when they are 0."""
    highest = axes.dataLim.ymax
    return 1.05 * highest if math.isfinite(highest) and highest > 0 else 1.0


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _write_counts(axes: Axes, confusion: Tensor, shares: Tensor) -> None:
    """The number of images in each cell that has any, light on dark and dark on light."""
    for true, row in enumerate(confusion.tolist()):
        for predicted, images in enumerate(row):
            if images:
                color = "white" if shares[true, predicted] > 0.5 else "black"
                size = 8 if images < 1000 else 6
                axes.text(predicted, true, str(images), ha="center", va="center", color=color, fontsize=size)
