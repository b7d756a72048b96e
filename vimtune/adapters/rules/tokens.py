"""Learnt tokens, and the MLP through which they may be trained (Li & Liang 2021, arXiv 2101.00190, section
4.3).

    table = up(tanh(down(tokens)))

The MLP sees the n tokens alone, never the samples of a batch, so that what it costs does not depend on these.
What the model computes depends on the table only: once it is trained, the table is all that is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vimtune.adapters.rule import exact

if TYPE_CHECKING:
    from vimtune.adapters.sites import Site


def learnt_tokens(site: Site, *shape: int) -> nn.Parameter:
    """Tokens of this shape, drawn from N(0, 1), with the dtype and device of the site."""
    return nn.Parameter(site.new_empty(*shape).normal_())


class HiddenTokens(nn.Module):
    """The first half of the MLP, tanh(down(tokens)): `tokens` (n, width) to (n, hidden)."""

    def __init__(self, site: Site, num_tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.tokens = learnt_tokens(site, num_tokens, width)
        self.down = linear_like(self.tokens, width, hidden)

    def forward(self) -> Tensor:
        """(n, hidden)."""
        return torch.tanh(self.down(self.tokens))


@register_notrace_module  # It asks whether there is autocast, so it is one node of an FX graph.
class TokenTable(nn.Module):
    """Tokens (n, width) that are trained as they are, or as outputs `up` of `HiddenTokens`.

    Args:
        site: where they are used.
        num_tokens: n.
        width: that of a token.
        hidden: what the MLP starts from, which several tables may share; None for a table without it.
    """

    def __init__(self, site: Site, num_tokens: int, width: int, hidden: HiddenTokens | None) -> None:
        super().__init__()
        self.hidden = hidden
        if hidden is None:
            self.tokens = learnt_tokens(site, num_tokens, width)
        else:
            self.up = linear_like(hidden.tokens, hidden.down.out_features, width)

    def forward(self) -> Tensor:
        """The tokens that the model gets, (n, width), in full precision also under autocast."""
        if self.hidden is None:
            return self.tokens
        with exact(self.up.weight):
            table: Tensor = self.up(self.hidden())
            return table


def linear_like(tensor: Tensor, inputs: int, outputs: int) -> nn.Linear:
    """A linear layer as torch initialises it, with the dtype and device of a tensor."""
    return nn.Linear(inputs, outputs, dtype=tensor.dtype, device=tensor.device)
