"""State-offset tuning (Kang et al. 2025, arXiv 2503.03499): a learnt term beside the state of every scan.

Use it for a direct handle on the state of every scan, in few numbers. It does not merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vimtune.fields import Count
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
    sized_by = ("h_rank",)

    kind: Literal["h", "y"] = option(
        "h", '"h": one offset for each channel and state; "y": one for each channel'
    )
    h_rank: Count | None = option(None, 'rank of the offset of kind "h"; a full one if not given')

    def __post_init__(self) -> None:
        if self.kind == "y" and self.h_rank is not None:
            raise ValueError(f'h_rank = {self.h_rank} is for kind "h": leave it out, or choose that kind')

    @classmethod
    def sized_with(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        kind = options.get("kind")
        kinds = kind.values() if isinstance(kind, Mapping) else [kind]
        return () if "y" in kinds else cls.sized_by

    def size_limit(self, option: str, sites: Sequence[Site]) -> int | None:
        return min(_largest_rank(site) for site in sites) if option == "h_rank" else None

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


def _largest_rank(site: Site) -> int:
    """The largest rank with which the factors of an offset have fewer numbers than a full one."""
    from vimtune.adapters.declarations import scan_input, scan_states

    width: int = scan_input(site.owner, site.path).width
    # A mixer without such rows, as that of Mamba-2, is refused with the reason when its rule is built.
    num_states: int = scan_states(site.owner)
    return max(1, (width * num_states - 1) // (width + num_states))
