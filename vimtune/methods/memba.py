"""Memba (ICLR 2026, arXiv 2506.18184): a membrane in the place of the gates; `lora+memba` as published.

Beside affix name it last, `affix+memba`: the learnt tokens then have no membranes.

Use it beside LoRA, `lora+memba`, as published. It has nothing to train by itself and does not merge.

Expect a pretrained Vim to lose most of what it knows, and `lora+memba` to end far behind `lora`: a gate above
`threshold` becomes 0, and with a large `tau` the others are sums over chunks and layers. Both options matter,
`chunks` hardly. With `--peft-kwargs '{threshold: 1.0e+9, tau: 0.2}'` it was on a par with LoRA where that was
tried. The defaults are the published ones, but for `tau`, of which the paper says that it is large;
`benchmarks/RESULTS.md` has the measurements.

In a language model the membrane of a token goes on from that `chunk_length` tokens before it, and no layer
from another one, so that no token knows of later ones. A cache then keeps the membranes of as many tokens for
each layer, and cached decoding is a pass over the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Le

from vimtune.fields import Count, PositiveAmount
from vimtune.methods.base import Method, option, register_method

if TYPE_CHECKING:
    from vimtune.adapters.rule import CallRule
    from vimtune.adapters.sites import Site


@register_method("memba")
@dataclass(frozen=True, kw_only=True)
class Memba(Method):
    """Options of Memba; `vimtune.adapters.rules.memba` has the formula."""

    summary = "leaky membranes in the place of the gates, beside lora: lora+memba (arXiv 2506.18184)"
    default_targets = "scan()"
    sized_by = ()
    changes_at_start = True

    chunks: Count = option(4, "T, chunks into which the tokens of an image are cut")
    chunk_length: Count = option(64, "tokens of a chunk of text, whose number grows with the text")
    tau: Annotated[float, Gt(0), Le(1)] = option(0.9, "what a membrane keeps from one chunk to the next")
    threshold: PositiveAmount = option(1.0, "above it a membrane fires and is reset to 0")

    def build(self, sites: Sequence[Site]) -> Mapping[str, CallRule]:
        from vimtune.adapters.declarations import scan_input
        from vimtune.adapters.rules.memba import MembraneRule

        rules: dict[str, CallRule] = {}
        before = None
        for site in sites:
            own, scan = self.at(site), scan_input(site.owner, site.path)
            both = scan.directions == 2
            rules[site.path] = MembraneRule(
                scan,
                site.path,
                before,
                tau=own.tau,
                threshold=own.threshold,
                chunks=own.chunks if both else None,
                length=own.chunk_length,
            )
            before = site.path if both else None
        return rules
