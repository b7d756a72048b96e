"""Linear probing: only the classification head is trained."""

from __future__ import annotations

from dataclasses import dataclass

from vimtune.adapters.base import register_method
from vimtune.adapters.ft import FineTuning


@register_method("linear")
@dataclass(frozen=True, kw_only=True)
class LinearProbe(FineTuning):
    summary = "only the classification head"
    trains_head_only = True

    def select(self, model, targets, layers):
        if targets is not None or layers is not None:
            raise ValueError("method 'linear' trains the head alone and takes neither targets nor layers")
        return []
