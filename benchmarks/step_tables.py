"""Tables over the rows of gpu_step.json; times are milliseconds a step.

python benchmarks/step_tables.py results/gpu_step.json           # all of them, also of a run cut short
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

VIT, OFFICIAL = "vit", "cuda"
ADAPTER_CLAIMS = (("lora", "frozen", 1.10), ("prodial", "lora", 1.05))
"""(method, compared with, at most this many times its step)."""
GROWTH_METHODS = ("forward", "prodial", "full")
LOSS_TOLERANCE = 0.02
RESOURCES = {
    "bytes": "memory",
    "matmul_flops": "matmul",
    "exponentials": "exp",
    "instructions": "fp32",
}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/step_tables.py PATH/gpu_step.json")
    report = json.loads(Path(sys.argv[1]).read_text())
    rows = report["rows"]
    for img_size in dict.fromkeys(row["img_size"] for row in rows):
        own = [row for row in rows if row["img_size"] == img_size]
        print(f"\n{report['scale']}, {img_size} px, batch {own[0]['batch_size']}")
        print(size_table(own))
        print(ratio_table(own))
    print(growth_table(rows))
    print(roofline_table(rows, report.get("ceilings", {})))


def measured(rows: Iterable[Row]) -> list[Row]:
    """Rows that have a time."""
    return [row for row in rows if row.get("samples") or row.get("eager_ms")]


def times(row: Row) -> list[float]:
    """Samples of the rounds; of the single eager steps where the run ended before any round."""
    return row["samples"] or row["eager_ms"]


def milliseconds(row: Row) -> float:
    return statistics.median(times(row))


def size_table(rows: Sequence[Row]) -> str:
    """All cases of one image size, and a line for each whose loss differs from that of the others."""
    columns = ("kernels", "method", "ms", "fastest", "slowest", "eager ms", "img/s", "GiB", "graph")
    found = measured(rows)
    lines = []
    for row in found:
        peak = row["peak_gib"]
        lines.append(
            [
                *(row["kernels"], row["method"]),
                *(f"{value:.2f}" for value in (milliseconds(row), min(times(row)), max(times(row)))),
                f"{statistics.median(row['eager_ms']):.2f}",
                f"{row['batch_size'] / milliseconds(row) * 1e3:.0f}",
                "" if peak is None else f"{peak:.2f}",
                "yes" if row["graph"] else "no",
            ]
        )
    return "\n".join([_table(columns, lines), *_different_losses(found)])


def _different_losses(rows: Sequence[Row]) -> list[str]:
    """Same seed, same images: kernels that compute the same thing begin with the same loss."""
    notes = []
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row["model"], row["method"]), []).append(row)
    for (_, method), group in by_case.items():
        middle = statistics.median(row["first_loss"] for row in group)
        for row in group:
            if not abs(row["first_loss"] - middle) <= LOSS_TOLERANCE * abs(middle):
                notes.append(
                    f"WRONG? {row['kernels']} {method} begins with a loss of {row['first_loss']:.4f}, "
                    f"the others with {middle:.4f}"
                )
    return notes


def ratio_table(rows: Sequence[Row]) -> str:
    """Ratios of step times (and of memory) that are claimed or asked for, from rounds they shared."""
    found = {(row["kernels"], row["method"]): row for row in measured(rows)}
    names = list(dict.fromkeys(kernels for kernels, _ in found))
    lines = []
    for kernels in names:
        for method, other, limit in ADAPTER_CLAIMS:
            if (kernels, method) in found and (kernels, other) in found:
                ratio = _ratio(found[kernels, method], found[kernels, other])
                lines.append([f"{kernels}: {method} / {other}", *ratio, f"at most {limit:.2f}"])
    for base in (VIT, OFFICIAL):
        for (kernels, method), row in found.items():
            if kernels not in (VIT, OFFICIAL) and (base, method) in found:
                lines.append(
                    [
                        f"{method}: {kernels} / {base}",
                        *_ratio(row, found[base, method]),
                        _memory(row, found[base, method]),
                    ]
                )
    if not lines:
        return ""
    return _table(("ratio of step times", "median", "least", "most", ""), lines)


def _ratio(one: Row, other: Row) -> list[str]:
    if one["samples"] and other["samples"]:
        ratios = [a / b for a, b in zip(one["samples"], other["samples"], strict=False)]
    else:
        ratios = [milliseconds(one) / milliseconds(other)]
    return [f"{value:.3f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]


def _memory(one: Row, other: Row) -> str:
    if not one["peak_gib"] or not other["peak_gib"]:
        return ""
    return f"memory {one['peak_gib'] / other['peak_gib']:.2f}"


def growth_table(rows: Sequence[Row]) -> str:
    """Microseconds an image over the number of tokens, and the exponent from one size to the next."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    for row in measured(rows):
        if row["method"] in GROWTH_METHODS:
            per_image = milliseconds(row) / row["batch_size"] * 1e3
            series.setdefault((row["kernels"], row["method"]), {})[row["tokens"]] = per_image
    tokens = sorted({count for points in series.values() for count in points})
    if len(tokens) < 2:
        return ""
    lines = []
    for (kernels, method), points in series.items():
        cells = [kernels, method]
        for index, count in enumerate(tokens):
            cell = f"{points[count]:.1f}" if count in points else ""
            before = tokens[index - 1] if index else None
            if cell and before in points:
                exponent = math.log(points[count] / points[before]) / math.log(count / before)
                cell += f" ({exponent:.2f})"
            cells.append(cell)
        cells.append(_exponent(points))
        lines.append(cells)
    title = "growth: us an image (exponent since the column before); exponent of the whole by least squares"
    return f"\n{title}\n" + _table(("kernels", "method", *(f"{n} tokens" for n in tokens), "exponent"), lines)


def _exponent(points: dict[int, float]) -> str:
    if len(points) < 2:
        return ""
    logs = [(math.log(tokens), math.log(time)) for tokens, time in points.items()]
    return f"{statistics.linear_regression(*zip(*logs, strict=True)).slope:.2f}"


def roofline_table(rows: Sequence[Row], ceilings: dict[str, float]) -> str:
    """Measured steps against what has to be done (counts.py) at the measured rates (ceilings.py).

    The share of a resource is the time it needs at its ceiling over the time the step takes; the floor
    is the longest of these times.
    """
    names = [name for name in RESOURCES if ceilings.get(name)]
    found = [row for row in measured(rows) if "counts" in row]
    if not names or not found:
        return ""
    counted: dict[tuple[int, str], list[str]] = {}
    lines = []
    for row in found:
        needed = {name: row["counts"][name] / ceilings[name] * 1e3 for name in names}
        share = (f"{100 * time / milliseconds(row):.1f}" for time in needed.values())
        floor = f"{max(needed.values()):.2f}"
        label = [str(row["img_size"]), row["kernels"], row["method"]]
        lines.append([*label, f"{milliseconds(row):.2f}", floor, *share])
        amounts = (f"{row['counts'][name] / 1e9:.4g}" for name in names)
        batch = str(row["batch_size"])
        counted[row["img_size"], row["method"]] = [label[0], batch, label[2], *amounts, floor]
    shares = _table(
        ("px", "kernels", "method", "ms", "floor ms", *(f"{RESOURCES[name]} %" for name in names)), lines
    )
    amounts_table = _table(
        ("px", "batch", "method", *(f"G {RESOURCES[name]}" for name in names), "floor ms"),
        list(counted.values()),
    )
    return (
        f"\ncounted: bytes, FLOPs, exponentials, fp32 instructions of a step\n{amounts_table}\n"
        f"\nroofline: share of the measured ceilings\n{shares}"
    )


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    is_number = [all(_is_number(line[index]) for line in lines) for index in range(len(columns))]

    def render(cells: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, is_number, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join(render(cells) for cells in (columns, *lines))


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit()


if __name__ == "__main__":
    main()
