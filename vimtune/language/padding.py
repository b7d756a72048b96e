"""The order of tokens where some are put before a text that is padded on the left.

Shape letters: B batch, L tokens, n tokens that are added, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def behind_padding(mask: Tensor, added: int) -> Tensor:
    """Places (B, n + L) of tokens, the first n of which are to stand behind the padding on the left.

    Args:
        mask: (B, L), 0 at padding.
        added: n.
    """
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    places = torch.arange(mask.shape[1] + added, device=mask.device)
    moved = torch.where(places < padding, places + added, places - padding)
    return torch.where(places < padding + added, moved, places)


def in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, L, D) in the order of their places (B, L)."""
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
