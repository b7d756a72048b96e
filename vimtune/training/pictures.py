"""The learning curve of a run."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vimtune.pages.style import picture_style, whole_numbers
from vimtune.tasks.base import Score
from vimtune.tasks.report import Report
from vimtune.text import shorten

SUFFIX = ".png"
"""How the names of all pictures of a run folder end."""
MAX_MARKED_EPOCHS = 40
"""More epochs than this are drawn as a line without a mark for each."""


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


def _top_of(axes: Axes) -> float:
    """Upper limit of an axis from 0 that holds a bit more than the curves, also when they are 0."""
    highest = axes.dataLim.ymax
    return 1.05 * highest if math.isfinite(highest) and highest > 0 else 1.0
