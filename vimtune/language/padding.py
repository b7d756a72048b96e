"""The order of tokens in batches with padding.

Shape letters: B batch, L tokens, n tokens that are added, T tokens of several parts, D channels, K width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def text_order(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Tokens whose padding on the left stands before those that a rule has put before a text.

    Args:
        tokens: (B, n + L, D), the n added ones first.
        mask: (B, L), 0 at padding.

    Returns:
        The tokens in this order, their mask (B, n + L), and what brings tokens (B, n + L, ...) from this
        order into the one that was given.
    """
    added = tokens.shape[1] - mask.shape[1]
    if added == 0:
        return tokens, mask, lambda result: result
    order = _behind_padding(mask, added)
    mask = F.pad(mask, (added, 0), value=1).gather(1, order)
    return _in_order(tokens, order), mask, lambda result: _in_order(result, order.argsort(1))


def _behind_padding(mask: Tensor, added: int) -> Tensor:
    """Places (B, n + L) of tokens, the first n of which are to stand behind the padding on the left.

    Args:
        mask: (B, L), 0 at padding.
        added: n.
    """
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    places = torch.arange(mask.shape[1] + added, device=mask.device)
    moved = torch.where(places < padding, places + added, places - padding)
    return torch.where(places < padding + added, moved, places)


def _in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, L, D) in the order of their places (B, L)."""
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))


def last_tokens(seen: Tensor, width: int, mask: Tensor | None) -> Tensor:
    """The last tokens up to the last real one, zeros before the first one.

    Args:
        seen: (B, T, D), which end with the present tokens.
        width: K.
        mask: (B, L), False at padding among the present tokens, L <= T.

    Returns:
        (B, K, D).
    """
    if mask is None:
        return F.pad(seen[:, -width:], (0, 0, max(width - seen.shape[1], 0), 0))
    padded = F.pad(seen, (0, 0, width, 0))
    order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (order * mask).amax(1)  # how many of the present tokens there are up to the last real one
    start = seen.shape[1] - mask.shape[1] + last
    places = start[:, None] + torch.arange(width, device=mask.device)
    return _in_order(padded, places)
