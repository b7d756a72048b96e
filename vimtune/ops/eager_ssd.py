"""The scan of Mamba-2 of the backend `torch`: products of matrices within chunks of tokens, and their gradients.

The decay is one number for a whole head, so that the outputs of a chunk of tokens are products of matrices
(Dao & Gu 2024, arXiv 2405.21060, section 6): within a chunk like attention under a mask of decays, between
chunks through the states at their borders. The backward pass is written out in the same products, and computes
from the inputs what it needs, where autograd would keep a dozen tensors of their size.

Sums, decays and states are fp32 (fp64 for fp64 input); the factors of products have the dtype of `x`.

Shape letters: B batch, L tokens, H heads, P width of a head, G groups of heads that share B and C, R = H / G
heads of a group, N states, c chunks of Q tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.ops.backend import Gradients
from vimtune.ops.operation import wanted
from vimtune.ops.ssd import SsdInputs, SsdKernels, SsdOptions, time_step_gradients, time_steps

CHUNK = 64
"""Tokens of a chunk. The products within chunks grow with it, what is handed on between them shrinks."""


class EagerSsd(SsdKernels):
    """The scan of Mamba-2 in operations of PyTorch."""

    def forward(self, inputs: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        chunks = _Chunks(inputs)
        parts = _parts(inputs, options, chunks)
        x, low, wide = chunks.rows(inputs.x), inputs.x.dtype, parts.steps.dtype
        fed = chunks.by_head((x * chunks.beside(parts.steps)).to(low))
        inside = (parts.alike * parts.decays).to(low) @ fed
        y = chunks.by_token(inside).to(wide)
        y = torch.addcmul(y, chunks.ungrouped(parts.read).to(wide), chunks.beside(parts.elapsed))
        if inputs.D is not None:
            y.addcmul_(x.to(wide), chunks.of_heads(inputs.D).to(wide))
        return chunks.joined(y).to(low), chunks.joined_state(parts.states[:, -1]), parts

    def backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        kept: Sequence[Tensor],
        inputs: SsdInputs,
        options: SsdOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        chunks = _Chunks(inputs)
        steps, decays, elapsed, alike, states, read = kept or _parts(inputs, options, chunks)
        low, wide = inputs.x.dtype, steps.dtype
        x, grad = chunks.rows(inputs.x), chunks.rows(grad.to(low))
        Bs, Cs = chunks.by_group(inputs.B), chunks.by_group(inputs.C)
        feeding = decays[..., -1, :]  # what is left of token j at the end of its chunk, (B, c, G, R, Q)

        # Between chunks. The gradients of the states run from the last chunk to the first.
        grad_read = chunks.grouped((grad * chunks.beside(elapsed)).to(low))
        grad_states = torch.empty_like(states)
        grad_states[:, -1] = 0 if grad_last is None else chunks.state(grad_last)
        grad_states[:, :-1] = (Cs.mT @ grad_read).view(states[:, 1:].shape)
        whole = chunks.beside_states(elapsed)
        for chunk in reversed(range(chunks.count)):
            grad_states[:, chunk].addcmul_(grad_states[:, chunk + 1], whole[:, chunk])
        before, grad_added = states[:, :-1], grad_states[:, 1:]
        grad_C = grad_read @ before.flatten(-2).to(low).mT
        low_added = grad_added.flatten(-2).to(low)
        grad_B = chunks.grouped((x * chunks.beside(steps * feeding)).to(low)) @ low_added.mT
        grad_ends = chunks.ungrouped(Bs @ low_added)  # of what is fed to the state behind the chunk
        # Gradients of logarithms of decays: of those from the beginning of the chunk to token i ...
        log_elapsed = elapsed * chunks.steps_of((grad * chunks.ungrouped(read)).sum(-1, dtype=wide))
        log_elapsed[..., -1] += elapsed[..., -1] * (grad_added * before).sum((3, 5))
        ends = feeding * chunks.steps_of((x * grad_ends).sum(-1, dtype=wide))

        # Within chunks.
        grad_heads = chunks.by_head(grad)
        grad_fed = (alike * decays).to(low).mT @ grad_heads
        fed = chunks.by_head((x * chunks.beside(steps)).to(low))
        shared = (grad_heads @ fed.mT).to(wide).mul_(decays)
        grad_alike = shared.sum(3).to(low)
        grad_C += grad_alike @ Bs
        grad_B += grad_alike.mT @ Cs
        log_decays = shared.mul_(alike)  # ... and of those from token j to token i
        log_decays[..., -1, :] += steps * ends

        # A rate is part of all decays from a token before its own to its own or one behind. Each such sum is
        # added up by itself: the difference of two long ones would lose its last digits.
        grad_rates = log_elapsed.flip(-1).cumsum(-1).flip(-1)
        grad_rates[..., 1:] += log_decays.cumsum_(-1).tril_(-1).sum(-2)[..., :-1]
        grad_fed = chunks.by_token(grad_fed)
        grad_steps = chunks.steps_of((x * grad_fed).sum(-1, dtype=wide)) + ends
        grad_steps += grad_rates * chunks.of_heads(inputs.A).to(wide)
        grad_x = torch.addcmul(grad_fed.to(wide), grad_ends.to(wide), chunks.beside(feeding))
        grad_x *= chunks.beside(steps)
        grad_D = None
        if inputs.D is not None:
            grad_x.addcmul_(grad.to(wide), chunks.of_heads(inputs.D).to(wide))
            grad_D = (x * grad).sum(-1, dtype=wide).sum((0, 1, 2)).flatten()
        grad_steps = chunks.joined(chunks.beside(grad_steps).squeeze(-1))
        raw = time_step_gradients(grad_steps, inputs.dt.to(wide), inputs.dt_bias, options)
        found = [
            chunks.joined(grad_x),
            raw,
            (grad_rates * steps).sum((0, 1, 4)).flatten(),
            chunks.joined_groups(grad_B),
            chunks.joined_groups(grad_C),
            grad_D,
            raw.sum((0, 1)),
            chunks.joined_state(grad_states[:, 0]),
        ]
        return wanted(found, inputs, needs)


class _Parts(NamedTuple):
    """What both passes need of a scan; factors of products in the dtype of `x`, all else in fp32 or fp64."""

    steps: Tensor
    """Time steps, (B, c, G, R, Q)."""
    decays: Tensor
    """What is left at token i of what token j adds to the state, (B, c, G, R, Q, Q); 0 where j is behind i."""
    elapsed: Tensor
    """What is left at token i of the state before its chunk, (B, c, G, R, Q)."""
    alike: Tensor
    """C_i . B_j, (B, c, G, 1, Q, Q), a factor."""
    states: Tensor
    """The states before all chunks and behind the last one, (B, c + 1, G, N, R, P)."""
    read: Tensor
    """The state before the chunk times C_i, (B, c, G, Q, R P), a factor."""


def _parts(inputs: SsdInputs, options: SsdOptions, chunks: _Chunks) -> _Parts:
    """Compute everything but the results."""
    low, wide = inputs.x.dtype, torch.promote_types(inputs.x.dtype, torch.float32)
    steps = chunks.steps_of(chunks.rows(time_steps(inputs.dt.to(wide), inputs.dt_bias, options)))
    rates = steps * chunks.of_heads(inputs.A).to(wide)  # <= 0
    # Each sum of rates is added up by itself, as for the gradients.
    later = torch.ones(chunks.size, chunks.size, dtype=wide, device=steps.device).tril(-1)
    decays = (rates.unsqueeze(-1) * later).cumsum_(-2).exp_().tril_()
    elapsed = rates.cumsum(-1).exp()
    Bs, Cs = chunks.by_group(inputs.B), chunks.by_group(inputs.C)
    ends = chunks.beside(steps * decays[..., -1, :])
    added = Bs.mT @ chunks.grouped((chunks.rows(inputs.x) * ends).to(low))

    states = added.new_empty(chunks.states_shape, dtype=wide)
    states[:, 0] = 0 if inputs.state is None else chunks.state(inputs.state)
    states[:, 1:] = added.view(states[:, 1:].shape)
    whole = chunks.beside_states(elapsed)
    for chunk in range(chunks.count):
        states[:, chunk + 1].addcmul_(states[:, chunk], whole[:, chunk])
    read = Cs @ states[:, :-1].flatten(-2).to(low)
    return _Parts(steps, decays, elapsed, (Cs @ Bs.mT).unsqueeze(3), states, read)


class _Chunks:
    """How tokens are cut into chunks, and tensors are laid out for products.

    In "rows" (B, c, Q, G, R, P), heads lie beside each other as in the inputs.
    """

    def __init__(self, inputs: SsdInputs) -> None:
        """Take the sizes; tokens are missing in the last chunk, where time steps of 0 change nothing."""
        batch, tokens, heads, width = inputs.x.shape
        groups, states = inputs.B.shape[2:]
        self.low = inputs.x.dtype
        self.tokens = tokens
        self.heads = (groups, heads // groups)
        self.size = min(CHUNK, tokens)
        self.count = -(-tokens // self.size)
        self.states_shape = (batch, self.count + 1, groups, states, heads // groups, width)

    def _cut(self, tensor: Tensor) -> Tensor:
        """(B, L, ...) to (B, c, Q, ...)."""
        missing = self.count * self.size - self.tokens
        if missing:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
        return tensor.unflatten(1, (self.count, self.size))

    def rows(self, tensor: Tensor) -> Tensor:
        """(B, L, H, ...) to (B, c, Q, G, R, ...)."""
        return self._cut(tensor).unflatten(3, self.heads)

    def joined(self, rows: Tensor) -> Tensor:
        """(B, c, Q, G, R, ...) to (B, L, H, ...)."""
        return rows.flatten(3, 4).flatten(1, 2)[:, : self.tokens]

    def by_group(self, tensor: Tensor) -> Tensor:
        """(B, L, G, N) to a factor (B, c, G, Q, N)."""
        return self._cut(tensor.to(self.low)).transpose(2, 3)

    def joined_groups(self, tensor: Tensor) -> Tensor:
        """(B, c, G, Q, N) to (B, L, G, N)."""
        return tensor.transpose(2, 3).flatten(1, 2)[:, : self.tokens]

    def grouped(self, rows: Tensor) -> Tensor:
        """Rows to (B, c, G, Q, R P), for one product of all heads of a group."""
        return rows.transpose(2, 3).flatten(-2)

    def ungrouped(self, tensor: Tensor) -> Tensor:
        """(B, c, G, Q, R P) to rows."""
        return tensor.unflatten(-1, (self.heads[1], -1)).transpose(2, 3)

    def by_head(self, rows: Tensor) -> Tensor:
        """Rows to (B, c, G, R, Q, P), for products of single heads."""
        return rows.permute(0, 1, 3, 4, 2, 5)

    def by_token(self, tensor: Tensor) -> Tensor:
        """(B, c, G, R, Q, P) to rows."""
        return tensor.permute(0, 1, 4, 2, 3, 5)

    def steps_of(self, rows: Tensor) -> Tensor:
        """Numbers of tokens (B, c, Q, G, R) to (B, c, G, R, Q)."""
        return rows.permute(0, 1, 3, 4, 2)

    def beside(self, steps: Tensor) -> Tensor:
        """(B, c, G, R, Q) to (B, c, Q, G, R, 1), for products with rows."""
        return steps.permute(0, 1, 4, 2, 3).unsqueeze(-1)

    def beside_states(self, elapsed: Tensor) -> Tensor:
        """What is left of a state behind its chunk, (B, c, G, 1, R, 1)."""
        return elapsed[:, :, :, None, :, -1:]

    def of_heads(self, vector: Tensor) -> Tensor:
        """(H,) to (G, R, 1)."""
        return vector.view(*self.heads, 1)

    def state(self, tensor: Tensor) -> Tensor:
        """(B, H, P, N) to (B, G, N, R, P)."""
        return tensor.unflatten(1, self.heads).permute(0, 1, 4, 2, 3)

    def joined_state(self, tensor: Tensor) -> Tensor:
        """(B, G, N, R, P) to (B, H, P, N)."""
        return tensor.permute(0, 1, 3, 4, 2).flatten(1, 2)
