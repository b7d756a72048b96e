"""State-offset tuning (Kang et al. 2025, arXiv 2503.03499): a learnt term beside the state of a scan.

    h:  y_t += C_t h',      h' (E, N) for each layer and direction
    y:  y_t += y',          y' (E,) for each layer

y_t (E,) is what a scan gives for token t before the gate silu(z_t), C_t (N,) the projection by which it reads
its state. All offsets start at zero. The directions of a Vim have one gate and are averaged, so that two y'
would act by their mean alone: there is one. h' may be low rank, h' = U V with U (E, r) zero at the start and
V (r, N) random.

Trained are, of Vim-tiny, for h 294,912 and for y 9,216 numbers. A plain mixer has no such term, so that
neither merges.

h acts inside the scan, where C_t is at hand: the kernels of a mixer add h' to the state that C_t reads
(`vimtune.ops.DirectionWeights`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.declarations import ScanInput, scan_states
from vimtune.adapters.rule import Call, CallRule

if TYPE_CHECKING:
    from vimtune.adapters.sites import Site


class OutputOffsetRule(CallRule):
    """`offset` (E,) holds y'.

    Args:
        site: the call `scan` of a mixer, which takes x | z.
        scan: what the call takes.
    """

    innermost = True

    def __init__(self, site: Site, scan: ScanInput) -> None:
        super().__init__()
        self.offset = nn.Parameter(site.new_empty(scan.width).zero_())

    def around(self, call: Call, x: Tensor, *flow: dict[str, Tensor]) -> Any:
        _, z = x.chunk(2, -1)
        return torch.addcmul(call(x), F.silu(z), self.offset.to(x.dtype))


class StateOffset(nn.Module):
    """h' of one direction: `full` (E, N), or the product of `up` (E, r) and `down` (r, N)."""

    def __init__(self, site: Site, width: int, num_states: int, rank: int | None) -> None:
        super().__init__()
        if rank is not None:
            self.up = nn.Parameter(site.new_empty(width, rank).zero_())
            self.down = nn.Parameter(site.new_empty(rank, num_states))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        else:
            self.full = nn.Parameter(site.new_empty(width, num_states).zero_())
        self.rank = rank

    def forward(self) -> Tensor:
        """(E, N)."""
        return self.full if self.rank is None else self.up @ self.down


class StateOffsetRule(CallRule):
    """`offsets` give h' of the forward direction and, if there is one, of the reverse one.

    Args:
        site: the call `scan` of a mixer, which takes x | z.
        scan: what the call takes.
        suffixes: what the names of the parameters of each direction end with, "" and "_b".
        rank: r; None for a full h'.
    """

    innermost = True

    def __init__(self, site: Site, scan: ScanInput, suffixes: Sequence[str], rank: int | None) -> None:
        super().__init__()
        # In a tuple, because a mixer that is an attribute would be a part of its own rule.
        self.place = (site.owner,)
        self.suffixes = tuple(suffixes)
        self.num_states = self.states_of_scan()
        self.offsets = nn.ModuleList(
            StateOffset(site, scan.width, num_states, rank) for num_states in self.num_states
        )

    def around(self, call: Call, x: Tensor, *flow: dict[str, Tensor]) -> Any:
        return call(x, offsets=tuple(offset() for offset in self.offsets))

    def states_of_scan(self) -> list[int]:
        """N of each direction, as the mixer has them at present."""
        return [scan_states(self.place[0], suffix) for suffix in self.suffixes]

    def outgrown(self) -> str | None:
        present = self.states_of_scan()
        if present == self.num_states:
            return None
        return (
            f"it has offsets of {self.num_states[0]} states, and the scan has {present[0]}: name the method "
            "that adds states before state_offset"
        )
