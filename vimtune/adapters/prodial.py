"""ProDiaL (Ham et al. 2025, arXiv 2411.15224, equations 4 to 6): W' = s W D_b + eps.

    D_b = [I - relu(I * D_a)] + (1 - I) * D_a,    D_a = diag(x_1, ..., x_n),    eps = (alpha / r) B A

D_a is block diagonal with n square blocks, `*` is elementwise, `s` scales each output row. Adapted
are the projectors of every block; all else is frozen.

At the published start D_a = 0 the diagonal sits exactly on relu's kink, where PyTorch's gradient is
0: under `variant="paper"`, the formula to the letter, the diagonal of D_b stays 1 for ever and only the
entries off the diagonal of a block train. The default, `variant="free"`, is D_b = I + D_a: the same
function at the start, and every entry trains.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.base import check_matrix, option, register_method
from vimtune.adapters.lora import LoRA, LoRARule
from vimtune.adapters.rule import WeightRule
from vimtune.ops.block_product import scaled_block_product
from vimtune.text import quote

logger = logging.getLogger(__name__)

VARIANTS = ("free", "paper")


class ProDiaLRule(LoRARule):
    """`blocks` (n, b, b) holds D_a, `row_scale` (out,) holds s."""

    def __init__(
        self, weight: Tensor, rank: int, alpha: float, dropout: float, block_size: int, variant: str
    ) -> None:
        super().__init__(weight, rank, alpha, dropout)
        rows, columns = weight.shape
        self.variant = variant
        self.blocks = nn.Parameter(weight.new_zeros(columns // block_size, block_size, block_size))
        self.row_scale = nn.Parameter(weight.new_ones(rows))

    def offset(self) -> Tensor:
        """D_b - I as its blocks, (n, b, b)."""
        if self.variant == "free":
            return self.blocks
        identity = torch.eye(self.blocks.shape[-1], dtype=self.blocks.dtype, device=self.blocks.device)
        return (1 - identity) * self.blocks - F.relu(identity * self.blocks)

    def main_weight(self, weight: Tensor) -> Tensor:
        """s W D_b = s (W + W (D_b - I))."""
        return scaled_block_product(weight, self.row_scale, self.offset())


@register_method("prodial")
@dataclass(frozen=True, kw_only=True)
class ProDiaL(LoRA):
    summary = "diagonal-centric transformation of the projectors plus low rank (Ham et al. 2025)"

    block_size: int = option(4, "b, side of the blocks of D_a; must divide the input width")
    variant: str = option(
        "free", '"free": D_b = I + D_a; "paper": the published formula, whose diagonal never trains'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.variant == "paper" and self.block_size == 1:
            logger.warning(
                'ProDiaL: in variant "paper" with block_size 1 nothing of D_a ever trains, its diagonal has '
                'no gradient; variant "free" or larger blocks do'
            )

    def build_rule(self, path: str, weight: Tensor) -> WeightRule:
        _, columns = check_matrix(self.name, path, weight, self.rank)
        if self.block_size < 1 or columns % self.block_size:
            divisors = [str(size) for size in range(1, min(columns, 64) + 1) if columns % size == 0]
            raise ValueError(
                f"block_size {quote(self.block_size)} does not divide the input width {columns} of {path}; "
                f"possible: {', '.join(divisors)}"
            )
        return ProDiaLRule(weight, self.rank, self.alpha, self.dropout, self.block_size, self.variant)
