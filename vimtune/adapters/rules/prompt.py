"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691; of a Vim: MambaPEFT, arXiv 2411.03855, section 4.2).

    encode(x)  becomes  encode([P_1 .. P_m, x, P_(m+1) .. P_n]) without the outputs at P,    m = ceil(n / 2)

x (B, L, D) are the tokens of a Vim with their position embedding, of which the n learnt tokens P (n, D) get
none. They pass through all layers with the others. Before x stands the greater half of them, so within the
layers the class token has moved by ceil(n / 2) places; afterwards it is where it was. A model that reads
from the first token to the last has all of them before its text.

Trained are n D numbers, of Vim-tiny with 8 tokens 1,536; with the MLP of `tokens.py` (n + h + 1) D + h + h D,
for its width h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vimtune.adapters.rule import Call, CallRule, each_tensor
from vimtune.adapters.rules.tokens import HiddenTokens, TokenTable

if TYPE_CHECKING:
    from vimtune.adapters.sites import Site


class PromptRule(CallRule):
    """`table` gives P.

    Args:
        site: the call `encode` of a model.
        width: D.
        before: how many of the tokens stand before the others, m.
        behind: how many stand behind them.
        hidden: inner width of the MLP; 0 for none.
    """

    def __init__(self, site: Site, width: int, before: int, behind: int, hidden: int) -> None:
        super().__init__()
        num_tokens = before + behind
        inside = HiddenTokens(site, num_tokens, width, hidden) if hidden else None
        self.table = TokenTable(site, num_tokens, width, inside)
        self.before = before

    def around(self, call: Call, x: Tensor, *flow: dict[str, Tensor]) -> Any:
        prompt = self.table().to(x.dtype).expand(x.shape[0], -1, -1)
        result = call(torch.cat([prompt[:, : self.before], x, prompt[:, self.before :]], 1))
        return each_tensor(result, lambda output: output.narrow(1, self.before, x.shape[1]))
