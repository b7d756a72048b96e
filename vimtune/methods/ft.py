"""Fine-tuning of whole parameters, or rows of them: those of the projectors unless told otherwise.

Use it to train chosen parameters as they are, in studies of where to adapt, or beside another method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from vimtune.methods.base import Method, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site

START_DECAY = (
    "weight decay towards the value at the start, as a multiple of the run's; 0: matrices decay to 0"
)
"""Help of the option `start_decay`, whose default differs from method to method."""


@register_method("ft")
@dataclass(frozen=True, kw_only=True)
class FineTuning(Method):
    """Options of fine-tuning, for all methods that train parameters as they are."""

    summary = "full training of the targets (the projectors)"
    sized_by = ()

    start_decay: Annotated[float, Ge(0)] = option(0.0, START_DECAY)

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rule import Shifted, Tuned

        return Shifted(site.weight, self.start_decay) if self.start_decay > 0 else Tuned(site.weight)
