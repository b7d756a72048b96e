"""OFT (Qiu et al. 2023, arXiv 2306.07280): W' = W R^T, R block diagonal and orthogonal.

    R_i = (I - Q_i) (I + Q_i)^-1,    Q_i = U_i - U_i^T

with U_i strictly upper triangular (Cayley). The rotation is exact, and its sign is that of HF peft's exact
one. Unless told otherwise HF peft computes a truncated series, of n terms with n = 5,

    R_i = I + 2 Q_i + 2 Q_i^2 + ... + 2 Q_i^(n-2) + Q_i^(n-1)

which is about a rotation for small Q_i, by the opposite angles. It is here for the files of HF peft.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule
from vimtune.ops.block_product import scaled_block_product


class OFTRule(WeightRule):
    """`angles` (n, b (b - 1) / 2) are the entries of U_1 to U_n, row by row; zero at the start.
    in (b - 1) / 2 numbers.

    Args:
        weight: W.
        block_size: b.
        series: how many terms of the series are computed; None for the exact rotation.
    """

    def __init__(self, weight: Tensor, block_size: int, series: int | None = None) -> None:
        super().__init__()
        self.series = series
        columns = weight.flatten(1).shape[1]
        row, column = torch.triu_indices(block_size, block_size, 1, device=weight.device)
        self.block_size = block_size
        self.angles = nn.Parameter(weight.new_zeros(columns // block_size, len(row)))
        self.register_buffer("places", row * block_size + column, persistent=False)
        self.places: Tensor
        """Where the entries stand in a block whose rows follow each other (b (b - 1) / 2,)."""

    def change(self) -> Tensor:
        """R_i^T - I, (n, b, b) in single precision at least."""
        angles = self.angles.to(torch.promote_types(self.angles.dtype, torch.float32))
        count, size = len(angles), self.block_size
        upper = angles.new_zeros(count, size * size).scatter(1, self.places.expand(count, -1), angles)
        upper = upper.view(count, size, size)
        identity = torch.eye(size, dtype=angles.dtype, device=angles.device)
        if self.series is not None:
            return _truncated(upper.mT - upper, self.series)  # R^T is the series of Q^T = -Q
        # R^T = (I - Q)^-1 (I + Q) = 2 (I - Q)^-1 - I
        return 2 * (invert(identity - (upper - upper.mT)) - identity)

    def effective_weight(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        ones = matrix.new_ones(matrix.shape[0])
        return scaled_block_product(matrix, ones, self.change().to(weight.dtype)).view_as(weight)


def _truncated(matrices: Tensor, terms: int) -> Tensor:
    """2 M + 2 M^2 + ... + 2 M^(n-2) + M^(n-1) of matrices M (n, b, b)."""
    power, total = matrices, 2 * matrices
    for exponent in range(2, terms):
        power = power @ matrices
        total = total + (2 if exponent < terms - 1 else 1) * power
    return total


def invert(matrices: Tensor) -> Tensor:
    """The inverses of matrices I - Q (n, b, b) with skew-symmetric Q.

    They are found by elimination without exchanging rows: what is left of such a matrix at each step again
    has the identity as its symmetric part, or more, so that no pivot is below 1. torch.linalg's
    factorisations are not used because whether a CUDA graph can record them depends on sizes and versions.

    The gradient is that of one step of Newton's iteration from the found inverse, X (2 I - A X), whose
    derivative by A is that of the inverse, -X dA X, and whose value is the inverse rounded better.
    """
    size = matrices.shape[-1]
    identity = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    with torch.no_grad():
        rest = torch.cat([matrices.detach(), identity.expand_as(matrices)], -1)
        for k in range(size):
            row = rest[:, k] / rest[:, k, k, None]
            column = rest[:, :, k] - identity[k]  # the row of the pivot itself is to become `row`
            rest = torch.addcmul(rest, column[:, :, None], row[:, None], value=-1)
        found = rest[:, :, size:]
    return found @ (2 * identity - matrices @ found)
