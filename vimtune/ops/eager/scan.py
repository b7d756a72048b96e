"""The selective scan of the backend `torch`, with a hand-written backward pass of memory linear in L.

Tokens are handled in chunks: decays and inputs of a chunk are computed at once, only the recurrence
itself walks token by token. The forward keeps the state before each chunk; the backward recomputes
the states inside one chunk at a time, so memory grows with L / CHUNK states instead of L. The
reverse direction walks the same tensors with descending indices.

Shape letters: B batch, L tokens, T tokens of a chunk, E inner width, N states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.ops.backend import Gradients
from vimtune.ops.scan import ScanInputs, ScanKernels, ScanOptions, time_steps

CHUNK = 16
"""Tokens that are handled at once."""


class EagerScan(ScanKernels):
    """The selective scan in operations of PyTorch."""

    def states_shape(self, batch: int, tokens: int, inner: int, states: int) -> tuple[int, ...]:
        return (-(-tokens // CHUNK), batch, inner, states)

    def forward(
        self, inputs: ScanInputs, options: ScanOptions, save_states: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        u, delta, A, B, C, D, z, delta_bias, first = inputs
        dtype = torch.promote_types(u.dtype, torch.float32)
        dt = time_steps(delta.to(dtype), delta_bias, options.delta_softplus)
        dt_u = dt * u.to(dtype)
        A, B, C = A.to(dtype), B.to(dtype), C.to(dtype)
        y = torch.empty_like(dt_u)
        state = dt.new_zeros(u.shape[0], u.shape[2], A.shape[1]) if first is None else first
        saved = []
        for chunk in _chunks(u.shape[1], options.reverse):
            saved.append(state)
            states, _ = _chunk_states(dt[:, chunk], dt_u[:, chunk], A, B[:, chunk], state, options.reverse)
            y[:, chunk] = torch.einsum("bten,btn->bte", states, C[:, chunk])
            state = states[:, 0 if options.reverse else -1]
        if D is not None:
            y += D.to(dtype) * u.to(dtype)
        if z is not None:
            y *= F.silu(z.to(dtype))
        kept = torch.stack(saved) if save_states else dt.new_empty(0)
        return y.to(u.dtype), kept, None if first is None else state

    def backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        states: Tensor,
        inputs: ScanInputs,
        options: ScanOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        u, delta, A, B, C, D, z, delta_bias, _ = inputs
        dtype = torch.promote_types(u.dtype, torch.float32)
        need_u, need_delta, need_A, need_B, need_C, need_D, need_z, need_bias, need_state = needs
        raw = delta.to(dtype)
        dt = time_steps(raw, delta_bias, options.delta_softplus)
        uf, Af, Bf, Cf = u.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
        dt_u = dt * uf
        grad = grad.to(dtype)
        zf = None if z is None else z.to(dtype)
        grad_y = grad if zf is None else grad * F.silu(zf)

        need_time = need_delta or need_bias
        y = torch.empty_like(uf) if need_z else None
        grad_dt_u = torch.empty_like(uf)
        grad_dt = torch.empty_like(uf)
        grad_A = torch.zeros_like(Af) if need_A else None
        grad_B = torch.empty_like(Bf) if need_B else None
        grad_C = torch.empty_like(Cf) if need_C else None

        # `carry` is decay_{t+1} * adjoint_{t+1}: what the later tokens (in scan order) send back.
        carry = torch.zeros_like(states[0]) if grad_last is None else grad_last
        for index, chunk in reversed(list(enumerate(_chunks(u.shape[1], options.reverse)))):
            before = states[index]
            inside, decay = _chunk_states(
                dt[:, chunk], dt_u[:, chunk], Af, Bf[:, chunk], before, options.reverse
            )
            adjoint = torch.einsum("bte,btn->bten", grad_y[:, chunk], Cf[:, chunk])
            for t in _steps(inside.shape[1], not options.reverse):
                adjoint[:, t] += carry
                carry = decay[:, t] * adjoint[:, t]
            if y is not None:
                y[:, chunk] = torch.einsum("bten,btn->bte", inside, Cf[:, chunk])
            if grad_C is not None:
                grad_C[:, chunk] = torch.einsum("bte,bten->btn", grad_y[:, chunk], inside)
            if grad_B is not None:
                grad_B[:, chunk] = torch.einsum("bte,bten->btn", dt_u[:, chunk], adjoint)
            if need_u or need_time:
                grad_dt_u[:, chunk] = torch.einsum("bten,btn->bte", adjoint, Bf[:, chunk])
            if need_time or grad_A is not None:
                neighbours = [before[:, None], inside[:, :-1]]
                if options.reverse:
                    neighbours = [inside[:, 1:], before[:, None]]
                previous = torch.cat(neighbours, dim=1)
                grad_exponent = adjoint.mul_(previous).mul_(decay)
                if need_time:
                    grad_dt[:, chunk] = torch.einsum("bten,en->bte", grad_exponent, Af)
                if grad_A is not None:
                    grad_A += torch.einsum("bten,bte->en", grad_exponent, dt[:, chunk])

        grad_u = grad_raw = grad_z = grad_D = grad_bias = None
        if need_u:
            grad_u = grad_dt_u * dt
            if D is not None:
                grad_u += grad_y * D.to(dtype)
        if need_time:
            grad_raw = grad_dt + grad_dt_u * uf
            if options.delta_softplus:
                shifted = raw if delta_bias is None else raw + delta_bias.to(dtype)
                grad_raw *= torch.sigmoid(shifted)
            if need_bias and delta_bias is not None:
                grad_bias = grad_raw.sum((0, 1)).to(delta_bias.dtype)
        if need_D and D is not None:
            grad_D = (grad_y * uf).sum((0, 1)).to(D.dtype)
        if y is not None and z is not None and zf is not None:
            if D is not None:
                y += D.to(dtype) * uf
            gate = torch.sigmoid(zf)
            grad_z = (grad * y * gate * (1 + zf * (1 - gate))).to(z.dtype)
        return (
            None if grad_u is None else grad_u.to(u.dtype),
            grad_raw.to(delta.dtype) if need_delta and grad_raw is not None else None,
            None if grad_A is None else grad_A.to(A.dtype),
            None if grad_B is None else grad_B.to(B.dtype),
            None if grad_C is None else grad_C.to(C.dtype),
            grad_D,
            grad_z,
            grad_bias,
            carry if need_state else None,
        )


def _chunks(num_tokens: int, reverse: bool) -> list[slice]:
    """Chunks in scan order; each slice itself is in token order."""
    chunks = [slice(start, min(start + CHUNK, num_tokens)) for start in range(0, num_tokens, CHUNK)]
    return chunks[::-1] if reverse else chunks


def _steps(num_tokens: int, reverse: bool) -> range:
    """Tokens in the order in which the scan visits them."""
    return range(num_tokens - 1, -1, -1) if reverse else range(num_tokens)


def _chunk_states(
    dt: Tensor, dt_u: Tensor, A: Tensor, B: Tensor, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States after, and decays at, every token of a chunk, both (B, T, E, N) in token order."""
    decay = torch.exp(dt[..., None] * A)
    states = torch.einsum("bte,btn->bten", dt_u, B)
    for t in _steps(dt.shape[1], reverse):
        states[:, t].addcmul_(decay[:, t], state)
        state = states[:, t]
    return states, decay
