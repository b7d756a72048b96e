"""The definition of every operation: fp32, one step after the other, differentiated by autograd.

They are what `backend="reference"` computes. The scan is slow on purpose. Each backend answers to these
functions, forward and gradients. The inside of a mixer is defined by two of them, see `mixer.composed`.

Shape letters: B batch, L tokens, D width, E inner width, N states, K filter width; of matrices O rows,
C columns, n blocks of b columns, C = n b; of Mamba-2 H heads of width P in G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """Selective scan (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2), channel-last.

        dt_t = softplus(delta_t + delta_bias)
        s_t  = exp(dt_t A) s_{t-1} + dt_t B_t u_t,     s_{-1} = 0
        y_t  = <s_t, C_t> + D u_t,                     out_t = y_t silu(z_t)

    `u`, `delta`, `z`: (B, L, E); `A`: (E, N), negative; `B`, `C`: (B, L, N); `D`, `delta_bias`: (E,).
    `reverse` runs from the last token to the first; the output stays in token order.
    Returns (B, L, E) in the dtype of `u`; all arithmetic is fp32 (fp64 for fp64 input).
    """
    order = range(u.shape[1])
    return _scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, None, order[::-1] if reverse else order
    )[0]


def stateful_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """A selective scan with s_{-1} = `state` (B, E, N), zeros if None.

    The other tensors are those of `selective_scan`. Returns its result, and the state behind the token that
    is visited last (B, E, N) in the dtype of the arithmetic.
    """
    order = range(u.shape[1])
    return _scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, order[::-1] if reverse else order
    )


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor | None,
    order: range,
) -> tuple[Tensor, Tensor]:
    """The result and the last state of a scan that visits the tokens in this order."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)
    if state is None:
        state = torch.zeros(u.shape[0], u.shape[2], A.shape[1], dtype=dtype, device=u.device)
    state = state.to(dtype)
    outputs: list[Tensor] = [state] * u.shape[1]
    for t in order:
        dt = delta[:, t, :, None]
        step_input = dt * B[:, t, None, :].to(dtype) * u[:, t, :, None].to(dtype)
        state = torch.exp(dt * A.to(dtype)) * state + step_input
        outputs[t] = (state * C[:, t, None, :].to(dtype)).sum(-1)
    # The loop has not run. The result is empty, but for autograd it is a function of all inputs.
    if not outputs:
        y = torch.einsum("ble,bln,bln,en->ble", delta * u.to(dtype), B.to(dtype), C.to(dtype), A.to(dtype))
    else:
        y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype) * u.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 3), head by head.

        d_t = min(max(softplus(dt_t + dt_bias), low), high)        for dt_limit = (low, high)
        s_t = exp(d_t A) s_{t-1} + d_t x_t B_t^T,                  s_{-1} = `state`, zeros if None
        y_t = s_t C_t + D x_t

    `x`: (B, L, H, P); `dt`: (B, L, H); `A` (negative), `D`, `dt_bias`: (H,); `B`, `C`: (B, L, G, N), for
    groups of H / G neighbouring heads; `state`: (B, H, P, N). Returns y (B, L, H, P) in the dtype of `x`, and
    the last state; all arithmetic is fp32 (fp64 for fp64 input).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads, width, states = x.shape[2], x.shape[3], B.shape[3]
    steps = dt.to(dtype)
    if dt_bias is not None:
        steps = steps + dt_bias.to(dtype)
    if dt_softplus:
        steps = F.softplus(steps)
    steps = steps.clamp(*dt_limit)
    into, out = (tensor.to(dtype).repeat_interleave(heads // B.shape[2], dim=2) for tensor in (B, C))
    values = x.to(dtype)
    if state is None:
        state = torch.zeros(x.shape[0], heads, width, states, dtype=dtype, device=x.device)
    state = state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        d = steps[:, t, :, None, None]
        state = (
            torch.exp(d * A.to(dtype)[:, None, None]) * state
            + d * values[:, t, ..., None] * into[:, t, :, None]
        )
        outputs.append((state * out[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else values
    if D is not None:
        y = y + D.to(dtype)[:, None] * values
    return y.to(x.dtype), state


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False, reverse: bool = False
) -> Tensor:
    """Depthwise causal convolution, channel-last: y_t = bias + sum_k weight[:, k] x_{t-K+1+k}.

    `x`: (B, L, E); `weight`: (E, K), its last column multiplies the current token; `bias`: (E,).
    `reverse` looks ahead instead of back (the filter runs from the last token to the first).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    sequence = x.to(dtype).transpose(1, 2)
    if reverse:
        sequence = sequence.flip(-1)
    padded = F.pad(sequence, (width, 0))  # This is one more than needed, so that no sequence is too short.
    y = F.conv1d(
        padded, weight.to(dtype)[:, None], None if bias is None else bias.to(dtype), groups=x.shape[2]
    )[..., 1:]
    if reverse:
        y = y.flip(-1)
    y = y.transpose(1, 2)
    return (F.silu(y) if silu else y).to(x.dtype)


def add_rms_norm(
    branch: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x / sqrt(mean(x^2) + eps) * weight, x) for x = residual + branch (Zhang & Sennrich 2019, eq. 4).

    `branch`, `residual`: (..., D); `weight`: (D,). Without `branch` x is the residual itself. x has the dtype
    that torch gives the sum, the norm is computed in fp32 (fp64 for fp64 input) and returned as `dtype`.
    """
    total = residual if branch is None else residual + branch
    wide = torch.promote_types(total.dtype, torch.float32)
    with torch.autocast(residual.device.type, enabled=False):
        normed = F.rms_norm(total.to(wide), weight.shape, weight.to(wide), eps)
    return normed.to(dtype), total


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus log softmax(logits) at the label of each row; 0 where the label is -100.

    `logits`: (T, V); `labels`: (T,). Returns (T,) in fp32 (fp64 for fp64 logits).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, reduction="none", ignore_index=-100)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """u / sqrt(mean(u^2) + eps) * weight for u = x SiLU(gate), where the mean is over a group of channels.

    `x`, `gate`: (..., E); `weight`: (E,). Returns (..., E) in the dtype of `gate`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    product = (x.to(wide) * F.silu(gate.to(wide))).unflatten(-1, (groups, -1))
    with torch.autocast(x.device.type, enabled=False):
        normed = F.rms_norm(product, product.shape[-1:], None, eps).flatten(-2)
    return (normed * weight.to(wide)).to(gate.dtype)


def add_silu_pair(
    x: Tensor, first: Tensor, first_scale: Tensor, second: Tensor, second_scale: Tensor, skipped: int
) -> Tensor:
    """x + first_scale SiLU(first) + second_scale SiLU(second), but x at the token `skipped`.

    `x`, `first`, `second`: (B, L, D); scales: (D,). Returns (B, L, D) in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    changes = (torch.arange(x.shape[1], device=x.device) != skipped)[:, None]
    total = x.to(wide)
    for values, scale in ((first, first_scale), (second, second_scale)):
        total = torch.addcmul(total, F.silu(values.to(wide)), (changes * scale).to(wide))
    return total.to(x.dtype)


def membrane(
    x: Tensor,
    start: Tensor | None,
    first: int,
    width: int,
    chunks: int | None,
    length: int,
    tau: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """u_(i+1) = fire(tau u_i + z_i) in the place of z, with fire(v) = 0 if v > threshold else v.

    z (B, L, E) are the columns of `x` (B, L, W) from `first` on, cut into T chunks z_0 .. z_(T-1) of equally
    many tokens, or without T of `length` tokens (L, if that is less), of which the last one may be shorter.
    u_0 is `start` (B, tokens of a chunk, E), or 0. Tokens that are left over when L is cut into T have no
    predecessors. Returns x with u_1 .. u_T for z, and the mean of these (B, L // T, E); without T an empty
    tensor.
    """

    def fire(v: Tensor) -> Tensor:
        return v.masked_fill(v > threshold, 0)

    # Split, not sliced: the gradients of slices would each be as large as the whole.
    others, z, rest = x.split([first, width, x.shape[-1] - first - width], -1)
    tokens = z.shape[1]
    if chunks is None:
        length = max(min(length, tokens), 1)
        padded = F.pad(z, (0, 0, 0, -tokens % length))
        chunks_of_z, left_over = list(padded.split(length, 1)), z[:, tokens:]
    else:
        size = tokens // chunks
        *chunks_of_z, left_over = z.split([*[size] * chunks, tokens - chunks * size], 1)
    membranes: list[Tensor] = []
    before = start
    for chunk in chunks_of_z:
        before = fire(chunk if before is None else torch.add(chunk, before, alpha=tau))
        membranes.append(before)
    u = torch.cat([*membranes, fire(left_over)], 1).narrow(1, 0, tokens)
    mean = z.new_empty(0) if chunks is None else sum(membranes[1:], membranes[0]) / chunks
    return torch.cat([others, u, rest], -1), mean


def scaled_block_product(weight: Tensor, row_scale: Tensor, blocks: Tensor) -> Tensor:
    """s (W + W diag(D_1, ..., D_n)), where s scales rows.

    `weight` W: (..., O, C); `row_scale` s: (..., O); `blocks` D_1 to D_n: (..., n, b, b).
    Returns (..., O, C).
    """
    columns, size = weight.shape[-1], blocks.shape[-1]
    if size == 1:
        return row_scale.unsqueeze(-1) * (weight + weight * blocks.flatten(-3).unsqueeze(-2))
    parts = weight.reshape(*weight.shape[:-1], columns // size, size)
    # The product has the blocks first; added to W as it is, and only then flattened, it needs no copy.
    changed = (parts + torch.einsum("...oni,...nij->...onj", parts, blocks)).flatten(-2)
    return row_scale.unsqueeze(-1) * changed
