"""DoRA (Liu et al. 2024, arXiv 2402.09353): low rank for the direction of each row, a free magnitude.

Use it in the place of LoRA where a low rank is to come closer to full training; it trains one number more
for each output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vimtune.methods.base import option, register_method
from vimtune.methods.lora import LoRA

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site


@register_method("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Options of DoRA; `vimtune.adapters.rules.dora` has the formula."""

    summary = "low-rank update of the directions, free magnitude of each row (Liu et al. 2024)"
    peft_type = "LORA"
    adds_up = False  # a magnitude of rows would scale what the whole one has made of them

    axis: Literal["output", "input"] = option(
        "output", '"output": a magnitude for each row of a weight; "input": for each column, as MambaPEFT'
    )

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.dora import DoRARule

        return DoRARule(site.weight, self.build_branch(site), self.axis)
