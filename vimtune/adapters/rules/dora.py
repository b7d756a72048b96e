"""DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): W'_i = m_i V_i / ||V_i||, V = W + s B A.

V_i is a row of V, so that m (out,) has one magnitude for each output, as in HF peft; or it is a column, so
that m (in,) has one for each input, as in the code of MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855).
That makes r (in + out) + out numbers, or r (in + out) + in, for each weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import exact
from vimtune.adapters.rules.lora import LoRARule, LowRank

Axis = Literal["output", "input"]
"""For what each magnitude is: a row of the weight, or a column."""


class DoRARule(LoRARule):
    """`magnitude` (out,) or (in,) starts at the norms of the rows or columns of W. The norm of V is a
    constant for the gradient (section 4.3 of the paper)."""

    def __init__(self, weight: Tensor, branch: LowRank, axis: Axis) -> None:
        super().__init__(branch)
        self.axis = axis
        self.magnitude = nn.Parameter(self.norms(weight.detach().flatten(1)))

    def norms(self, matrix: Tensor) -> Tensor:
        """Those of the rows or columns of a matrix (out, in), (out,) or (in,)."""
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=1 if self.axis == "output" else 0)
        return norms

    def direction_scale(self, updated: Tensor) -> Tensor:
        """m / ||V|| for V (out, in), (out,) or (in,)."""
        return self.magnitude / self.norms(updated.detach())

    def effective_weight(self, weight: Tensor) -> Tensor:
        updated = weight.flatten(1) + self.branch.matrix()
        scale = self.direction_scale(updated)
        return ((scale[:, None] if self.axis == "output" else scale) * updated).view_as(weight)

    def low_rank(self, weight: Tensor) -> None:
        return None  # the magnitudes multiply W, too

    def perturbation(self, x: Tensor, weight: Tensor) -> Tensor:
        with exact(weight), torch.no_grad():
            updated = weight + self.branch.matrix()
        with exact(weight):
            scale = self.direction_scale(updated)
        if self.axis == "output":
            return self.branch.perturbation(x, row_scale=scale)
        return self.branch.perturbation(x, column_scale=scale)
