"""DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): W'_i = m_i V_i / ||V_i||, V = W + (alpha / r) B A."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import exact
from vimtune.adapters.rules.lora import LoRARule


class DoRARule(LoRARule):
    """`magnitude` (out,) starts at the norms of the rows of W. The norm of V is a constant for the
    gradient (section 4.3 of the paper)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(weight, rank, alpha, dropout)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(weight.detach().flatten(1), dim=1))

    def row_scale(self, updated: Tensor) -> Tensor:
        """m / ||V|| (out,) for V (out, in)."""
        norms: Tensor = torch.linalg.vector_norm(updated.detach(), dim=1)
        return self.magnitude / norms

    def effective_weight(self, weight: Tensor) -> Tensor:
        updated = weight.flatten(1) + self.branch.matrix()
        return (self.row_scale(updated)[:, None] * updated).view_as(weight)

    def perturbation(self, x: Tensor, weight: Tensor) -> Tensor:
        with exact(weight), torch.no_grad():
            updated = weight + self.branch.matrix()
        with exact(weight):
            row_scale = self.row_scale(updated)
        return self.branch.perturbation(x, row_scale)
