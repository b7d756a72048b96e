"""Log-likelihoods of labelled tokens, without holding the logits of all of them at once.

A vocabulary of 50,280 makes 100 KB of logits for a token in bf16. So the head runs on chunks of tokens, of
labelled ones alone. Where the head is frozen, the gradient of its input is computed along with the loss,
chunk by chunk, and the logits are never needed again. Where it is trained, the backward pass computes the
logits of a chunk anew.

Shape letters: B batch, L tokens, D width, T labelled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimtune.adapters.rule import CallRule, WeightRule
from vimtune.ops import token_losses
from vimtune.ops.cross_entropy import IGNORED

CHUNK_BYTES = 200 * 2**20
"""Bytes of logits that are held at once: of 2,048 tokens in bf16 at a vocabulary of 50,280."""


def sequence_losses(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    places: Tensor | None = None,
    *,
    chunk_tokens: int | None = None,
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
        chunk_tokens: tokens whose logits are held at once; None takes as many as `CHUNK_BYTES` hold.

    Returns:
        (B,) in fp32, differentiable.

    Raises:
        ValueError: shapes that do not fit together.
    """
    places, hidden, wanted = _labelled(model, input_ids, labels, places)
    head = model.lm_head
    size = chunk_tokens or _tokens_of_a_chunk(head)
    losses = torch.zeros(labels.numel(), dtype=torch.float32, device=labels.device)
    if len(wanted) == 0:
        return losses.view(labels.shape).sum(1)
    if not torch.is_grad_enabled():
        found = torch.cat([_token_losses(head, *chunk) for chunk in _chunks(size, hidden, wanted)])
    elif any(parameter.requires_grad for parameter in head.parameters()):
        draws = _draws(head)  # To rewind the generator forbids CUDA graphs.
        parts = [
            checkpoint(_token_losses, head, *chunk, use_reentrant=False, preserve_rng_state=draws)
            for chunk in _chunks(size, hidden, wanted)
        ]
        found = torch.cat(parts)
    else:
        found = _LossesOfFrozenHead.apply(hidden, wanted, head, size)
    # Each place once, or always with 0, so that sums come out the same every time.
    return losses.index_add(0, places, found).view(labels.shape).sum(1)


@torch.no_grad()
def greedy_hits(model: Any, input_ids: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Whether each labelled token of a sequence is the likeliest one at its place, (B,).

    The arguments are those of `sequence_losses`. True for a sequence without labels.

    Raises:
        ValueError: shapes that do not fit together.
    """
    places, hidden, wanted = _labelled(model, input_ids, labels)
    misses = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    size = chunk_tokens or _tokens_of_a_chunk(model.lm_head)
    for own_places, own_hidden, own_wanted in _chunks(size, places, hidden, wanted):
        best = _logits(model.lm_head, own_hidden).argmax(-1)
        misses.index_add_(0, own_places // labels.shape[1], (best != own_wanted).long())
    return misses == 0


def _labelled(
    model: Any, input_ids: Tensor, labels: Tensor, places: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all labelled tokens: number (T,), hidden state that predicts it (T, D), and label (T,)."""
    if input_ids.dim() != 2 or input_ids.shape != labels.shape:
        raise ValueError(
            f"input_ids and labels must both be (B, L); got {tuple(input_ids.shape)} and "
            f"{tuple(labels.shape)}"
        )
    hidden = model.backbone(input_ids, use_cache=False)[0].flatten(0, 1)
    places = _find_places(labels) if places is None else places
    wanted = labels.flatten()[places].masked_fill(places % labels.shape[1] == 0, IGNORED)
    return places, hidden.index_select(0, (places - 1).clamp(min=0)), wanted


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


class _LossesOfFrozenHead(torch.autograd.Function):
    """The losses of tokens (T,), and along with them the gradient of the hidden states (T, D).

    That of a token's loss is all that the backward pass has to know: it multiplies each row by what the loss
    of this token counts.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, chunk_tokens: int) -> Tensor:
        """The losses (T,) of hidden states (T, D) with their labels (T,)."""
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        for own, wanted in _chunks(chunk_tokens, hidden.detach(), labels):
            with torch.enable_grad():
                own.requires_grad_()
                found = _token_losses(head, own, wanted)
                slopes += torch.autograd.grad(found, own, torch.ones_like(found))
            losses.append(found.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the hidden states."""
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None, None


def _tokens_of_a_chunk(head: Any) -> int:
    """How many tokens have logits of `CHUNK_BYTES`, by the dtype in which the head computes them."""
    weight: Tensor = head.weight
    dtype, kind = weight.dtype, weight.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return max(1, CHUNK_BYTES // (weight.shape[0] * dtype.itemsize))


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equally many rows, cut into parts of `size` of them."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (T, V) of hidden states (T, D). The head is called, so that whatever surrounds it acts."""
    logits: Tensor = head(hidden.to(head.weight.dtype))  # type: ignore[arg-type]  # a linear layer
    return logits


def _token_losses(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-likelihoods of labels (T,)."""
    return token_losses(_logits(head, hidden), labels)
