"""State-offset tuning (Kang et al. 2025, arXiv 2503.03499): a learnt term beside the state of every scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vimtune.fields import Whole
from vimtune.methods.base import Method, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import CallRule
    from vimtune.adapters.sites import Site


@register_method("state_offset")
@dataclass(frozen=True, kw_only=True)
class StateOffset(Method):
    """Options of state-offset tuning; `vimtune.adapters.rules.state_offset` has the formulas."""

    summary = "a learnt term beside the state of every scan (Kang et al. 2025)"
    default_targets = "scan()"

    kind: Literal["h", "y"] = option(
        "h", '"h": one offset for each channel and state; "y": one for each channel'
    )
    h_rank: Whole = option(0, 'rank of the offset of kind "h"; 0 for a full one')

    def __post_init__(self) -> None:
        if self.kind == "y" and self.h_rank:
            raise ValueError(f'h_rank = {self.h_rank} is for kind "h": leave it out, or choose that kind')

    def build_rule(self, site: Site) -> CallRule:
        from vimtune.adapters.declarations import scan_input
        from vimtune.adapters.rules.state_offset import OutputOffsetRule, StateOffsetRule

        scan = scan_input(site.owner, site.path)
        if list(scan.columns) != ["x", "z"]:
            raise ValueError(
                f"{self.name} adds to a scan under its gate, and {site.path} has a norm between the two: it "
                "acts on the mixers of Vim and Mamba"
            )
        if self.kind == "y":
            return OutputOffsetRule(site, scan)
        return StateOffsetRule(site, scan, ("", "_b")[: scan.directions], self.h_rank)
