"""Affix tuning (MambaPEFT, arXiv 2411.03855): learnt tokens at the start of the scans of every layer.

Use it for learnt tokens that cost nothing later: merging folds them into the states with which scans
begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vimtune.fields import Count
from vimtune.methods.base import option, register_method
from vimtune.methods.tokens import TokenTuning

if TYPE_CHECKING:
    from vimtune.adapters.rule import CallRule
    from vimtune.adapters.sites import Site


@register_method("affix")
@dataclass(frozen=True, kw_only=True)
class Affix(TokenTuning):
    """Options of affix tuning; `vimtune.adapters.rules.affix` has the formula."""

    summary = "learnt tokens at the start of every scan (Yoshimura et al. 2025)"
    default_targets = "scan()"

    num_tokens: Count = option(3, "learnt tokens of each layer and direction")

    def build(self, sites: Sequence[Site]) -> Mapping[str, CallRule]:
        from vimtune.adapters.declarations import scan_input
        from vimtune.adapters.rules.affix import AffixRule
        from vimtune.adapters.rules.tokens import HiddenTokens

        rules: dict[str, CallRule] = {}
        shared: dict[tuple[int, int, int], HiddenTokens] = {}
        for site in sites:
            own = self.at(site)
            scan = scan_input(site.owner, site.path)
            if list(scan.columns) != ["x", "z"]:
                raise ValueError(
                    f"{self.name} adds tokens that have an x part alone, but {site.path} takes "
                    f"{' | '.join(scan.columns)}: it acts on the mixers of Vim and Mamba"
                )
            sizes = own.num_tokens, scan.width, own.hidden
            if own.hidden and sizes not in shared:
                shared[sizes] = HiddenTokens(site, *sizes)
            rules[site.path] = AffixRule(site, own.num_tokens, scan.width, scan.directions, shared.get(sizes))
        return rules

    def merged_options(self, options: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Any]:
        return {**options, "initial_state": True}
