"""OFT (Qiu et al. 2023, arXiv 2306.07280): W' = W R^T with a block-diagonal rotation R.

Use it where the rows of a weight are to keep their lengths: it rotates them, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from vimtune.methods.base import Method, check_block_size, check_matrix, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site

LARGEST = 32
"""Side of the largest blocks unless the user says otherwise, as in HF peft."""


@register_method("oft")
@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Options of OFT; `vimtune.adapters.rules.oft` has the formula."""

    summary = "rotation of blocks of inputs of the projectors (Qiu et al. 2023)"
    sized_by = ("block_size",)
    peft_type = "OFT"

    block_size: Annotated[int, Ge(2)] | None = option(
        None,
        "b, inputs that are rotated together; must divide the width; the largest possible up to 32 if none",
    )

    series: Annotated[int, Ge(4), Le(64)] | None = option(
        None,
        "terms of a series in the place of the exact rotation, as HF peft has it (5); none: exact",
    )

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.oft import OFTRule

        _, columns = check_matrix(self.name, site)
        size = self.block_size
        if size is None:
            size = max((size for size in range(2, LARGEST + 1) if columns % size == 0), default=None)
        if size is None:
            raise ValueError(
                f"no block of 2 to {LARGEST} inputs divides the input width {columns} of {site.path}: pass "
                "block_size, or choose other targets"
            )
        check_block_size(site, size, columns)
        return OFTRule(site.weight, size, self.series)
