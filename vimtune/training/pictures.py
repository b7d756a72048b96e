"""Drawing: the style of all pictures of a run, how they are saved, and the learning curve.

Matplotlib's objects are used directly: pyplot would keep a list of figures for the whole process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator

from vimtune.tasks.base import Score
from vimtune.text import shorten
from vimtune.training.folder import writing
from vimtune.utils import atomic_write

if TYPE_CHECKING:
    from vimtune.training.report import Report

SUFFIX = ".png"
"""How the names of all pictures of a run folder end."""
MAX_MARKED_EPOCHS = 40
"""More epochs than this are drawn as a line without a mark for each."""

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


def draw_learning_curve(report: Report, score: Score | None) -> Figure:
    """Losses on the left axis, over epochs, and `score` on the right one where the task has scores."""
    with picture_style():
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        losses = figure.add_subplot()
        epochs = [record["epoch"] for record in report.history]
        evaluated = [record for record in report.history if "loss" in record]
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
        losses.xaxis.set_major_locator(whole_numbers())
        margin = 0.5 if len(epochs) == 1 else min(0.5, 0.02 * len(epochs))
        losses.set_xlim(epochs[0] - margin, epochs[-1] + margin)
        lines, marked = losses.get_lines(), losses
        if score is not None:
            marked = losses.twinx()
            values = [record[score.name] for record in evaluated]
            marked.plot(at, values, color="tab:green", label=f"{split} {score.title}", **shape)
            marked.set(ylabel=f"{score.title} (%)" if score.percent else score.title)
            if score.percent:
                marked.set(ylim=(0, 100))
            lines = [*lines, *marked.get_lines()]
        best = f"best epoch ({report.best_epoch})"
        lines = [*lines, marked.axvline(report.best_epoch, color="0.6", linestyle=":", label=best, zorder=0)]
        # Below the axes, where there is no curve to hide.
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
        losses.set_title(shorten(f"{report.model}, {report.method}", 60))
        return figure


def save_picture(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG file, in one step."""
    FigureCanvasAgg(figure)
    with picture_style(), writing(path):
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def font_families() -> list[str]:
    """The fonts of pictures that this system has, in the order in which they are asked for a character."""
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(family for family in FALLBACK_FONTS if family in installed)]


@contextmanager
def picture_style() -> Iterator[None]:
    """Matplotlib's own style, whatever the user has set, and no name is read as a formula."""
    changes = {"text.parse_math": False, "font.family": font_families()}
    with matplotlib.style.context(["default", changes]):
        yield


def _top_of(axes: Axes) -> float:
    """Upper limit of an axis from 0 that holds a bit more than the curves, also when they are 0."""
    highest = axes.dataLim.ymax
    return 1.05 * highest if math.isfinite(highest) and highest > 0 else 1.0


def whole_numbers() -> MaxNLocator:
    """Ticks for an axis of whole numbers."""
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
