"""LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3): W' = W + s B A.

W (out, in), A (r, in), B (out, r): r (in + out) numbers for each weight. The factor s is alpha / r; with the
rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732) it is alpha / sqrt(r).

Dropout acts on the input x of A in training, s B A dropout(x), as in the authors' code and HF peft. The
published code of MambaPEFT (Yoshimura et al. 2025, arXiv 2411.03855) drops some of the r numbers A x instead,
s B dropout(A x).

The branch may start elsewhere than at a random A beside B = 0:

- At the principal components of W (PiSSA, Meng et al. 2024, arXiv 2404.02948): W' = W - s B_0 A_0 + s B A,
  which is W at the start, while the base stays as it is. B_0 and A_0 are kept beside the trained numbers.
- At the gradient of W: A holds its leading right singular vectors, B is zero. A first step of gradient
  descent then changes W by the best approximation of rank r to that of full training, the aim of LoRA-GA
  (Wang et al. 2024, arXiv 2407.05000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule

Start = Literal["random", "pissa", "gradient"]
"""Where a branch starts: see the options of LoRA."""

ROUNDS = 4
"""How often the search for the singular vectors of a gradient multiplies by it from either side."""


class LowRank(nn.Module):
    """The branch eps = s B A, `lora_A` (r, in) and `lora_B` (out, r); zero at the start.

    Args:
        weight: the weight W beside which the branch stands; of a convolution the kernels of one output are
            one row of W.
        rank: r.
        scale: s.
        dropout: probability with which dropout acts on the input of A in training.
        start: "pissa" keeps its start, `start_A` and `start_B`, as buffers. "gradient" is random until
            `start_from_gradients`.
        lr_ratio: how many times as fast as A B learns (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    """

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        start: Start = "random",
        lr_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        rows, columns = matrix.shape
        self.scale = scale
        self.start = start
        self.lr_ratio = lr_ratio
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        if start == "pissa":
            up, down = principal_factors(matrix, rank)
            self.lora_A = nn.Parameter(down / math.sqrt(scale))
            self.lora_B = nn.Parameter(up / math.sqrt(scale))
            self.register_buffer("start_A", self.lora_A.detach().clone())
            self.register_buffer("start_B", self.lora_B.detach().clone())
        else:
            self.lora_A = nn.Parameter(matrix.new_empty(rank, columns))
            self.lora_B = nn.Parameter(matrix.new_zeros(rows, rank))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            self.register_buffer("start_A", None)
            self.register_buffer("start_B", None)

    def matrix(self) -> Tensor:
        """(out, in)."""
        product = (self.scale * self.lora_B) @ self.lora_A
        if self.start_A is None or self.start_B is None:
            return product
        return product - (self.scale * self.start_B) @ self.start_A

    def factors(self) -> tuple[Tensor, Tensor]:
        """U (out, k) and D (k, in) with U D = eps; k is r, or 2 r where the start is taken off again."""
        if self.start_A is None or self.start_B is None:
            return self.scale * self.lora_B, self.lora_A
        up = torch.cat([self.scale * self.lora_B, -self.scale * self.start_B], 1)
        return up, torch.cat([self.lora_A, self.start_A])

    def perturbation(
        self, x: Tensor, row_scale: Tensor | None = None, column_scale: Tensor | None = None
    ) -> Tensor:
        """What dropout on the input of the branch changes of its output.

        Args:
            x: the layer's input (..., in).
            row_scale: (out,), by which the rows of the branch are scaled; None for 1.
            column_scale: (in,), by which its columns are scaled; None for 1.

        Returns:
            s B A (dropout(x) - x), scaled, (..., out).
        """
        # Scaling the small factors costs less than scaling the large result.
        up: Tensor = self.scale * self.lora_B
        down: Tensor = self.lora_A
        if row_scale is not None:
            up = row_scale[:, None] * up
        if column_scale is not None:
            down = down * column_scale
        return F.linear(F.linear(self.dropout(x) - x, down), up)


class LoRARule(WeightRule):
    """The branch beside a weight, W + eps; of a convolution the kernels of one output are one row of W.

    The sum is multiplied at once. The factored form W x + B (A x) takes longer in a training step, on a CPU
    mostly and on a GPU always (benchmarks/RESULTS.md).
    """

    def __init__(self, branch: LowRank) -> None:
        super().__init__()
        self.branch = branch
        self.perturbs = isinstance(branch.dropout, nn.Dropout)

    def main_weight(self, weight: Tensor) -> Tensor:
        """What the branch is added to."""
        return weight

    def effective_weight(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        return (self.main_weight(matrix) + self.branch.matrix()).view_as(weight)

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.branch.factors()

    def perturbation(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.branch.perturbation(x)

    def learning_rate(self, tensor: str) -> float:
        return self.branch.lr_ratio if tensor == "branch.lora_B" else super().learning_rate(tensor)


def principal_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (out, r) and (r, in) of the best approximation of rank r to a matrix (out, in), each with
    the roots of the singular values."""
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    left, values, right = torch.linalg.svd(precise, full_matrices=False)
    roots = values[:rank].sqrt()
    up, down = left[:, :rank] * roots, roots[:, None] * right[:rank]
    return up.to(matrix.dtype).contiguous(), down.to(matrix.dtype).contiguous()


@torch.no_grad()
def start_from_gradients(branches: Sequence[LowRank], batches: Sequence[Callable[[], float]]) -> None:
    """Let A of each branch be the leading right singular vectors of the gradient G (out, in) of the loss by
    the branch's weight, and B zero.

    G itself is never there: with B = 0 the gradient of B is s G A^T, with A = 0 that of A is s B^T G. So each
    pass gives a product with G from one side, and subspace iteration (Halko et al. 2011, arXiv 0909.4061,
    algorithm 4.4) finds the singular vectors from these.

    Args:
        branches: with a random A and B = 0; their rank is at most their smaller side.
        batches: functions that each add the gradients of one batch, as in `Method.settle`.

    Raises:
        ValueError: a gradient is not finite.
    """
    for _ in range(ROUNDS):
        gradients = _gradients([branch.lora_B for branch in branches], batches)
        for branch, gradient in zip(branches, gradients, strict=True):
            branch.lora_B.copy_(torch.linalg.qr(gradient)[0])
            branch.lora_A.zero_()
        gradients = _gradients([branch.lora_A for branch in branches], batches)
        for branch, gradient in zip(branches, gradients, strict=True):
            branch.lora_A.copy_(torch.linalg.svd(gradient, full_matrices=False)[2])
            branch.lora_B.zero_()


def _gradients(factors: Sequence[nn.Parameter], batches: Sequence[Callable[[], float]]) -> list[Tensor]:
    """The gradients of some tensors, summed over batches, in at least single precision."""
    for factor in factors:
        factor.grad = None
    with torch.enable_grad():
        for run in batches:
            run()
    found = []
    for factor in factors:
        gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
        if not torch.isfinite(gradient).all():
            raise ValueError(
                "start 'gradient': the gradient of the first batches is not finite, so that nothing can "
                "start from it: choose another start, or amp bf16 or none"
            )
        found.append(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
    return found
