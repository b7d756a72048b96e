"""ProDiaL (Ham et al. 2025, arXiv 2411.15224, equations 4 to 6): W' = s W D_b + eps.

    D_b = [I - relu(I * D_a)] + (1 - I) * D_a,    D_a = diag(x_1, ..., x_n),    eps = (alpha / r) B A

D_a is block diagonal with n square blocks, `*` is elementwise, `s` scales each output row. Adapted
are the projectors of every block; all else is frozen.

At the published start D_a = 0 the diagonal sits exactly on relu's kink, where PyTorch's gradient is
0: under `variant="paper"`, the formula to the letter, the diagonal of D_b stays 1 for ever and only the
entries off the diagonal of a block train. Other variants are the same function at the start, and every entry
trains. With x for the diagonal of D_a they have, off the diagonal D_a as above and on it

    exp    e^x           (the default) positive, and as far from 1 by x as by -x in ratio
    free   1 + x         any number
    tanh   1 + tanh x    from 0 to 2

With blocks of one entry D_b has a diagonal alone. Trained are r (in + out) + b in + out numbers for each
weight, and without s (`train_scale`) out fewer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.rules.lora import LoRARule, LowRank
from vimtune.ops.block_product import scaled_block_product

Variant = Literal["free", "exp", "tanh", "paper"]
"""What the diagonal of D_b is."""


class ProDiaLRule(LoRARule):
    """`blocks` (n, b, b) holds D_a. `row_scale` (out,) holds s or, where weight decay is to pull s towards 1,
    `row_scale_offset` holds s - 1.

    Args:
        weight: W (out, in).
        branch: eps.
        block_size: b.
        variant: what the diagonal of D_b is.
        train_scale: whether s trains.
        scale_decay: weight decay of s towards 1, as a multiple of the run's; 0 for none.
        lr_ratio: how many times as fast as A of the branch D_a and s learn.
    """

    row_scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        branch: LowRank,
        block_size: int,
        variant: Variant,
        *,
        train_scale: bool = True,
        scale_decay: float = 0.0,
        lr_ratio: float = 1.0,
    ) -> None:
        super().__init__(branch)
        rows, columns = weight.flatten(1).shape
        self.variant = variant
        self.scale_decay = scale_decay
        self.lr_ratio = lr_ratio
        self.blocks = nn.Parameter(weight.new_zeros(columns // block_size, block_size, block_size))
        if not train_scale:
            self.register_buffer("row_scale", weight.new_ones(rows), persistent=False)
        elif scale_decay > 0:
            self.row_scale_offset = nn.Parameter(weight.new_zeros(rows))
        else:
            self.row_scale = nn.Parameter(weight.new_ones(rows))

    def low_rank(self, weight: Tensor) -> None:
        return None  # s and D_b multiply W

    def decay(self, tensor: str, exempt: bool) -> float:
        return self.scale_decay if tensor == "row_scale_offset" else super().decay(tensor, exempt)

    def learning_rate(self, tensor: str) -> float:
        return super().learning_rate(tensor) if tensor.startswith("branch.") else self.lr_ratio

    def idle_entries(self, tensor: str) -> Tensor | None:
        if tensor != "blocks" or self.variant != "paper":
            return None
        size = self.blocks.shape[-1]
        return torch.eye(size, dtype=torch.bool, device=self.blocks.device).expand_as(self.blocks)

    def offset(self) -> Tensor:
        """D_b - I as its blocks, (n, b, b)."""
        if self.variant == "free":
            return self.blocks
        diagonal = torch.eye(self.blocks.shape[-1], dtype=torch.bool, device=self.blocks.device)
        return torch.where(diagonal, self.diagonal_offset(self.blocks), self.blocks)

    def diagonal_offset(self, x: Tensor) -> Tensor:
        """What an entry of the diagonal of D_b is beyond 1; it is 0 at 0."""
        if self.variant == "exp":
            return torch.expm1(x)
        return torch.tanh(x) if self.variant == "tanh" else -F.relu(x)

    def main_weight(self, weight: Tensor) -> Tensor:
        """s W D_b = s (W + W (D_b - I))."""
        row_scale = 1 + self.row_scale_offset if self.scale_decay > 0 else self.row_scale
        return scaled_block_product(weight, row_scale, self.offset())
