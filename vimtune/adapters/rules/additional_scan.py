"""Additional-scan (MambaPEFT, arXiv 2411.03855, section 4.3): more states for every channel of a scan.

    A_log (E, N)             becomes  [A_log, A'],              A' (E, n)
    x_proj (R + 2 N, E)      becomes  [dt; B; B'; C; C'],       B', C' (n, E)

The order of the states does not matter, so the new ones stand behind the old ones. Their A is the pretrained
first column. The published code draws B' and C' at random, which changes what the model computes before
anything is trained; here C' is zero, so that nobody reads the new states at first, and B' is random.

Trained are 3 n E numbers for each layer and direction, of Vim-tiny with 6 states 331,776. The merged model is
a plain one with N + n states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule


class MoreDecays(WeightRule):
    """`A_log` (E, n) holds A'. It does not decay, as little as the columns beside it."""

    batchable = False

    def __init__(self, A_log: Tensor, num_states: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(A_log[:, :1].repeat(1, num_states))

    def effective_weight(self, weight: Tensor) -> Tensor:
        return torch.cat([weight, self.A_log], 1)

    def decay(self, tensor: str, exempt: bool) -> float:
        return 0.0


class MoreProjections(WeightRule):
    """`B` and `C` (n, E) hold the rows B' and C'.

    Args:
        x_proj: the projection (R + 2 N, E).
        old_states: N.
        num_states: n.
    """

    batchable = False

    def __init__(self, x_proj: Tensor, old_states: int, num_states: int) -> None:
        super().__init__()
        self.old_states = old_states
        self.B = nn.Parameter(x_proj.new_empty(num_states, x_proj.shape[1]))
        self.C = nn.Parameter(x_proj.new_zeros(num_states, x_proj.shape[1]))
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))  # as torch draws the rows of linear layers

    def effective_weight(self, weight: Tensor) -> Tensor:
        before_C = weight.shape[0] - self.old_states
        return torch.cat([weight[:before_C], self.B, weight[before_C:], self.C])
