"""The scan of Mamba-2 of the backend `torch`: products of matrices in chunks of tokens, and their gradients.

The decay is one number for a whole head, so that the outputs of a chunk of tokens are products of matrices
(Dao & Gu 2024, arXiv 2405.21060, section 6): within a chunk like attention under a mask of decays, between
chunks through the states at their borders. The backward pass is written out in the same products. It computes
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
        wide = parts.steps.dtype
        y = chunks.by_token(parts.weights @ parts.fed).to(wide)
        y.addcmul_(chunks.ungrouped(parts.read).to(wide), chunks.beside(parts.elapsed))
        if inputs.D is not None:
            y.addcmul_(chunks.rows(inputs.x).to(wide), chunks.of_heads(inputs.D).to(wide))
        return chunks.joined(y.to(inputs.x.dtype)), chunks.joined_state(parts.last), parts

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
        parts = _Parts(*kept) if kept else _parts(inputs, options, chunks)
        steps, elapsed = parts.steps, parts.elapsed
        low, wide = inputs.x.dtype, steps.dtype
        x, grad = chunks.rows(inputs.x), chunks.rows(grad.to(low))
        Bs, Cs = chunks.by_group(inputs.B), chunks.by_group(inputs.C)

        # Between chunks. The gradients of what chunks add to the state run from the last chunk to the first.
        grad_read = chunks.grouped((grad * chunks.beside(elapsed)).to(low))
        grad_before = chunks.parted((Cs.mT @ grad_read).to(wide))
        whole = chunks.beside_states(elapsed)
        grad_added = torch.empty_like(parts.before)
        grad_added[:, -1] = 0 if grad_last is None else chunks.state(grad_last)
        for chunk in reversed(range(1, chunks.count)):
            later = grad_added[:, chunk], whole[:, chunk]
            torch.addcmul(grad_before[:, chunk], *later, out=grad_added[:, chunk - 1])
        grad_state = torch.addcmul(grad_before[:, 0], grad_added[:, 0], whole[:, 0])
        grad_C = grad_read @ parts.before.flatten(-2).to(low).mT
        low_added = grad_added.flatten(-2).to(low)
        grad_B = parts.left @ low_added.mT
        grad_left = chunks.ungrouped(Bs @ low_added)
        # Gradients of the logarithms of decays: of those from the beginning of a chunk to token i ...
        log_elapsed = elapsed * chunks.steps_of((grad * chunks.ungrouped(parts.read)).sum(-1, dtype=wide))
        agreement = torch.mul(grad_added, parts.before, out=grad_before)  # in memory that is free by now
        log_elapsed[..., -1] += elapsed[..., -1] * agreement.sum((3, 5))
        del agreement, grad_before, grad_added, low_added
        feeding = parts.decays[..., -1, :]
        steps_left = feeding * chunks.steps_of((x * grad_left).sum(-1, dtype=wide))

        # Within chunks.
        grad_heads = chunks.by_head(grad).contiguous()
        grad_fed = chunks.by_token(parts.weights.mT @ grad_heads)
        shared = (grad_heads @ parts.fed.mT).to(wide).mul_(parts.decays)
        grad_alike = shared.sum(3).to(low)
        grad_C += grad_alike @ Bs
        grad_B += grad_alike.mT @ Cs
        log_decays = shared.mul_(parts.alike)  # ... and of those from token j to token i
        log_decays[..., -1, :] += steps * steps_left

        # A rate is part of all decays from a token before its own to its own or one behind. Each such sum is
        # added up by itself: the difference of two long ones would lose its last digits.
        grad_rates = log_elapsed.flip(-1).cumsum(-1).flip(-1)
        grad_rates[..., 1:] += log_decays.cumsum_(-1).tril_(-1).sum(-2)[..., :-1]
        del shared, log_decays
        grad_steps = chunks.steps_of((x * grad_fed).sum(-1, dtype=wide)) + steps_left
        grad_steps += grad_rates * chunks.of_heads(inputs.A).to(wide)
        grad_x = grad_fed.to(wide).addcmul_(grad_left.to(wide), chunks.beside(feeding))
        grad_x *= chunks.beside(steps)
        grad_D = None
        if inputs.D is not None:
            grad_x.addcmul_(grad.to(wide), chunks.of_heads(inputs.D).to(wide))
            grad_D = (x * grad).sum((0, 1, 2, 5), dtype=wide).flatten()
        grad_steps = chunks.joined(chunks.beside(grad_steps).squeeze(-1))
        grad_dt = time_step_gradients(grad_steps, inputs.dt.to(wide), inputs.dt_bias, options)
        found = [
            chunks.joined(grad_x.to(low)),
            grad_dt,
            (grad_rates * steps).sum((0, 1, 4)).flatten(),
            chunks.joined_groups(grad_B),
            chunks.joined_groups(grad_C),
            grad_D,
            grad_dt.sum((0, 1)),
            chunks.joined_state(grad_state),
        ]
        return wanted(found, inputs, needs)


class _Parts(NamedTuple):
    """What both passes need. Factors of products have the dtype of `x`, all else is fp32 or fp64."""

    steps: Tensor
    """Time steps, (B, c, G, R, Q)."""
    decays: Tensor
    """What is left at token i of what token j has added, (B, c, G, R, Q, Q); 0 where j is behind i."""
    elapsed: Tensor
    """What is left at token i of the state before its chunk, (B, c, G, R, Q)."""
    alike: Tensor
    """C_i . B_j, (B, c, G, 1, Q, Q), a factor."""
    weights: Tensor
    """The decayed `alike`, (B, c, G, R, Q, Q), a factor."""
    fed: Tensor
    """`x` times its time steps, (B, c, G, R, Q, P), a factor."""
    left: Tensor
    """What is left of `fed` behind the chunk, (B, c, G, Q, R P), a factor."""
    before: Tensor
    """The states before the chunks, (B, c, G, N, R, P)."""
    last: Tensor
    """The state behind the last one, (B, G, N, R, P)."""
    read: Tensor
    """The state before the chunk times C_i, (B, c, G, Q, R P), a factor."""


def _parts(inputs: SsdInputs, options: SsdOptions, chunks: _Chunks) -> _Parts:
    """Compute everything but the results."""
    low, wide = inputs.x.dtype, torch.promote_types(inputs.x.dtype, torch.float32)
    x = chunks.rows(inputs.x)
    steps = chunks.steps_of(chunks.rows(time_steps(inputs.dt.to(wide), inputs.dt_bias, options)))
    rates = steps * chunks.of_heads(inputs.A).to(wide)  # <= 0
    # Each sum of rates is added up by itself, as for the gradients.
    later = torch.ones(chunks.size, chunks.size, dtype=wide, device=steps.device).tril(-1)
    decays = (rates.unsqueeze(-1) * later).cumsum_(-2).exp_().tril_()
    elapsed = rates.cumsum(-1).exp()

    Bs, Cs = chunks.by_group(inputs.B), chunks.by_group(inputs.C)
    left = chunks.grouped((x * chunks.beside(steps * decays[..., -1, :])).to(low))
    added = chunks.parted((Bs.mT @ left).to(wide))
    whole = chunks.beside_states(elapsed)
    before = torch.empty_like(added)
    before[:, 0] = 0 if inputs.state is None else chunks.state(inputs.state)
    for chunk in range(1, chunks.count):
        earlier = before[:, chunk - 1], whole[:, chunk - 1]
        torch.addcmul(added[:, chunk - 1], *earlier, out=before[:, chunk])
    last = torch.addcmul(added[:, -1], before[:, -1], whole[:, -1])
    read = Cs @ before.flatten(-2).to(low)

    alike = (Cs @ Bs.mT).unsqueeze(3)
    weights = (alike * decays).to(low)
    fed = torch.empty_like(chunks.by_head(x), memory_format=torch.contiguous_format)
    torch.mul(chunks.by_head(x), steps.unsqueeze(-1), out=fed)
    return _Parts(steps, decays, elapsed, alike, weights, fed, left, before, last, read)


class _Chunks:
    """How tokens are cut into chunks, and tensors are laid out for products.

    In "rows" (B, c, Q, G, R, P), heads lie beside each other as in the inputs.
    """

    def __init__(self, inputs: SsdInputs) -> None:
        """Take the sizes; tokens are missing in the last chunk, where time steps of 0 change nothing."""
        tokens, heads = inputs.x.shape[1:3]
        groups = inputs.B.shape[2]
        self.low = inputs.x.dtype
        self.tokens = tokens
        self.heads = (groups, heads // groups)
        self.size = min(CHUNK, tokens)
        self.count = -(-tokens // self.size)

    def _cut(self, tensor: Tensor) -> Tensor:
        """(B, L, ...) to (B, c, Q, ...)."""
        missing = self.count * self.size - self.tokens
        if missing:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
        cut: Tensor = tensor.unflatten(1, (self.count, self.size))
        return cut

    def rows(self, tensor: Tensor) -> Tensor:
        """(B, L, H, ...) to (B, c, Q, G, R, ...)."""
        rows: Tensor = self._cut(tensor).unflatten(3, self.heads)
        return rows

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
        return self.parted(tensor).transpose(2, 3)

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

    def parted(self, tensor: Tensor) -> Tensor:
        """(..., R P) to (..., R, P)."""
        wide: Tensor = tensor.unflatten(-1, (self.heads[1], -1))
        return wide

    def beside_states(self, elapsed: Tensor) -> Tensor:
        """What is left of a state behind its chunk, (B, c, G, 1, R, 1)."""
        return elapsed[:, :, :, None, :, -1:]

    def of_heads(self, vector: Tensor) -> Tensor:
        """(H,) to (G, R, 1)."""
        return vector.view(*self.heads, 1)

    def state(self, tensor: Tensor) -> Tensor:
        """(B, H, P, N) to (B, G, N, R, P)."""
        return tensor.view(-1, *self.heads, *tensor.shape[2:]).permute(0, 1, 4, 2, 3)

    def joined_state(self, tensor: Tensor) -> Tensor:
        """(B, G, N, R, P) to (B, H, P, N)."""
        return tensor.permute(0, 1, 3, 4, 2).flatten(1, 2)
