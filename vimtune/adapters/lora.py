"""LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3): W' = W + (alpha / r) B A."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.base import Method, check_matrix, option, register_method
from vimtune.adapters.rule import WeightRule, exact


class LowRank(nn.Module):
    """The branch eps = scale B A, `lora_A` (r, in) and `lora_B` (out, r); zero at the start."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.lora_A = nn.Parameter(weight.new_empty(rank, columns))
        self.lora_B = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def matrix(self) -> Tensor:
        """(out, in)."""
        return (self.scale * self.lora_B) @ self.lora_A

    def forward(self, x: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out), with dropout on the input; `row_scale` (out,) scales the result."""
        up = self.scale * self.lora_B
        if row_scale is not None:  # the small factor rather than the large result
            up = row_scale[:, None] * up
        return F.linear(F.linear(self.dropout(x), self.lora_A), up)


class LoRARule(WeightRule):
    """The branch beside a weight, W + eps.

    The sum is multiplied at once. The factored form W x + B (A x) takes longer in a training step, on a CPU
    mostly and on a GPU always (benchmarks/RESULTS.md), and serves dropout alone.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.branch = LowRank(weight, rank, alpha, dropout)

    def main_weight(self, weight: Tensor) -> Tensor:
        """What the branch is added to."""
        return weight

    def effective_weight(self, weight: Tensor) -> Tensor:
        return self.main_weight(weight) + self.branch.matrix()

    @property
    def acts_on_input(self) -> bool:
        return self.training and isinstance(self.branch.dropout, nn.Dropout)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with exact(weight):
            main_weight = self.main_weight(weight)
        return F.linear(x, main_weight, bias) + self.branch(x)


def check_low_rank_options(alpha: float, dropout: float) -> None:
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


@register_method("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    summary = "low-rank update of the projectors (Hu et al. 2021)"

    rank: int = option(16, "r, columns of B and rows of A")
    alpha: float = option(8.0, "the update is scaled by alpha / rank")
    dropout: float = option(0.0, "dropout on the input of A, where the layer is called rather than read")

    def __post_init__(self) -> None:
        check_low_rank_options(self.alpha, self.dropout)

    def build_rule(self, path: str, weight: Tensor) -> WeightRule:
        check_matrix(self.name, path, weight, self.rank)
        return LoRARule(weight, self.rank, self.alpha, self.dropout)
