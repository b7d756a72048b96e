"""Selective visual prompting (Yao et al. 2025, arXiv 2412.08947), made for Vim.

    x  becomes  x + s * G(x) + c * G'(x)  before every block, at all tokens but the class token

    G  = SiLU(up(down(x)))     down D -> r, up r -> D, a generator for each layer
    G' = SiLU(linear(x))       D -> D, one for each group of neighbouring layers

x (B, L, D) are the tokens that the block gets; s (D,) of a layer and c (D,) of a group are zero at the start.
Trained are (2 r + 2) D + r numbers for a layer and (D + 2) D for a group, of Vim-tiny with r = 64 and groups
of 8 layers 712,320.

Two things are done otherwise by the published code: from the second block on it takes the output of the last
mixer alone for x, and it adds to the tokens behind the class token what G' makes of those before it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from timm.models import register_notrace_module
from torch import Tensor, nn

from vimtune.adapters.rule import Call, CallRule, product_dtype
from vimtune.adapters.rules.tokens import linear_like
from vimtune.ops import add_silu_pair

if TYPE_CHECKING:
    from vimtune.adapters.sites import Site


class Generator(nn.Module):
    """Linear layers in a row, whose outputs become prompts (..., D) by SiLU and `scale` (D,).

    Args:
        site: where it is used.
        widths: D, the widths between the layers, and D.
    """

    def __init__(self, site: Site, *widths: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(site.new_empty(widths[0]).zero_())
        self.layers = nn.Sequential(*(linear_like(self.scale, *pair) for pair in pairwise(widths)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What SiLU makes the prompts of the tokens `x` (..., D) from, and the scale."""
        return self.layers(x), self.scale


@register_notrace_module  # FX names nodes by their modules, of which layers have some in common.
class Prompter(nn.Module):
    """`own` is the generator of a layer, G with s, and `shared` that of its group, G' with c."""

    def __init__(self, own: Generator, shared: Generator) -> None:
        super().__init__()
        self.own, self.shared = own, shared

    def forward(self, x: Tensor, cls_position: int) -> Tensor:
        """Tokens (B, L, D) with their prompts, in the dtype of `x`; the one at `cls_position` gets none."""
        # Autocast would cast the tokens for each generator, and the gradients of both back.
        seen = x.to(product_dtype(self.own.scale))
        own, own_scale = self.own(seen)
        shared, shared_scale = self.shared(seen)
        return add_silu_pair(x, own, own_scale, shared, shared_scale, cls_position)


class SVPRule(CallRule):
    """`prompter` makes the prompts of a layer; its second generator is one for all rules of a group.

    Args:
        prompter: that of the layer.
        num_tokens: how many tokens the model has without those of other rules.
        cls_position: which of these is the class token.
    """

    def __init__(self, prompter: Prompter, num_tokens: int, cls_position: int) -> None:
        super().__init__()
        self.prompter = prompter
        self.num_tokens, self.cls_position = num_tokens, cls_position

    def around(self, call: Call, x: Tensor, *flow: dict[str, Tensor]) -> Any:
        # Tokens that others have added stand before and behind the model's own, as those of prompt tuning do.
        added = x.shape[1] - self.num_tokens
        return call(self.prompter(x, self.cls_position + (added + 1) // 2))
