"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): every bias.

Use it where the adapter has to be small and simple: no rank, no place to choose, half a percent of the
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.methods.base import register_method
from vimtune.methods.ft import FineTuning
from vimtune.text import split_outside

if TYPE_CHECKING:
    from vimtune.adapters.points import Points


@register_method("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(FineTuning):
    """Options of BitFit, which are those of fine-tuning."""

    summary = "every bias: convolutions, time steps, patch embedding (Ben Zaken et al. 2021)"

    def select(
        self, points: Points, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        from vimtune.adapters.targets import ALIASES, in_layers, is_bias

        biases = [path for path in points.parameters if is_bias(path)]
        if targets is None:
            return biases if layers is None else in_layers(biases, layers)
        given = map(str.strip, split_outside(targets, ",") if isinstance(targets, str) else targets)
        named = [part for target in given for part in ALIASES.get(target, (target,))]
        return points.resolve([_bias_of(target, biases) for target in named], layers)


def _bias_of(target: str, biases: Sequence[str]) -> str:
    """The target itself if it names a bias or is an expression, else the bias of the module that it names."""
    from vimtune.adapters.targets import matches

    if target.startswith(("!", "re:")) or any(matches(path, target) for path in biases):
        return target
    return f"{target}.bias"
