"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): every bias."""

from __future__ import annotations

from dataclasses import dataclass

from vimtune.adapters.base import register_method
from vimtune.adapters.ft import FineTuning
from vimtune.adapters.rule import base_parameters
from vimtune.adapters.targets import resolve_targets


@register_method("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(FineTuning):
    summary = "every bias: convolutions, time steps, patch embedding (Ben Zaken et al. 2021)"

    def select(self, model, targets, layers):
        names = [path for path, _ in base_parameters(model) if path.endswith(".bias")]
        if targets is None:
            return names if layers is None else resolve_targets(model, names, layers)
        targets = targets.split(",") if isinstance(targets, str) else targets
        return resolve_targets(model, [f"{target.strip()}.bias" for target in targets], layers)
