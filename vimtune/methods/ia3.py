"""IA3 (Liu et al. 2022, arXiv 2205.05638): one factor for each output, or each input, of a weight.

Use it where the adapter has to be as small as can be, or examples are very few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vimtune.methods.base import Method, check_matrix, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site


@register_method("ia3")
@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Options of IA3; `vimtune.adapters.rules.ia3` has the formula.

    A bias is left as it is, where HF peft scales it together with the outputs.
    """

    summary = "one factor per output or input of the projectors (Liu et al. 2022)"
    sized_by = ()
    peft_type = "IA3"

    side: Literal["output", "input"] = option("output", "what has a factor each: the outputs or the inputs")

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.ia3 import IA3Rule

        check_matrix(self.name, site)
        return IA3Rule(site.weight, self.side)
