"""How far each group of parameters has moved, layer by layer.

The groups are those of the component study of ProDiaL (Ham et al. 2025, arXiv 2411.15224). Movement says what
training has used; which group is worth training at the same budget is another question, for which
`benchmarks/components.yaml` is a plan of `vimtune compare`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from vimtune.analysis.drawing import plain_numbers
from vimtune.analysis.parameters import group_of, layer_of
from vimtune.analysis.section import Picture, Section, Table
from vimtune.analysis.subject import Subject
from vimtune.training.pictures import picture_style, whole_numbers

OUTSIDE = -1
"""Stands for the index of a layer where a parameter belongs to none."""


def movements(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, dict[int, tuple[float, float, int]]]:
    """Squared change, squared size before, and number of parameters, by group and layer.

    Args:
        before: parameters by path.
        after: the same paths afterwards; a parameter of another shape is left out.
    """
    found: dict[str, dict[int, tuple[float, float, int]]] = defaultdict(dict)
    for path, value in before.items():
        if after[path].shape != value.shape:
            continue
        layer = layer_of(path)
        place = OUTSIDE if layer is None else layer
        change, size, count = found[group_of(path)].get(place, (0.0, 0.0, 0))
        old, new = value.double(), after[path].double()
        found[group_of(path)][place] = (
            change + float((new - old).square().sum()),
            size + float(old.square().sum()),
            count + value.numel(),
        )
    return dict(found)


def analyze(subject: Subject) -> Section:
    """The relative change ||W' - W|| / ||W|| of every group, in all and by layer."""
    found = movements(subject.weights_before, subject.weights_after)
    # The head is another one for every data set, and of no size before training.
    heads = found.pop("head", {})
    whole = sum(change for layers in found.values() for change, _, _ in layers.values())
    numbers: dict[str, dict[str, object]] = {}
    for group, layers in found.items():
        change, size, count = (sum(each) for each in zip(*layers.values(), strict=True))
        numbers[group] = {
            "parameters": int(count),
            "relative_change": _relative(change, size),
            "share_of_change": change / whole if whole else 0.0,
            "layers": {
                layer: _relative(own, old) for layer, (own, old, _) in sorted(layers.items()) if layer >= 0
            },
        }
    moved = {group: own for group, own in numbers.items() if own["relative_change"]}
    rows = [
        [
            group,
            f"{own['parameters']:,}",
            f"{100 * _number(own['relative_change']):.2f} %",
            f"{100 * _number(own['share_of_change']):.1f} %",
        ]
        for group, own in numbers.items()
    ]
    order = sorted(moved, key=lambda group: -_number(moved[group]["relative_change"]))
    findings = [
        ", ".join(f"{group} {100 * _number(moved[group]['relative_change']):.2f} %" for group in order)
        + " of their size: the change of each group that has moved."
        if moved
        else "No parameter of the backbone has moved: what was trained is the head, or acts on calls."
    ]
    return Section(
        title="Which parameters have moved",
        explanation="The relative change ||W' - W|| / ||W|| of each group of parameters, where W' is what "
        "the model computes with after training, adapters included. The share is that of the group in the "
        "sum of squared changes; the head, which is new, is left out of both. Methods that act on calls, "
        "such as prompts, move no parameter.",
        findings=findings,
        numbers={"groups": numbers, "head_parameters": sum(count for _, _, count in heads.values())},
        tables=[Table("All layers together", ["group", "parameters", "relative change", "share"], rows)],
        pictures=[
            Picture("The relative change by layer; groups that have not moved are left out.", _draw(moved))
        ]
        if any(own["layers"] for own in moved.values())
        else [],
    )


def _relative(change: float, size: float) -> float | None:
    return math.sqrt(change / size) if size else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _draw(moved: Mapping[str, Mapping[str, object]]) -> Figure:
    with picture_style():
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for group, own in moved.items():
            layers = own["layers"]
            assert isinstance(layers, dict)
            points = [(layer, 100 * value) for layer, value in layers.items() if value]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=group)
        axes.set(xlabel="layer", ylabel="||W' - W|| / ||W||, %", yscale="log")
        axes.xaxis.set_major_locator(whole_numbers())
        axes.grid(alpha=0.3)
        plain_numbers(axes.yaxis)
        figure.legend(loc="outside right upper")
        return figure
