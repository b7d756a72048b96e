"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): learnt tokens beside those of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from vimtune.fields import Count, InnerWidth
from vimtune.methods.base import MOST_TOKENS, Method, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import CallRule
    from vimtune.adapters.sites import Site


@register_method("prompt")
@dataclass(frozen=True, kw_only=True)
class Prompt(Method):
    """Options of prompt tuning; `vimtune.adapters.rules.prompt` has the formula."""

    summary = "learnt tokens beside those of the input (Lester et al. 2021)"
    default_targets = "encode()"
    sized_by = ("num_tokens",)
    changes_at_start = True
    training_only = MappingProxyType({"hidden": 0})

    num_tokens: Count = option(8, "learnt tokens")
    hidden: InnerWidth = option(
        0, "inner width of an MLP through which the tokens are trained, such as 64; 0 for none"
    )

    def size_limit(self, option: str, sites: Sequence[Site]) -> int | None:
        return MOST_TOKENS if option == "num_tokens" else None

    def build_rule(self, site: Site) -> CallRule:
        from vimtune.adapters.declarations import declaration_of
        from vimtune.adapters.rules.prompt import PromptRule

        width = getattr(site.owner, "embed_dim", None)
        if not site.path.endswith("encode()") or width is None:
            raise ValueError(f"{self.name} adds tokens to the call encode() of a model, not to {site.path}")
        both = declaration_of(site.owner).directions == 2
        behind = self.num_tokens // 2 if both else 0
        return PromptRule(site, width, self.num_tokens - behind, behind, self.hidden)
