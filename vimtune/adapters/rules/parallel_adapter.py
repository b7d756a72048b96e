"""Parallel adapter (He et al. 2022, arXiv 2110.04366) as MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855)
puts it beside out_proj:

    y = W u + s up drop(relu(down u))

u (..., in) is the input of the layer, y (..., out) its output, without biases: r (in + out) numbers for each
layer, 442,368 for Vim-tiny at r = 32. The relu lies between, so that no weight can express it.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.rule import Call, CallRule


class ParallelAdapterRule(CallRule):
    """`down` (r, in) starts at random as a linear layer does, `up` (out, r) at zero.

    Args:
        like: any tensor with the layer's dtype and device.
        rows, columns: out and in of the layer.
        rank: r.
        scale: s.
        dropout: probability with which dropout acts on the r numbers in training.
    """

    may_be_off = True

    def __init__(
        self, like: Tensor, rows: int, columns: int, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(like.new_empty(rank, columns))
        self.up = nn.Parameter(like.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def around(self, call: Call, x: Tensor, *flow: dict[str, Tensor]) -> Tensor:
        hidden = self.dropout(F.relu(F.linear(x, self.down)))
        result: Tensor = call(x)
        return result + F.linear(hidden, self.scale * self.up)
