"""DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): W'_i = m_i V_i / ||V_i||, V = W + (alpha / r) B A."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.base import check_matrix, register_method
from vimtune.adapters.lora import LoRA, LoRARule
from vimtune.adapters.rule import WeightRule, exact


class DoRARule(LoRARule):
    """`magnitude` (out,) starts at the norms of the rows of W. The norm of V is a constant for the
    gradient (section 4.3 of the paper)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(weight, rank, alpha, dropout)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(weight.detach(), dim=1))

    def row_scale(self, updated: Tensor) -> Tensor:
        """m / ||V|| (out,)."""
        return self.magnitude / torch.linalg.vector_norm(updated.detach(), dim=1)

    def effective_weight(self, weight: Tensor) -> Tensor:
        updated = super().effective_weight(weight)
        return self.row_scale(updated)[:, None] * updated

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with exact(weight):
            with torch.no_grad():
                updated = LoRARule.effective_weight(self, weight)  # no super(): dynamo fails on it in here
            row_scale = self.row_scale(updated)
            main_weight = row_scale[:, None] * weight
        return F.linear(x, main_weight, bias) + self.branch(x, row_scale)


@register_method("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    summary = "low-rank update of the directions, free magnitude of each row (Liu et al. 2024)"

    def build_rule(self, path: str, weight: Tensor) -> WeightRule:
        check_matrix(self.name, path, weight, self.rank)
        return DoRARule(weight, self.rank, self.alpha, self.dropout)
