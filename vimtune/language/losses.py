"""Log-likelihoods of labelled tokens, without holding the logits of all of them at once.

A vocabulary of 50,280 makes 200 KB of fp32 logits for a token, twice that in the backward pass. So the head
runs on chunks of tokens, of labelled ones alone, and the backward pass computes the logits of a chunk anew.

Shape letters: B batch, L tokens, D width, T labelled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimtune.adapters.rule import CallRule, WeightRule

IGNORED = -100
"""The label of a token that is not counted, as in torch's cross-entropy."""

CHUNK_TOKENS = 1024
"""Tokens whose logits are held at once; 200 MB of them in fp32 at a vocabulary of 50,280."""


def sequence_losses(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    places: Tensor | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Minus the log-likelihood of the labelled tokens of each sequence, summed.

    A token is predicted from those before it, so the first one is never counted. Padding stands on the right,
    where nothing that counts can see it, and has no labels.

    Args:
        model: a language model of transformers: a `backbone` that gives hidden states, and an `lm_head`.
        input_ids: (B, L).
        labels: (B, L), the tokens to be predicted at their own places, -100 where none is counted.
        places: (T,), the numbers of the labelled tokens when those of all rows are counted together. Token
            0, which is not counted, may be among them, however often: so T can be the same for all batches.
            If None they are looked for, and the host waits for the device to know how many there are.
        chunk_tokens: tokens whose logits are held at once.

    Returns:
        (B,) in fp32, differentiable.

    Raises:
        ValueError: shapes that do not fit together.
    """
    (rows, columns), hidden, wanted = _labelled(model, input_ids, labels, places)
    parts = []
    # To rewind the generator forbids CUDA graphs.
    draws = _draws(model.lm_head)
    for part in _chunks(len(wanted), chunk_tokens):
        chunk = (model.lm_head, hidden[part], wanted[part])
        if torch.is_grad_enabled():
            parts.append(checkpoint(_token_losses, *chunk, use_reentrant=False, preserve_rng_state=draws))
        else:
            parts.append(_token_losses(*chunk))
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    # Each place once, or always with 0, so that sums come out the same every time.
    return (losses.index_put((rows, columns), torch.cat(parts)) if parts else losses).sum(1)


@torch.no_grad()
def greedy_hits(model: Any, input_ids: Tensor, labels: Tensor, *, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Whether each labelled token of a sequence is the likeliest one at its place, (B,).

    The arguments are those of `sequence_losses`. True for a sequence without labels.

    Raises:
        ValueError: shapes that do not fit together.
    """
    (rows, _), hidden, wanted = _labelled(model, input_ids, labels)
    misses = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    for part in _chunks(len(wanted), chunk_tokens):
        best = _logits(model.lm_head, hidden[part]).argmax(-1)
        misses.index_add_(0, rows[part], (best != wanted[part]).long())
    return misses == 0


def _labelled(
    model: Any, input_ids: Tensor, labels: Tensor, places: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Of all labelled tokens: row and column (T,), hidden state that predicts it (T, D), and label (T,)."""
    if input_ids.dim() != 2 or input_ids.shape != labels.shape:
        raise ValueError(
            f"input_ids and labels must both be (B, L); got {tuple(input_ids.shape)} and "
            f"{tuple(labels.shape)}"
        )
    hidden = model.backbone(input_ids, use_cache=False)[0]
    places = _find_places(labels) if places is None else places
    rows, columns = places // labels.shape[1], places % labels.shape[1]
    wanted = labels[rows, columns].masked_fill(columns == 0, IGNORED)
    return (rows, columns), hidden[rows, (columns - 1).clamp(min=0)], wanted


def _find_places(labels: Tensor) -> Tensor:
    """The numbers of the labelled tokens (T,), of which the first one of a row is none.

    Where a CUDA graph is recorded, sizes cannot depend on values: then all tokens are taken, labelled or not.
    """
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.arange(labels.numel(), device=labels.device)
    counted = labels != IGNORED
    counted[:, :1] = False
    return counted.flatten().nonzero()[:, 0]


def _draws(head: nn.Module) -> bool:
    """Whether a head may draw random numbers: of what may be there, adapters with dropout do, and those that
    surround calls may."""
    return any(
        isinstance(module, (CallRule, nn.Dropout)) or (isinstance(module, WeightRule) and module.perturbs)
        for module in head.modules()
    )


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, tokens, size))


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (T, V) in fp32 of hidden states (T, D). The head is called, so that whatever surrounds it
    acts."""
    logits: Tensor = head(hidden.to(head.weight.dtype))  # type: ignore[arg-type]  # a linear layer
    return logits.float()


def _token_losses(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_logits(head, hidden), labels, reduction="none", ignore_index=IGNORED)
