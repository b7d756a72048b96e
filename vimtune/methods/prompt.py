"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): learnt tokens beside those of the input.

Use it where all weights have to stay untouched, on any model with tokens. It does not merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.methods.base import register_method
from vimtune.methods.tokens import TokenTuning

if TYPE_CHECKING:
    from vimtune.adapters.rule import CallRule
    from vimtune.adapters.sites import Site


@register_method("prompt")
@dataclass(frozen=True, kw_only=True)
class Prompt(TokenTuning):
    """Options of prompt tuning; `vimtune.adapters.rules.prompt` has the formula."""

    summary = "learnt tokens beside those of the input (Lester et al. 2021)"
    default_targets = "encode()"

    def build_rule(self, site: Site) -> CallRule:
        from vimtune.adapters.declarations import declaration_of
        from vimtune.adapters.rules.prompt import PromptRule

        width = getattr(site.owner, "embed_dim", None)
        if not site.path.endswith("encode()") or width is None:
            raise ValueError(f"{self.name} adds tokens to the call encode() of a model, not to {site.path}")
        both = declaration_of(site.owner).directions == 2
        behind = self.num_tokens // 2 if both else 0
        return PromptRule(site, width, self.num_tokens - behind, behind, self.hidden)
