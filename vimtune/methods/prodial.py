"""ProDiaL (Ham et al. 2025, arXiv 2411.15224): W' = s W D_b + (alpha / r) B A on the projectors of every
block."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from vimtune.methods.base import check_block_size, check_matrix, option, register_method
from vimtune.methods.lora import LoRA

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site

logger = logging.getLogger(__name__)


@register_method("prodial")
@dataclass(frozen=True, kw_only=True)
class ProDiaL(LoRA):
    """Options of ProDiaL; `vimtune.adapters.rules.prodial` has the formula and says what the variants are."""

    summary = "diagonal-centric transformation of the projectors plus low rank (Ham et al. 2025)"

    block_size: Annotated[int, Ge(1)] = option(
        4, "b, side of the diagonal blocks of prodial; must divide the input width"
    )
    variant: Literal["free", "paper"] = option(
        "free", '"free": D_b = I + D_a; "paper": the published formula, whose diagonal never trains'
    )
    scale_decay: Annotated[float, Ge(0)] = option(
        0.0, "weight decay of s towards 1, as a multiple of the run's; 0 leaves s alone"
    )

    def __post_init__(self) -> None:
        if self.variant == "paper" and self.block_size == 1:
            logger.warning(
                'ProDiaL: in variant "paper" with block_size 1 nothing of D_a ever trains, its diagonal has '
                'no gradient; variant "free" or larger blocks do'
            )

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.prodial import ProDiaLRule

        _, columns = check_matrix(self.name, site, self.rank)
        check_block_size(site, self.block_size, columns)
        return ProDiaLRule(
            site.weight, self.rank, self.alpha, self.dropout, self.block_size, self.variant, self.scale_decay
        )
