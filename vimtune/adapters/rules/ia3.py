"""IA3 (Liu et al. 2022, arXiv 2205.05638): W' = diag(l) W, or W' = W diag(l)."""

from __future__ import annotations

from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule


class IA3Rule(WeightRule):
    """`scale` holds l, ones at the start: out numbers for the outputs of a weight, or in for its inputs."""

    def __init__(self, weight: Tensor, side: str) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.side = side
        self.scale = nn.Parameter(weight.new_ones(rows if side == "output" else columns))

    def effective_weight(self, weight: Tensor) -> Tensor:
        scale = self.scale[:, None] if self.side == "output" else self.scale
        return (weight.flatten(1) * scale).view_as(weight)
