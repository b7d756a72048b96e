"""Affix tuning (MambaPEFT, arXiv 2411.03855, section 4.2): learnt tokens at the start of every scan.

    scan(xz)  becomes  scan([F, xz, flip(R)]) without the outputs at F and R

xz (B, L, 2 E) is the output of in_proj. The n tokens F (n, E) are those of the forward direction, R (n, E)
those of the reverse one; row 0 of either is the first to enter its scan. They have an x part alone: as their
outputs are dropped, their gate z would have no effect, and 0 stands for it. What comes last in a scan cannot
act on what was before it, so each direction is changed by its own tokens alone: by the window of its
convolution, and by the state that they leave behind. Both are the same for every input, so that a merged Vim
can begin with them (`fold`) and costs what the plain one does.

Trained are n E numbers for each layer and direction, of Vim-tiny with 3 tokens 55,296. With an MLP of inner
width h (`tokens.py`) all layers share the tokens (n, E) and `down`, (n + h) E + h numbers; each layer and
direction has an `up` of its own, (h + 1) E.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.parts import TextPart
from vimtune.adapters.rule import Call, CallRule
from vimtune.adapters.rules.tokens import HiddenTokens, TokenTable

if TYPE_CHECKING:
    from vimtune.adapters.sites import Site


class AffixRule(CallRule):
    """`table` gives the tokens (n, directions E) of one layer, those of the forward direction first.

    Args:
        site: the call `scan` of a mixer, whose input has the rows x and z and no others.
        num_tokens: n.
        width: E.
        directions: 2 for a mixer that also scans from the last token to the first, else 1.
        hidden: first half of the MLP, for the rules of all layers; None without it.
    """

    def __init__(
        self, site: Site, num_tokens: int, width: int, directions: int, hidden: HiddenTokens | None
    ) -> None:
        super().__init__()
        self.directions = directions
        self.table = TokenTable(site, num_tokens, directions * width, hidden)

    def tokens(self) -> Tensor:
        """F and, if there are two directions, R: (directions, n, E), row 0 enters its scan first."""
        table: Tensor = self.table().unflatten(1, (self.directions, -1))
        return table.transpose(0, 1)

    def simplify(self) -> None:
        self.table.simplify()

    def around(self, call: Call, x: Tensor, *flow: dict[str, Tensor]) -> Tensor:
        tokens = self.tokens().to(x.dtype)
        _, num_tokens, width = tokens.shape
        tokens = F.pad(tokens, (0, width))
        # A GPU puts tensors together several times as fast where all of them are contiguous.
        parts = [tokens[0].expand(x.shape[0], -1, -1).contiguous(), x]
        if self.directions == 2:
            parts.append(tokens[1].flip(0).expand(x.shape[0], -1, -1).contiguous())
        result: Tensor = call(torch.cat(parts, 1))
        return result.narrow(1, num_tokens, x.shape[1])

    def around_part(self, call: Call, x: Tensor, part: TextPart, *flow: dict[str, Tensor]) -> Tensor:
        if part.begins:
            return self.around(call, x, *flow)
        result: Tensor = call(x)  # What the tokens have left behind is in the states with which it goes on.
        return result

    def fold(self, owner: nn.Module) -> Mapping[str, Tensor] | None:
        """What the tokens leave behind in the mixer, if its scans can begin with it, as those of Vim."""
        starts_behind = getattr(owner, "starts_behind", None)
        return None if starts_behind is None else starts_behind(self.tokens())
