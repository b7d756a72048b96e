"""Draw gpu_step.json: images per second over image size, time an image over tokens.

    python benchmarks/step_plot.py results/gpu_step.json             # writes results/gpu_step.png
    python benchmarks/step_plot.py results/*.json --png all.png --methods prodial full

Several files are drawn as one, later ones win where they hold the same case. One column for each method;
bars span the fastest and the slowest round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from step_tables import measured, milliseconds, times

METHODS = ("forward", "prodial", "full")
# In the order of the first appearance of a name: colours that a colour-blind eye tells apart (Okabe & Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
INK, GRID = "#333333", "#DDDDDD"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--png", type=Path, help="default: beside the first file")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in options.reports]
    target = options.png or options.reports[0].with_suffix(".png")
    draw(reports, options.methods, target)
    print(target)


def draw(reports: list[dict[str, Any]], methods: list[str], target: Path) -> None:
    """Write the picture of the reports' rows.

    Raises:
        ValueError: no row of these methods has a time.
    """
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for report in reports:
        for row in measured(report["rows"]):
            cases[row["model"], row["kernels"], row["method"], row["img_size"]] = row
    methods = [method for method in methods if any(key[2] == method for key in cases)]
    if not methods:
        raise ValueError("no measured row of these methods: nothing to draw")
    names = list(dict.fromkeys((model, kernels) for model, kernels, _, _ in cases))
    figure, grid = pyplot.subplots(
        2, len(methods), figsize=(3.6 * len(methods), 6.6), sharex="row", sharey="row", squeeze=False
    )
    for column, method in enumerate(methods):
        for index, (model, kernels) in enumerate(names):
            rows = [row for key, row in cases.items() if key[:3] == (model, kernels, method)]
            if rows:
                style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                label = model.partition("_patch")[0] + ("" if kernels == "vit" else f", {kernels}")
                _draw_rates(grid[0][column], rows, label, style)
                _draw_growth(grid[1][column], rows, style)
        grid[0][column].set_title(method, color=INK)
    sizes = sorted({key[3] for key in cases})
    tokens = sorted({row["tokens"] for row in cases.values()})
    for upper, lower in zip(*grid, strict=True):
        _label(upper, "image size, pixels", sizes)
        _label(lower, "tokens", tokens)
    grid[0][0].set_ylabel("images per second", color=INK)
    grid[1][0].set_ylabel("ms per image", color=INK)
    machine = reports[0].get("machine", {})
    facts = [machine.get("device", ""), *(f"{n} {machine[n]}" for n in ("torch", "triton") if n in machine)]
    figure.suptitle(", ".join(filter(None, facts)), fontsize=10, color=INK)
    handles, labels = _all_handles(grid[0])
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def _draw_rates(axes: Any, rows: list[dict[str, Any]], label: str, style: dict[str, str]) -> None:
    rows = sorted(rows, key=lambda row: row["img_size"])
    middle = [row["batch_size"] / milliseconds(row) * 1e3 for row in rows]
    low = [row["batch_size"] / max(times(row)) * 1e3 for row in rows]
    high = [row["batch_size"] / min(times(row)) * 1e3 for row in rows]
    _draw_line(axes, [row["img_size"] for row in rows], middle, low, high, style, label)


def _draw_growth(axes: Any, rows: list[dict[str, Any]], style: dict[str, str]) -> None:
    rows = sorted(rows, key=lambda row: row["tokens"])
    middle = [milliseconds(row) / row["batch_size"] for row in rows]
    low = [min(times(row)) / row["batch_size"] for row in rows]
    high = [max(times(row)) / row["batch_size"] for row in rows]
    _draw_line(axes, [row["tokens"] for row in rows], middle, low, high, style, "")


def _draw_line(axes, x, middle, low, high, style, label) -> None:
    below = [m - value for m, value in zip(middle, low, strict=True)]
    above = [value - m for m, value in zip(middle, high, strict=True)]
    axes.errorbar(x, middle, [below, above], label=label, linewidth=1.6, markersize=5, capsize=2, **style)


def _label(axes: Any, name: str, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(name, color=INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _all_handles(row: Any) -> tuple[list[Any], list[str]]:
    """One handle for each label of a row of axes."""
    found = {}
    for axes in row:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


if __name__ == "__main__":
    main()
