"""How far each group of parameters has moved, layer by layer.

The groups are those of the component study of ProDiaL (Ham et al. 2025, arXiv 2411.15224). Movement says what
training has used; which group is worth training at the same budget is another question, for which
`benchmarks/components.yaml` is a plan of `vimtune compare`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure
from torch import Tensor

from vimtune.analysis.drawing import plain_numbers
from vimtune.analysis.parameters import group_of, layer_of
from vimtune.analysis.subject import Subject
from vimtune.pages.section import Picture, Section, Table
from vimtune.pages.style import picture_style, whole_numbers


@dataclass(frozen=True)
class Movement:
    """How far parameters have moved."""

    change: float = 0.0
    """Sum of squared changes."""
    size: float = 0.0
    """Sum of squares before."""
    parameters: int = 0
    """How many numbers they are."""

    def __add__(self, other: Movement) -> Movement:
        return Movement(
            self.change + other.change, self.size + other.size, self.parameters + other.parameters
        )

    @property
    def relative(self) -> float | None:
        """||W' - W|| / ||W||; None for what was 0 before."""
        return math.sqrt(self.change / self.size) if self.size else None

    @property
    def step(self) -> float:
        """Root mean square of the changes of single numbers."""
        return math.sqrt(self.change / self.parameters) if self.parameters else 0.0


Movements = dict[str, dict[int | None, Movement]]
"""By group and layer; None stands for what belongs to no layer."""


def movements(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Movements:
    """How far each group of parameters has moved in each layer.

    Args:
        before: parameters by path.
        after: the same paths afterwards; a parameter of another shape is left out.
    """
    found: Movements = {}
    for path, value in before.items():
        if after[path].shape != value.shape:
            continue
        old, new = value.double(), after[path].double()
        own = Movement(float((new - old).square().sum()), float(old.square().sum()), value.numel())
        layers = found.setdefault(group_of(path), {})
        layers[layer_of(path)] = layers.get(layer_of(path), Movement()) + own
    return found


def analyze(subject: Subject) -> Section:
    """The relative change ||W' - W|| / ||W|| of every group, in all and by layer."""
    found = movements(subject.weights_before, subject.weights_after)
    # The head is another one for every data set, and means nothing before training.
    found.pop("head", None)
    wholes = {group: sum(layers.values(), Movement()) for group, layers in found.items()}
    all_change = sum(whole.change for whole in wholes.values())
    shares = {group: whole.change / all_change if all_change else 0.0 for group, whole in wholes.items()}
    moved = sorted((group for group, own in wholes.items() if own.change), key=lambda name: -shares[name])
    drawn = {group: found[group] for group in moved if any(layer is not None for layer in found[group])}
    return Section(
        title="Which parameters have moved",
        explanation="The relative change ||W' - W|| / ||W|| of each group of parameters, where W' is what "
        "the model computes with after training, adapters included. The share is that of the group in the "
        "sum of squared changes, the change of a number is its root mean square, which optimisers like Adam "
        "make much the same for all; the head, which is new, is left out of both. Methods that act on calls, "
        "such as prompts, move no parameter.",
        findings=[
            f"Relative change: {', '.join(f'{group} {_percent(wholes[group])}' for group in moved)}."
            if moved
            else "No parameter of the backbone has moved: what was trained is the head, or acts on calls."
        ],
        numbers={
            group: {
                "parameters": whole.parameters,
                "relative_change": whole.relative,
                "rms_change": whole.step,
                "share_of_change": shares[group],
                "layers": {str(layer): own.relative for layer, own in found[group].items()},
            }
            for group, whole in wholes.items()
        },
        tables=[
            Table(
                "All layers together",
                ["group", "parameters", "relative change", "change of a number", "share"],
                [
                    [
                        group,
                        f"{whole.parameters:,}",
                        _percent(whole),
                        f"{whole.step:.2e}",
                        f"{100 * shares[group]:.1f} %",
                    ]
                    for group, whole in wholes.items()
                ],
            )
        ],
        pictures=[
            Picture(
                "The relative change by layer; groups that have not moved are left out.",
                _draw(drawn),
            )
        ]
        if drawn
        else [],
    )


def _percent(movement: Movement) -> str:
    return "-" if movement.relative is None else f"{100 * movement.relative:.2f} %"


def _draw(moved: Movements) -> Figure:
    with picture_style():
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for group, layers in moved.items():
            inside = {layer: own.relative for layer, own in layers.items() if layer is not None}
            points = sorted((layer, 100 * value) for layer, value in inside.items() if value)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=group)
        axes.set(xlabel="layer", ylabel="||W' - W|| / ||W||, %", yscale="log")
        axes.xaxis.set_major_locator(whole_numbers())
        axes.grid(alpha=0.3)
        plain_numbers(axes.yaxis)
        figure.legend(loc="outside right upper")
        return figure
