"""What methods that learn tokens have in common: how many, and the MLP through which they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from vimtune.fields import Count, InnerWidth
from vimtune.methods.base import Method, option

if TYPE_CHECKING:
    from vimtune.adapters.sites import Site

MOST_TOKENS = 200
"""So many learnt tokens a budget gives at most: as many as prompts of images (Jia et al. 2022, arXiv
2203.12119) and prefixes of texts (Li & Liang 2021, arXiv 2101.00190) are published with. They lengthen every
sequence, so that more of them cost more than what they train is worth."""


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

    def size_limit(self, option: str, sites: Sequence[Site]) -> int | None:
        return MOST_TOKENS if option == "num_tokens" else None
