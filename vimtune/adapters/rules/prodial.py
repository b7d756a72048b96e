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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.rules.lora import LoRARule, LowRank
from vimtune.ops.block_product import scaled_block_product


class ProDiaLRule(LoRARule):
    """`blocks` (n, b, b) holds D_a. `row_scale` (out,) holds s or, where weight decay is to pull s towards 1,
    `row_scale_offset` holds s - 1."""

    def __init__(
        self,
        weight: Tensor,
        branch: LowRank,
        block_size: int,
        variant: str,
        scale_decay: float = 0.0,
    ) -> None:
        super().__init__(branch)
        rows, columns = weight.flatten(1).shape
        self.variant = variant
        self.scale_decay = scale_decay
        self.blocks = nn.Parameter(weight.new_zeros(columns // block_size, block_size, block_size))
        if scale_decay > 0:
            self.row_scale_offset = nn.Parameter(weight.new_zeros(rows))
        else:
            self.row_scale = nn.Parameter(weight.new_ones(rows))

    def decay(self, tensor: str, exempt: bool) -> float:
        return self.scale_decay if tensor == "row_scale_offset" else super().decay(tensor, exempt)

    def idle_entries(self, tensor: str) -> Tensor | None:
        if tensor != "blocks" or self.variant == "free":
            return None
        size = self.blocks.shape[-1]
        return torch.eye(size, dtype=torch.bool, device=self.blocks.device).expand_as(self.blocks)

    def offset(self) -> Tensor:
        """D_b - I as its blocks, (n, b, b)."""
        if self.variant == "free":
            return self.blocks
        identity = torch.eye(self.blocks.shape[-1], dtype=self.blocks.dtype, device=self.blocks.device)
        return (1 - identity) * self.blocks - F.relu(identity * self.blocks)

    def main_weight(self, weight: Tensor) -> Tensor:
        """s W D_b = s (W + W (D_b - I))."""
        row_scale = 1 + self.row_scale_offset if self.scale_decay > 0 else self.row_scale
        return scaled_block_product(weight, row_scale, self.offset())
