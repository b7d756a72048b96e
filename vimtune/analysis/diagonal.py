"""How much of a square matrix lies on its diagonal, against what chance would put there.

A matrix may look diagonal for a trivial reason: the identity plus anything small does. Therefore the share of
the diagonal is asked of the *change* of a transformation and of its gradient, where the identity is no part,
and it is compared with two expectations.

- Chance: the columns in random order. Exactly 1/n of the squares are then expected on the diagonal, whatever
  the matrix is. The spread of this share over random orders says which excess is more than luck.
- Sizes: if large rows meet large columns, squares gather on the diagonal without any relation between row i
  and column i. A matrix whose squares are products of the sizes of its rows and columns has the share
  sum_i r_i c_i / (sum r)(sum c), where r and c are the sums of squares of rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = 200
"""Random orders of the columns from which the spread of the share is estimated."""


@dataclass(frozen=True)
class DiagonalShare:
    """The share of squared entries on the diagonal, and what it is compared with."""

    share: float
    """sum_i M_ii^2 / sum_ij M_ij^2."""
    chance: float
    """Its expectation when the columns are put in random order, 1/n."""
    spread: float
    """Its standard deviation over random orders."""
    by_sizes: float
    """Its expectation from the sizes of rows and columns alone."""

    @property
    def concentration(self) -> float:
        """The share as a multiple of chance: 1 for a matrix without structure, n for a diagonal one."""
        return self.share / self.chance

    @property
    def excess(self) -> float:
        """The share as a multiple of what the sizes of rows and columns explain."""
        return self.share / self.by_sizes if self.by_sizes else float("nan")

    @property
    def deviations(self) -> float:
        """How many standard deviations of random orders the share lies above chance."""
        return (self.share - self.chance) / self.spread if self.spread else float("inf")

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {
            "share": self.share,
            "chance": self.chance,
            "concentration": self.concentration,
            "by_sizes": self.by_sizes,
            "excess": self.excess,
            "deviations": self.deviations,
        }


def diagonal_share(squares: Tensor, seed: int = 0) -> DiagonalShare | None:
    """Measure squared entries (n, n); None where all of them are 0.

    The random orders are drawn by `seed`, so that a report can be repeated.
    """
    squares = squares.double().cpu()
    total = squares.sum()
    if total == 0:
        return None
    size = len(squares)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(size)
    shares = torch.stack(
        [squares[rows, torch.randperm(size, generator=generator)].sum() for _ in range(ORDERS)]
    )
    expected = (squares.sum(1) * squares.sum(0)).sum() / total**2
    return DiagonalShare(
        share=float(squares.diagonal().sum() / total),
        chance=1 / size,
        spread=float((shares / total).std()),
        by_sizes=float(expected),
    )
