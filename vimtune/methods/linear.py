"""Linear probing: only the classification head is trained.

Use it before everything else: it says what the pretrained features are worth as they are. Without
augmentation they are computed once, and a run takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.methods.base import Method, register_method

if TYPE_CHECKING:
    from vimtune.adapters.points import Points


@register_method("linear")
@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Linear probing, which has no options."""

    summary = "only the classification head"
    trains_head_only = True
    sized_by = ()

    def select(
        self, points: Points, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        if targets is not None or layers is not None:
            raise ValueError("method 'linear' trains the head alone and takes neither targets nor layers")
        return []
