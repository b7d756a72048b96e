"""LoRA (Hu et al. 2021, arXiv 2106.09685): W' = W + (alpha / r) B A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

from vimtune.methods.base import Method, check_matrix, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site


@register_method("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Options of LoRA; `vimtune.adapters.rules.lora` has the formula."""

    summary = "low-rank update of the projectors (Hu et al. 2021)"
    adds_up = True

    rank: Annotated[int, Ge(1)] = option(16, "rank r of the update B A; by target: in_proj=8,x_proj[B]=4")
    alpha: Annotated[float, Gt(0)] = option(8.0, "the update is scaled by alpha / rank")
    dropout: Annotated[float, Ge(0), Lt(1)] = option(
        0.0, "dropout on the input of A, where the layer is called rather than read"
    )

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.lora import LoRARule

        check_matrix(self.name, site, self.rank)
        return LoRARule(site.weight, self.rank, self.alpha, self.dropout)
