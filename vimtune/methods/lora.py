"""LoRA (Hu et al. 2021, arXiv 2106.09685): W' = W + (alpha / r) B A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.methods.base import Method, check_matrix, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site


@register_method("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Options of LoRA; `vimtune.adapters.rules.lora` has the formula."""

    summary = "low-rank update of the projectors (Hu et al. 2021)"

    rank: int = option(16, "r, columns of B and rows of A")
    alpha: float = option(8.0, "the update is scaled by alpha / rank")
    dropout: float = option(0.0, "dropout on the input of A, where the layer is called rather than read")

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.lora import LoRARule

        check_matrix(self.name, site, self.rank)
        return LoRARule(site.weight, self.rank, self.alpha, self.dropout)
