"""OFT (Qiu et al. 2023, arXiv 2306.07280): W' = W R^T with a block-diagonal rotation R."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from vimtune.methods.base import Method, check_block_size, check_matrix, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site


@register_method("oft")
@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Options of OFT; `vimtune.adapters.rules.oft` has the formula."""

    summary = "rotation of blocks of inputs of the projectors (Qiu et al. 2023)"

    block_size: Annotated[int, Ge(2)] = option(
        32, "b, inputs that are rotated together; must divide the width"
    )

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.oft import OFTRule

        _, columns = check_matrix(self.name, site)
        check_block_size(site, self.block_size, columns)
        return OFTRule(site.weight, self.block_size)
