"""C3A (Chen et al. 2024, arXiv 2407.19342): W' = W + M / in with a block-circulant M.

Use it for a change of full rank in a small file. It wants larger learning rates than LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from vimtune.methods.base import Method, fitting_block_size, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site


@register_method("c3a")
@dataclass(frozen=True, kw_only=True)
class C3A(Method):
    """Options of C3A; `vimtune.adapters.rules.circulant` has the formula.

    The paper trains with large learning rates, up to 0.1, because the change is divided by the input width.
    """

    summary = "block-circulant update of the projectors (Chen et al. 2024)"
    sized_by = ("block_size",)
    peft_type = "C3A"

    block_size: Annotated[int, Ge(1)] | None = option(
        None, "b, side of the circulant blocks; must divide both sides; the largest possible if none"
    )

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.circulant import C3ARule

        return C3ARule(site.weight, fitting_block_size(self.name, site, self.block_size))
