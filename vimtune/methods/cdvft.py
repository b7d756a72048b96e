"""CDVFT (Ding et al. 2025, arXiv 2505.00580): W' = W + diag(a_2) M diag(a_1) with a block-circulant M.

Use it for a change of full rank in a small file, at learning rates that are usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.methods.base import fitting_block_size, register_method
from vimtune.methods.c3a import C3A

if TYPE_CHECKING:
    from vimtune.adapters.rule import WeightRule
    from vimtune.adapters.sites import Site


@register_method("cdvft")
@dataclass(frozen=True, kw_only=True)
class CDVFT(C3A):
    """Options of CDVFT, which are those of C3A; `vimtune.adapters.rules.circulant` has the formula."""

    summary = "update of the projectors by circulant and diagonal matrices (Ding et al. 2025)"

    def build_rule(self, site: Site) -> WeightRule:
        from vimtune.adapters.rules.circulant import CDVFTRule

        return CDVFTRule(site.weight, fitting_block_size(self.name, site, self.block_size))
