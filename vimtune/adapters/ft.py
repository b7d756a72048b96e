"""Fine-tuning of whole weights: those of the projectors unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vimtune.adapters.base import Method, register_method
from vimtune.adapters.rule import Tuned, WeightRule


@register_method("ft")
@dataclass(frozen=True, kw_only=True)
class FineTuning(Method):
    summary = "full training of the targets (the projectors)"

    def build_rule(self, path: str, weight: Tensor) -> WeightRule:
        return Tuned(weight)
