"""Parallel adapter (He et al. 2022, arXiv 2110.04366): a bottleneck beside out_proj, as MambaPEFT (Yoshimura
et al. 2025, arXiv 2411.03855) has it.

Use it where a branch with a nonlinearity is wanted and the model need not be merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

from vimtune.methods.base import Method, check_rank, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import CallRule
    from vimtune.adapters.sites import Site


@register_method("parallel_adapter")
@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Method):
    """Options of the parallel adapter; `vimtune.adapters.rules.parallel_adapter` has the formula."""

    summary = "a bottleneck with relu beside out_proj, which does not merge (He et al. 2022)"
    default_targets = "out_proj()"
    sized_by = ("rank",)

    rank: Annotated[int, Ge(1)] = option(32, "width of the bottleneck")
    scale: Annotated[float, Gt(0)] = option(0.1, "factor of what the bottleneck adds")
    dropout: Annotated[float, Ge(0), Lt(1)] = option(0.0, "dropout within the bottleneck (MambaPEFT: 0.1)")

    def build_rule(self, site: Site) -> CallRule:
        from torch import nn

        from vimtune.adapters.rules.parallel_adapter import ParallelAdapterRule

        layer = site.owner
        if not (site.is_call and isinstance(layer, nn.Linear)):
            raise ValueError(
                f"{self.name} stands beside the call of a linear layer, and {site.path} is none: choose "
                "targets such as out_proj()"
            )
        rows, columns = layer.out_features, layer.in_features
        check_rank(site, rows, columns, self.rank)
        return ParallelAdapterRule(site.new_empty(0), rows, columns, self.rank, self.scale, self.dropout)
