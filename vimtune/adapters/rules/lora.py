"""LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3): W' = W + (alpha / r) B A."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule


class LowRank(nn.Module):
    """The branch eps = (alpha / r) B A, `lora_A` (r, in) and `lora_B` (out, r); zero at the start."""

    def __init__(
        self, rows: int, columns: int, like: Tensor, rank: int, alpha: float, dropout: float
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(like.new_empty(rank, columns))
        self.lora_B = nn.Parameter(like.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def matrix(self) -> Tensor:
        """(out, in)."""
        return (self.scale * self.lora_B) @ self.lora_A

    def perturbation(self, x: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """What dropout on the input of the branch changes of its output.

        Args:
            x: the layer's input (..., in).
            row_scale: (out,), by which the branch is scaled; None for 1.

        Returns:
            eps (dropout(x) - x), scaled, (..., out).
        """
        up = self.scale * self.lora_B
        if row_scale is not None:  # Scaling the small factor costs less than scaling the large result.
            up = row_scale[:, None] * up
        return F.linear(F.linear(self.dropout(x) - x, self.lora_A), up)


class LoRARule(WeightRule):
    """The branch beside a weight, W + eps; of a convolution the kernels of one output are one row of W.

    The sum is multiplied at once. The factored form W x + B (A x) takes longer in a training step, on a CPU
    mostly and on a GPU always (benchmarks/RESULTS.md).
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.branch = LowRank(rows, columns, weight, rank, alpha, dropout)
        self.perturbs = dropout > 0

    def main_weight(self, weight: Tensor) -> Tensor:
        """What the branch is added to."""
        return weight

    def effective_weight(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        return (self.main_weight(matrix) + self.branch.matrix()).view_as(weight)

    def perturbation(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.branch.perturbation(x)
