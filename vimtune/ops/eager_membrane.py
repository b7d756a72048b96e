"""The membranes of Memba in operations of PyTorch, with an explicit backward pass.

Shape letters: B batch, L tokens, W columns of which E are gates, T chunks of c tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.membrane import MembraneInputs, MembraneKernels, MembraneOptions


class EagerMembrane(MembraneKernels):
    """The formula in place, in a copy of `x` or of the gradient."""

    def forward(self, inputs: MembraneInputs, options: MembraneOptions) -> tuple[Tensor, Tensor]:
        x, before = inputs
        result = x.clone()
        gates, chunks, rest = _parts(result, options)
        for chunk in chunks:
            if before is not None:
                chunk.add_(before[:, : chunk.shape[1]], alpha=options.tau)
            _fire(chunk, options.threshold)
            before = chunk
        _fire(rest, options.threshold)
        if options.chunks is None:
            return result, x.new_empty(0)
        in_chunks = gates[:, : len(chunks) * options.cut(x.shape[1])[0]]
        return result, in_chunks.unflatten(1, (options.chunks, -1)).mean(1).contiguous()

    def backward(
        self,
        grad: Tensor,
        grad_mean: Tensor | None,
        result: Tensor,
        options: MembraneOptions,
        need_start: bool,
    ) -> tuple[Tensor, Tensor | None]:
        grad_x = grad.clone()
        (_, grads, rest), (_, chunks, result_rest) = _parts(grad_x, options), _parts(result, options)
        behind = None
        for own, chunk in zip(reversed(grads), reversed(chunks), strict=True):
            if grad_mean is not None:
                own.add_(grad_mean, alpha=1 / len(chunks))
            if behind is not None:
                own[:, : behind.shape[1]].add_(behind, alpha=options.tau)
            behind = own.masked_fill_(_fired(chunk), 0)
        rest.masked_fill_(_fired(result_rest), 0)
        if not need_start:
            return grad_x, None
        if behind is None:
            return grad_x, grad.new_zeros(options.mean_shape(result))
        return grad_x, behind * options.tau


def _parts(x: Tensor, options: MembraneOptions) -> tuple[Tensor, list[Tensor], Tensor]:
    """Views of the gates (B, L, E) in `x`, of their chunks, and of the tokens that are left over."""
    gates = x.narrow(2, options.first, options.width)
    length, in_chunks = options.cut(x.shape[1])
    chunks = list(gates[:, :in_chunks].split(length, 1)) if in_chunks else []
    return gates, chunks, gates[:, in_chunks:]


def _fire(membranes: Tensor, threshold: float) -> None:
    """Put -0.0 where membranes are above the threshold; a zero that is none of these becomes 0.0."""
    membranes.add_(0.0).masked_fill_(membranes > threshold, -0.0)


def _fired(membranes: Tensor) -> Tensor:
    """Where membranes have fired."""
    return (membranes == 0) & torch.signbit(membranes)
