"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from dataclasses import dataclass

from vimtune.adapters.base import register_method
from vimtune.adapters.ft import FineTuning
from vimtune.adapters.rule import base_parameters
from vimtune.adapters.targets import resolve_targets


@register_method("full")
@dataclass(frozen=True, kw_only=True)
class Full(FineTuning):
    summary = "every parameter"

    def select(self, model, targets, layers):
        if targets is not None:
            raise ValueError(f"method 'full' trains everything; for targets {targets!r} use method 'ft'")
        paths = [path for path, _ in base_parameters(model)]
        return paths if layers is None else resolve_targets(model, paths, layers)
