"""Scans that start from a state and return the one after the last token, and what the cache keeps.

Shape letters: B batch, L tokens, T tokens of a chunk, E inner width, N states, K filter width; of Mamba-2
H heads, P channels of a head (E = H P), G groups, c chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.ops import selective_scan

CHUNK = 64
"""Tokens whose contributions to a final state are held at once."""


def conv_window(seen: Tensor, width: int, mask: Tensor | None) -> Tensor:
    """The last real tokens that a convolution has seen, zeros before the first one.

    Args:
        seen: inputs of the convolution (B, T, channels), which end with the present tokens.
        width: K.
        mask: (B, L, 1), False at padding among the present tokens, L <= T.

    Returns:
        (B, K, channels).
    """
    padded = F.pad(seen, (0, 0, width, 0))
    if mask is None:
        return padded[:, -width:]
    order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (order * mask[..., 0]).amax(1)  # how many of the present tokens there are up to the last real one
    start = seen.shape[1] - mask.shape[1] + last
    places = start[:, None] + torch.arange(width, device=mask.device)
    return padded.gather(1, places[..., None].expand(-1, -1, seen.shape[2]))


def scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of the selective scan: output (B, E) in the dtype of `u`, and the state after it (B, E, N).

    `u`, `delta`, `z`: (B, E); `A`: (E, N); `B`, `C`: (B, N); `D`, `delta_bias`: (E,); `state`: (B, E, N).
    """
    dtype = state.dtype
    dt = delta.to(dtype) + delta_bias.to(dtype)
    if delta_softplus:
        dt = F.softplus(dt)
    uf = u.to(dtype)
    state = torch.exp(dt[..., None] * A.to(dtype)) * state + (dt * uf)[..., None] * B.to(dtype)[:, None]
    y = torch.einsum("ben,bn->be", state, C.to(dtype)) + D.to(dtype) * uf
    return (y * F.silu(z.to(dtype))).to(u.dtype), state


def stateful_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
    state: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The selective scan of tokens behind `state` (B, E, N): output (B, L, E) and the state after the last.

    With S_t = dt_0 + ... + dt_t the state is a sum of decayed inputs, exp(A (S_L - S_t)) dt_t B_t u_t, and of
    the decayed state before, exp(A S_L) s. All exponents are negative.
    """
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend=backend)
    dtype = A.dtype
    dt = delta.to(dtype) + delta_bias.to(dtype)
    if delta_softplus:
        dt = F.softplus(dt)
    total = dt.cumsum(1)
    after = torch.zeros_like(A).expand(u.shape[0], -1, -1)
    if state is not None:
        behind = []
        for chunk in range(0, u.shape[1], CHUNK):
            part = slice(chunk, chunk + CHUNK)
            decay = torch.exp(total[:, part, :, None] * A)
            behind.append(torch.einsum("bten,ben,btn->bte", decay, state, C[:, part].to(dtype)))
        y = y + (torch.cat(behind, 1) * F.silu(z.to(dtype))).to(y.dtype)
        after = torch.exp(total[:, -1, :, None] * A) * state
    for chunk in range(0, u.shape[1], CHUNK):
        part = slice(chunk, chunk + CHUNK)
        decay = torch.exp((total[:, -1:] - total[:, part])[..., None] * A)
        dt_u = dt[:, part] * u[:, part].to(dtype)
        after = after + torch.einsum("bten,bte,btn->ben", decay, dt_u, B[:, part].to(dtype))
    return y, after


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of Mamba-2's scan: output (B, H, P) in the dtype of `x`, and the state after it.

    `x`: (B, H, P); `dt`: (B, H); `A`, `D`: (H,); `B`, `C`: (B, G, N); `state`: (B, H, P, N).
    """
    heads = x.shape[1] // B.shape[1]
    dtype = state.dtype
    B, C = (part.to(dtype).repeat_interleave(heads, 1) for part in (B, C))
    xf = x.to(dtype)
    state = torch.exp(dt * A)[..., None, None] * state + (dt[..., None] * xf)[..., None] * B[:, :, None]
    y = torch.einsum("bhpn,bhn->bhp", state, C) + D[:, None] * xf
    return y.to(x.dtype), state


def chunked_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan in matrix products (Dao & Gu 2024, arXiv 2405.21060, section 6, listing 1).

    `x`: (B, L, H, P); `dt`: (B, L, H), positive or 0; `A`, `D`: (H,); `B`, `C`: (B, L, G, N); `state`: before
    the first token, (B, H, P, N). Returns (B, L, H, P) in the dtype of `x` and the state after the last
    token in fp32.
    """
    tokens, size = x.shape[1], min(chunk_size, x.shape[1])
    missing = -tokens % size
    heads = x.shape[2] // B.shape[2]
    dtype = dt.dtype

    def chunks(tensor: Tensor) -> Tensor:
        padding = (0, 0) * (tensor.dim() - 2) + (0, missing)
        return F.pad(tensor.to(dtype), padding).unflatten(1, (-1, size))

    xs, steps = chunks(x), chunks(dt)
    Bs, Cs = (chunks(part).repeat_interleave(heads, 3) for part in (B, C))
    inputs = xs * steps[..., None]
    total = (steps * A).cumsum(2)  # (B, c, T, H)
    # Within a chunk: what token t sends to the later token l.
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    exponent = (total[:, :, :, None] - total[:, :, None]).masked_fill(~lower[:, :, None], -torch.inf)
    scores = torch.einsum("bclhn,bcthn->bclth", Cs, Bs) * exponent.exp()
    y = torch.einsum("bclth,bcthp->bclhp", scores, inputs)
    # From chunk to chunk.
    decayed = Bs * torch.exp(total[:, :, -1:] - total)[..., None]
    added = torch.einsum("bcthn,bcthp->bchpn", decayed, inputs)
    running = torch.zeros_like(added[:, 0]) if state is None else state.to(dtype)
    before = []
    for chunk in range(xs.shape[1]):
        before.append(running)
        running = torch.exp(total[:, chunk, -1])[..., None, None] * running + added[:, chunk]
    carried = torch.einsum("bclhn,bchpn->bclhp", Cs, torch.stack(before, 1))
    y = y + carried * total.exp()[..., None] + D[:, None] * xs
    return y.flatten(1, 2)[:, :tokens].to(x.dtype), running
