"""The "Strong" baseline (Halloran et al. 2024, arXiv 2406.00209): LoRA on in_proj, out_proj and x_proj, and
on the embedding of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.methods.base import register_method
from vimtune.methods.lora import LoRA

if TYPE_CHECKING:
    from vimtune.adapters.points import Points


@register_method("strong")
@dataclass(frozen=True, kw_only=True)
class Strong(LoRA):
    """Options of the Strong baseline, which are those of LoRA."""

    summary = "LoRA on in_proj, out_proj and all x_proj, on embeddings of tokens (Halloran et al. 2024)"
    default_targets = ("in_proj", "out_proj", "x_proj", "embeddings")

    def select(
        self, points: Points, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        from vimtune.adapters.targets import matches

        if targets is None:  # a Vim has no embeddings of tokens, Mamba-2 no x_proj
            present = [
                target
                for target in self.default_targets
                if any(matches(path, target) for path in points.parameters)
            ]
            targets = present or None
        return super().select(points, targets, layers)
