"""Block-circulant matrices, and the methods whose change of a weight is made of them: C3A and CDVFT.

Block (i, j) of such a matrix has the entries M[k, p] = c_ij[(p - k) mod b]: its first row is c_ij, and every
row is the one before it rolled right by one. Multiplying by it is a circular correlation, which the papers
compute by FFT, without building it. Here the matrix is built and added to the weight, as LoRA's product is:
an FFT of every token takes longer than the one matrix product that is left then (benchmarks/RESULTS.md), it
does not exist in bf16, and a weight that the model reads has to be built anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule


def block_circulant(kernels: Tensor) -> Tensor:
    """The matrix (m b, n b) of `kernels` (m, n, b), the first rows of its m times n blocks.

    Row k of a block is the window of c, c that begins b - k entries in. There is nothing to gather here, so
    the gradient is a sum in a fixed order, where that of a gather would be atomic additions.
    """
    m, n, b = kernels.shape
    windows = torch.cat([kernels, kernels], -1).unfold(-1, b, 1)  # they begin at entries 0 to b
    blocks = windows[:, :, 1:].flip(2)
    return blocks.transpose(1, 2).reshape(m * b, n * b)


class C3ARule(WeightRule):
    """C3A (Chen et al. 2024, arXiv 2407.19342): W' = W + M / in.

    M is block-circulant; `kernels` (out / b, in / b, b) are zero at the start. out in / b numbers.
    """

    def __init__(self, weight: Tensor, block_size: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.kernels = nn.Parameter(weight.new_zeros(rows // block_size, columns // block_size, block_size))

    def effective_weight(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        return (matrix + block_circulant(self.kernels) / matrix.shape[1]).view_as(weight)


class CDVFTRule(WeightRule):
    """CDVFT (Ding et al. 2025, arXiv 2505.00580): W' = W + diag(a_2) M diag(a_1).

    M is block-circulant; a square weight is one block. `kernels` (out / b, in / b, b) are normal with
    variance 1 / in at the start, `column_scale` (in,) holds a_1 = 1 and `row_scale` (out,) a_2 = 0, so that
    nothing changes. out + in + out in / b numbers: 3 d for a square weight in one block.
    """

    def __init__(self, weight: Tensor, block_size: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        kernels = weight.new_empty(rows // block_size, columns // block_size, block_size)
        self.kernels = nn.Parameter(nn.init.normal_(kernels, std=columns**-0.5))
        self.column_scale = nn.Parameter(weight.new_ones(columns))
        self.row_scale = nn.Parameter(weight.new_zeros(rows))

    def effective_weight(self, weight: Tensor) -> Tensor:
        scaled = self.row_scale[:, None] * block_circulant(self.kernels) * self.column_scale
        return (weight.flatten(1) + scaled).view_as(weight)
