"""ProDiaL (Ham et al. 2025, arXiv 2411.15224): W' = s W D_b + (alpha / r) B A on the projectors of every
block.

Use it in the place of LoRA on projectors: it may scale and mix neighbouring inputs as well, trains
somewhat more numbers at the same rank, and takes the same time. Where numbers are few they are better spent
on the rank of LoRA.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from vimtune.fields import PositiveAmount
from vimtune.methods.base import check_block_size, option, register_method
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
    sized_by = ("rank", "block_size")

    block_size: Annotated[int, Ge(1)] = option(
        4, "b, side of the diagonal blocks of prodial; must divide the input width"
    )
    variant: Literal["free", "exp", "tanh", "paper"] = option(
        "exp",
        'diagonal of D_b for an x that starts at 0: "exp" e^x, "free" 1 + x, "tanh" 1 + tanh x; "paper": the '
        "published formula, where it never trains",
    )
    train_scale: bool = option(True, "whether the factors s of the rows train; if not they are 1")
    scale_decay: Annotated[float, Ge(0)] = option(
        0.0, "weight decay of s towards 1, as a multiple of the run's; 0 leaves s alone"
    )
    diagonal_lr_ratio: PositiveAmount = option(1.0, "learning rate of D_b and s as a multiple of that of A")

    def __post_init__(self) -> None:
        if self.scale_decay > 0 and not self.train_scale:
            raise ValueError(
                f"scale_decay = {self.scale_decay:g} is for factors s that train: leave it out, or let them "
                "train (train_scale)"
            )
        if self.variant == "paper" and self.block_size == 1:
            logger.warning(
                'ProDiaL: in variant "paper" with block_size 1 nothing of D_a ever trains, its diagonal has '
                "no gradient; other variants or larger blocks do"
            )

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.prodial import ProDiaLRule

        branch = self.build_branch(site)
        check_block_size(site, self.block_size, site.weight.flatten(1).shape[1])
        return ProDiaLRule(
            site.weight,
            branch,
            self.block_size,
            self.variant,
            train_scale=self.train_scale,
            scale_decay=self.scale_decay,
            lr_ratio=self.diagonal_lr_ratio,
        )
