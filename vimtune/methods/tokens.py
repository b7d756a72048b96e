"""What methods that learn tokens have in common: how many, and the MLP through which they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from vimtune.fields import Count, InnerWidth
from vimtune.methods.base import Method, option


@dataclass(frozen=True, kw_only=True)
class TokenTuning(Method):
    """Options of learnt tokens; `vimtune.adapters.rules.tokens` has them."""

    sized_by = ("num_tokens",)
    changes_at_start = True
    training_only = MappingProxyType({"hidden": 0})

    num_tokens: Count = option(8, "learnt tokens")
    hidden: InnerWidth = option(
        0, "inner width of an MLP through which the tokens are trained, such as 64; 0 for none"
    )
