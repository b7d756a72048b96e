"""The picture of the calibration: how often answers are right, by how sure the model was of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from vimtune.metrics.calibration import Bin
from vimtune.pages.style import picture_style


def draw_reliability(found: Mapping[str, Sequence[Bin]]) -> Figure:
    """Share of right answers over their mean probability, and below it how many answers there are.

    Args:
        found: intervals of probability by the name of their line. The first one has the bars below.
    """
    with picture_style():
        figure = Figure(figsize=(4.8, 5.2))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        upper.plot([0, 100], [0, 100], color="0.6", linestyle=":", label="calibrated")
        for name, bins in found.items():
            filled = [own for own in bins if own.count]
            confidence, accuracy = ([100 * x for x in xs] for xs in _points(filled))
            upper.plot(confidence, accuracy, marker="o", markersize=4, label=name)
        upper.set(ylabel="right answers (%)", xlim=(0, 100), ylim=(0, 100))
        upper.legend(loc="best")
        first = next(iter(found.values()))
        middles = [50 * (own.low + own.high) for own in first]
        lower.bar(middles, [own.count for own in first], width=90 / max(1, len(first)), color="tab:blue")
        lower.set(xlabel="probability of the answer (%)", ylabel="answers")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
        figure.subplots_adjust(left=0.16, right=0.97, top=0.98, bottom=0.1, hspace=0.08)
        return figure


def _points(bins: Sequence[Bin]) -> tuple[list[float], list[float]]:
    """Mean probabilities, and shares of right answers."""
    return [own.confidence for own in bins], [own.accuracy for own in bins]
