"""What the pictures of several analyses have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from vimtune.analysis.diagonal import DiagonalShare
from vimtune.pages.style import picture_style, whole_numbers


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis by plain numbers.

    Our pictures read no text as a formula, and matplotlib would write its powers of ten as formulas. Where
    few powers of ten are in sight, the numbers between are labelled, too.
    """
    low, high = sorted(axis.get_view_interval())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    narrow = low > 0 and high / low < 30
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}") if narrow else NullFormatter())


def draw_concentration(shares: Mapping[str, Sequence[tuple[int, DiagonalShare]]]) -> Figure:
    """The concentration on the diagonal over the layers, for each projector."""
    with picture_style():
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, own in shares.items():
            layers = [layer for layer, _ in own]
            (line,) = axes.plot(
                layers, [share.concentration for _, share in own], marker="o", markersize=4, label=name
            )
            axes.plot(layers, [s.by_sizes / s.chance for _, s in own], color=line.get_color(), linewidth=0.7)
            spreads = [2 * share.spread / share.chance for _, share in own]
            axes.fill_between(
                layers, [1 - s for s in spreads], [1 + s for s in spreads], color=line.get_color(), alpha=0.15
            )
        axes.axhline(1, color="0.4", linestyle=":")
        lowest = min(share.concentration for own in shares.values() for _, share in own)
        axes.set(xlabel="layer", ylabel="diagonal share / chance", yscale="log")
        axes.set_ylim(bottom=0.7 * min(1.0, lowest))  # A band may reach down to nothing.
        plain_numbers(axes.yaxis)
        axes.xaxis.set_major_locator(whole_numbers())
        axes.legend()
        axes.grid(alpha=0.3, which="both")
        return figure
