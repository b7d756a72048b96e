"""Full fine-tuning: every parameter is trained.

Use it for the score by which adapters are measured, or where there are many examples. Its file is as large
as the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.methods.base import register_method
from vimtune.methods.ft import FineTuning
from vimtune.text import quote

if TYPE_CHECKING:
    from vimtune.adapters.points import Points


@register_method("full")
@dataclass(frozen=True, kw_only=True)
class Full(FineTuning):
    """Options of full fine-tuning, which are those of fine-tuning."""

    summary = "every parameter"

    def select(
        self, points: Points, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        if targets is not None:
            raise ValueError(f"method 'full' trains everything; for targets {quote(targets)} use method 'ft'")
        if layers is None:
            return points.parameters
        from vimtune.adapters.targets import in_layers

        return in_layers(points.parameters, layers)
