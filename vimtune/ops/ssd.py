"""The scan of Mamba-2, `ssd`, in the chunked form that consists of matrix products.

Its decay is one number for a whole head, so that the outputs of a chunk of tokens are products of matrices
(Dao & Gu 2024, arXiv 2405.21060, section 6): within a chunk like attention under a mask of decays, between
chunks through the states at their borders. Everything is operations of PyTorch that autograd differentiates;
a backend may have kernels of its own.

Shape letters: B batch, L tokens, H heads, P width of a head, G groups of heads that share B and C, N states,
c chunks of Q tokens, R = H / G heads of a group.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.backends import REFERENCE
from vimtune.ops import reference, scan
from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import chosen_backend, find_backend, find_kernels
from vimtune.ops.operation import check_inputs

CHUNK = 64
"""Tokens of a chunk. The products within chunks grow with it, what is handed on between them shrinks."""
NO_LIMIT = (0.0, float("inf"))
"""Limits of time steps that change nothing behind softplus."""


class SsdInputs(NamedTuple):
    """Tensors of `ssd`."""

    x: Tensor
    """(B, L, H, P)"""
    dt: Tensor
    """(B, L, H)"""
    A: Tensor
    """(H,)"""
    B: Tensor
    """(B, L, G, N)"""
    C: Tensor
    """(B, L, G, N)"""
    D: Tensor | None = None
    """(H,)"""
    dt_bias: Tensor | None = None
    """(H,)"""
    state: Tensor | None = None
    """(B, H, P, N)"""


class SsdOptions(NamedTuple):
    """The other arguments of `ssd`."""

    dt_softplus: bool
    """Whether time steps are softplus of `dt`, or `dt` itself."""
    dt_limit: tuple[float, float]
    """Time steps are held between these."""


class SsdKernels(Kernels[SsdInputs]):
    """Kernels of the scan of Mamba-2, differentiable by themselves."""

    operation = "ssd"

    @abstractmethod
    def run(self, inputs: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor]:
        """Return what `ssd` does."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
    state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-2; the formula is that of `vimtune.ops.reference.ssd`.

    A time step of 0 leaves the state alone, which is how padding is kept out of it.

    Args:
        x: what is scanned, (B, L, H, P).
        dt: time steps before `dt_bias` and softplus, (B, L, H).
        A: negative decay of each head, (H,).
        B: input matrices of each group of heads, (B, L, G, N).
        C: output matrices of each group of heads, (B, L, G, N).
        D: what of `x` is added to the result, (H,).
        dt_bias: added to `dt`, (H,).
        dt_softplus: whether time steps are softplus of `dt`, or `dt` itself.
        dt_limit: time steps are held between these.
        state: the state before the first token, (B, H, P, N); zeros if None.
        backend: see `vimtune.ops`.

    Returns:
        The result (B, L, H, P) in the dtype of `x`, and the state after the last token (B, H, P, N), fp32
        (fp64 for fp64 input).

    Raises:
        ValueError: shapes or devices that do not fit together, tensors that are not of floating point
            numbers, or an unknown backend.
        BackendUnavailable: `backend` names one that cannot run here.
    """
    inputs, options = SsdInputs(x, dt, A, B, C, D, dt_bias, state), SsdOptions(dt_softplus, dt_limit)
    _check(inputs)
    chosen = chosen_backend(backend)
    if chosen == REFERENCE:
        return reference.ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, state)
    name = find_backend(SsdKernels, backend, x.device, inputs) if x.numel() else ""
    if name:
        return find_kernels(SsdKernels, name, x.device, inputs)[1].run(inputs, options)
    return chunked(inputs, options)


def chunked(inputs: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor]:
    """What `ssd` computes, in matrix products of chunks.

    Sums are fp32 (fp64 for fp64 input); the products themselves have the dtype of `x`, as under autocast.
    """
    x, dt, A, B, C, D, dt_bias, first = inputs
    batch, tokens, heads, width = x.shape
    groups, states = B.shape[2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = time_steps(dt.to(wide), dt_bias, options)
    state = x.new_zeros(batch, heads, width, states, dtype=wide) if first is None else first.to(wide)
    if tokens == 0:
        return x.clone() if D is None else x * D.to(x.dtype).unsqueeze(-1), state.clone()
    size = min(CHUNK, tokens)
    missing = -tokens % size  # steps of 0 behind the last token change nothing
    num_chunks = (tokens + missing) // size

    def in_chunks(tensor: Tensor) -> Tensor:
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)) if missing else tensor
        return padded.reshape(batch, num_chunks, size, *tensor.shape[2:])

    # Heads come before tokens, so that a group of heads is a batch of products, or the columns of one.
    xs = in_chunks(x).view(batch, num_chunks, size, groups, heads // groups, width)
    steps = in_chunks(steps).permute(0, 1, 3, 2).view(batch, num_chunks, groups, heads // groups, size)
    Bs, Cs = (in_chunks(tensor.to(x.dtype)).transpose(2, 3) for tensor in (B, C))  # (B, c, G, Q, N)
    rates = steps * A.to(wide).view(groups, heads // groups, 1)  # (B, c, G, R, Q), <= 0
    elapsed = rates.cumsum(-1)

    # Within chunks: C_i . B_j decayed from token j to token i, times the time step of j. Each sum of rates is
    # added up by itself: the difference of two long ones would have lost its last digits.
    past = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    since = rates.unsqueeze(-1).masked_fill(~past.tril(-1), 0.0).cumsum(-2)
    weights = since.masked_fill(~past, float("-inf")).exp() * steps.unsqueeze(-2)
    alike = (Cs @ Bs.transpose(-1, -2)).unsqueeze(3)  # (B, c, G, 1, Q, Q)
    columns = xs.permute(0, 1, 3, 4, 2, 5)  # (B, c, G, R, Q, P)
    inside = (alike * weights).to(x.dtype) @ columns

    # What a chunk adds to the state: (B, c, G, N, R P), one product for all heads of a group.
    fading = (since[..., -1, :].exp() * steps).permute(0, 1, 4, 2, 3).unsqueeze(-1)
    fed = (xs * fading.to(x.dtype)).transpose(2, 3).flatten(-2)
    added = (Bs.transpose(-1, -2) @ fed).to(wide).unflatten(-1, (heads // groups, width))

    # The states before the chunks, and the one behind the last.
    current = state.view(batch, groups, heads // groups, width, states).permute(0, 1, 4, 2, 3)
    before = []
    decay = elapsed[..., -1].exp()[:, :, :, None, :, None]
    for chunk in range(num_chunks):
        before.append(current)
        current = current * decay[:, chunk] + added[:, chunk]
    last = current.permute(0, 1, 3, 4, 2).reshape(batch, heads, width, states)
    read = Cs @ torch.stack(before, 1).flatten(-2).to(x.dtype)  # (B, c, G, Q, R P)
    across = read.unflatten(-1, (heads // groups, width)).transpose(3, 4)  # (B, c, G, R, Q, P)
    y = torch.addcmul(inside.to(wide), across.to(wide), elapsed.exp().unsqueeze(-1))
    if D is not None:
        y = y + D.to(wide).view(groups, heads // groups, 1, 1) * columns
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, num_chunks * size, heads, width)
    return y[:, :tokens].to(x.dtype), last


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`, as decoding needs it.

    Args:
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B: (B, G, N).
        C: (B, G, N).
        D: (H,).
        dt_bias: (H,).
        dt_softplus: as in `ssd`.
        dt_limit: as in `ssd`.
        state: the state before the token, (B, H, P, N).

    Returns:
        The result (B, H, P) in the dtype of `x`, and the state after the token (B, H, P, N).
    """
    wide, heads = state.dtype, x.shape[1]
    step = time_steps(dt.to(wide), dt_bias, SsdOptions(dt_softplus, dt_limit))
    into, out = (tensor.to(wide).repeat_interleave(heads // B.shape[1], dim=1) for tensor in (B, C))
    values = x.to(wide)
    fed = (step.unsqueeze(-1) * values).unsqueeze(-1) * into.unsqueeze(-2)
    state = (step * A.to(wide)).exp()[..., None, None] * state + fed
    y = (state @ out.unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * values
    return y.to(x.dtype), state


def time_steps(dt: Tensor, dt_bias: Tensor | None, options: SsdOptions) -> Tensor:
    """Time steps (..., H) in the dtype of `dt`."""
    return scan.time_steps(dt, dt_bias, options.dt_softplus).clamp(*options.dt_limit)


def _check(inputs: SsdInputs) -> None:
    """Raise ValueError for tensors that do not fit together."""
    x, B = inputs.x, inputs.B
    if x.dim() != 4 or B.dim() != 4 or B.shape[2] < 1 or x.shape[2] % B.shape[2]:
        raise ValueError(
            "x must be (B, L, H, P) and B (B, L, G, N), where G divides H; "
            f"got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, tokens, heads, width = x.shape
    groups, states = B.shape[2:]
    check_inputs(
        x.device,
        x=(x, tuple(x.shape)),
        dt=(inputs.dt, (batch, tokens, heads)),
        A=(inputs.A, (heads,)),
        B=(B, (batch, tokens, groups, states)),
        C=(inputs.C, (batch, tokens, groups, states)),
        D=(inputs.D, (heads,)),
        dt_bias=(inputs.dt_bias, (heads,)),
        state=(inputs.state, (batch, heads, width, states)),
    )
