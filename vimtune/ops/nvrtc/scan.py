"""Launches of the kernels of scan.cu, prompt.cu, scan_from.cu and scan_backward.cu; scan.cuh has the method.

Shape letters: d directions, B batch, L tokens, E inner width, N states (padded NP), P columns of
`projections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.nvrtc import runtime

FORWARD = "scan.cu"
"""File with the kernels of the forward pass."""
PROMPT = "prompt.cu"
"""File with the kernel of a forward pass that gives the last state, too."""
FROM = "scan_from.cu"
"""File with the kernel of a forward pass that begins with given states."""
BACKWARD = "scan_backward.cu"
"""File with the kernels of the backward pass."""
MAX_STATES = 32
"""Most states of a channel that the kernels take: all of them have a place in a thread's registers."""
STATES_MULTIPLE = 8
"""Rows have B and C padded to a multiple of so many states, that of the pieces in which threads read them."""
CHANNELS = 64
"""Number of channels of a block."""
WARP = 32
"""Number of threads of a warp; a block has a warp for each direction."""
SCHEDULERS = 4
"""Number of schedulers of a multiprocessor, each with warps of its own."""
SHORTEST_SEGMENT = 128
"""Fewest tokens of a segment."""

WHOLE = (0.23, 0.35, 0.51), (0.99, 1.48, 2.11)
"""Time that whole sequences take for a token, in microseconds on an H200: without and with a backward pass,
with up to 1, 2 or 3 warps for each scheduler."""
SEGMENTED = (0.43, 0.78, 1.22), (1.44, 2.40, 3.67)
"""The same time for sequences that are cut into segments."""


class ScanInputs(NamedTuple):
    """What the scan and its backward read.

    u: convolved inputs (d, B, L, E).
    delta: time steps after softplus (d, B, L, E), fp16.
    projections: B | C | anything (d, B, L, P), in the dtype of `u`; B and C with zeros behind, NP each.
    A_log: (E, N) of each direction.
    D: (E,) of each direction.
    xz: output of in_proj (B, L, 2 E), whose second half is the gate.
    ends: of segments (`ends_shape`, fp32), which says how many they are; the forward writes it.
    mean: of the directions before the gate (B, L, E), which the forward writes for the backward; empty
        where no backward follows or the result will do (`mean_shape`).
    offsets: (E, N) of each direction, what C reads beside the states; without any it reads them alone.
    """

    u: Tensor
    delta: Tensor
    projections: Tensor
    A_log: Sequence[Tensor]
    D: Sequence[Tensor]
    xz: Tensor
    ends: Tensor
    mean: Tensor
    offsets: Sequence[Tensor] = ()

    def gate(self) -> Tensor:
        """z, the second half of `xz`."""
        return self.xz[..., self.u.shape[-1] :]

    def decays(self) -> list[Tensor]:
        """A_log as the kernels take it."""
        return for_kernels(self.A_log)

    def skips(self) -> list[Tensor]:
        """D as the kernels take it."""
        return for_kernels(self.D)

    def num_states(self) -> int:
        """N."""
        return self.A_log[0].shape[1]

    def segments(self) -> int:
        """Number of segments into which sequences are cut."""
        return self.ends.shape[2] if self.ends.numel() > 0 else 1


class ScanGradients(NamedTuple):
    """Gradients of u and of the time step before softplus (d, B, L, E), of B | C in parts to be added
    up (d, blocks, B, L, 2 NP), if asked for of A_log (d, E, N), D and the time step's bias (d, E), and of
    offsets if there are some (d, E, N)."""

    u: Tensor
    delta: Tensor
    BC: Tensor
    A: Tensor
    D: Tensor
    bias: Tensor
    offset: Tensor


def refusals(dtype: torch.dtype, inner: int, num_states: int) -> list[str]:
    """Reasons why there are no kernels for activations of this dtype and these sizes."""
    reasons = []
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"activations are {dtype}, the kernels have bf16 and fp16")
    if inner % 8 != 0:
        reasons.append(f"inner width {inner} is no multiple of 8")
    if num_states > MAX_STATES:
        reasons.append(f"{num_states} states are more than the {MAX_STATES} of the kernels")
    return reasons


def padded_states(num_states: int) -> int:
    """NP, what B and C have of each row."""
    return -(-num_states // STATES_MULTIPLE) * STATES_MULTIPLE


def for_kernels(weights: Sequence[Tensor]) -> list[Tensor]:
    """A weight of one direction or both as kernels take it: fp32, contiguous, and two of them.

    One direction stands for the other, too, of which its kernels read nothing.
    """
    taken = [weight.float().contiguous() for weight in weights]
    return [taken[0], taken[-1]]


def num_segments(
    directions: int, batch: int, tokens: int, inner: int, device: torch.device, backward: bool
) -> int:
    """Number of segments into which sequences are cut; `backward` says whether a backward pass follows.

    A segmented scan does about 1.6 times the work, which pays where images times channels leave the card
    idle. Of the numbers that just fill it once, twice or three times the one with the shortest time is taken.
    """
    if device.type != "cuda" or batch * tokens * inner == 0:
        return 1
    schedulers = SCHEDULERS * runtime.num_multiprocessors(device)
    warps = directions * batch * -(-inner // CHANNELS)
    times = {1: tokens * WHOLE[backward][min(-(-warps // schedulers), 3) - 1]}
    for each, time in enumerate(SEGMENTED[backward], start=1):
        segments = min(each * schedulers // warps, tokens // SHORTEST_SEGMENT)
        if segments > 1:
            times.setdefault(segments, -(-tokens // segments) * time)
    best = min(times, key=lambda segments: times[segments])
    return -(-tokens // -(-tokens // best))  # Rounded this way, no segment is empty.


def ends_shape(
    directions: int,
    batch: int,
    tokens: int,
    inner: int,
    num_states: int,
    device: torch.device,
    backward: bool,
) -> tuple[int, ...]:
    """Shape of what a scan in segments finds out about their ends; (0,) where there is only one.

    Of a channel these are its states, the sum of its time steps, and padding.
    """
    segments = num_segments(directions, batch, tokens, inner, device, backward)
    entry = padded_states(num_states) + 4
    return (directions, batch, segments, inner, entry) if segments > 1 else (0,)


def _needs_mean(dtype: torch.dtype) -> bool:
    """Whether the backward pass needs the mean of the directions before the gate.

    In bf16 it computes that as the result divided by the gate, for which fp16 has too few small numbers.
    """
    return dtype == torch.float16


def mean_shape(batch: int, tokens: int, inner: int, dtype: torch.dtype, backward: bool) -> tuple[int, ...]:
    """Shape of the mean of the directions, if a `backward` needs it; (0,) where it does not."""
    return (batch, tokens, inner) if backward and _needs_mean(dtype) else (0,)


def scan_forward(inputs: ScanInputs) -> Tensor:
    """Gated average of the directions (B, L, E)."""
    out, arguments = _before_forward(inputs)
    _launch("scan_forward", inputs, FORWARD, arguments, offsets=_offsets(inputs))
    return out


def scan_prompt(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Gated result of a scan in one direction (B, L, E), and the state behind the last token (B, E, N)."""
    out, arguments = _before_forward(inputs)
    batch, _, inner = out.shape
    last = torch.empty((batch, inner, inputs.num_states()), dtype=torch.float32, device=out.device)
    _launch("scan_prompt", inputs, PROMPT, [*arguments, last], offsets=_offsets(inputs))
    return out, last


def scan_from(inputs: ScanInputs, states: Sequence[Tensor]) -> Tensor:
    """Gated average of the directions (B, L, E), each of which begins with its state (E, N)."""
    out, arguments = _before_forward(inputs)
    _launch("scan_from", inputs, FROM, [*arguments, *for_kernels(states)], offsets=_offsets(inputs))
    return out


def _before_forward(inputs: ScanInputs) -> tuple[Tensor, list[Tensor]]:
    """Find the ends of segments, if there are some: the result to be written, and what the kernels take."""
    u, ends = inputs.u, inputs.ends
    out = torch.empty(u.shape[1:], dtype=u.dtype, device=u.device)
    shared = [u, inputs.delta, inputs.projections, *inputs.decays()]
    if inputs.segments() > 1:
        _launch("scan_ends", inputs, FORWARD, [*shared, ends])
    return out, [*shared, *inputs.skips(), inputs.gate(), out, inputs.mean, ends]


def scan_backward(
    grad: Tensor, out: Tensor, inputs: ScanInputs, grad_xz: Tensor, need_parameters: bool
) -> ScanGradients:
    """Gradients from `grad` (B, L, E), that of `out`; that of the gate goes into half of `grad_xz`.

    `inputs` and `out` are those of the forward, with the ends and the mean that it wrote.
    """
    u, delta, projections, ends = inputs.u, inputs.delta, inputs.projections, inputs.ends
    directions, batch, tokens, inner = u.shape
    blocks, segments, num_states = -(-inner // CHANNELS), inputs.segments(), inputs.num_states()

    def scratch(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=u.device)

    found = ScanGradients(
        scratch(*u.shape, dtype=u.dtype),
        scratch(*u.shape, dtype=u.dtype),
        scratch(directions, blocks, batch, tokens, 2 * padded_states(num_states), dtype=u.dtype),
        scratch(directions, batch, segments, inner, num_states, wanted=need_parameters),
        scratch(directions, batch, segments, inner, wanted=need_parameters),
        scratch(directions, batch, segments, inner, wanted=need_parameters),
        scratch(directions, batch, segments, inner, num_states, wanted=bool(inputs.offsets)),
    )
    terms, grad_ends = scratch(*u.shape, 2), torch.empty_like(ends)
    decays, gate = inputs.decays(), inputs.gate()
    if segments > 1:
        behind = [grad, delta, projections, *decays, gate, grad_ends]
        _launch("scan_ends_backward", inputs, BACKWARD, behind, need_parameters)
    arguments = [
        *(grad, u, delta, projections, *decays, *inputs.skips(), gate),
        inputs.mean if _needs_mean(u.dtype) else out,
        *(found.u, found.delta, grad_xz[..., inner:], found.BC, terms, found.A, found.D, found.bias),
        *(ends, grad_ends),
    ]
    offsets = [*_offsets(inputs), found.offset]
    _launch("scan_backward", inputs, BACKWARD, arguments, need_parameters, offsets)
    if need_parameters:
        found = found._replace(A=found.A.sum((1, 2)), D=found.D.sum((1, 2)), bias=found.bias.sum((1, 2)))
    return found._replace(offset=found.offset.sum((1, 2))) if inputs.offsets else found


def _offsets(inputs: ScanInputs) -> list[Tensor]:
    """Offsets as kernels take them, which read nothing of empty tensors."""
    return for_kernels(inputs.offsets or [inputs.D[0].new_empty(0)])


def _launch(
    name: str,
    inputs: ScanInputs,
    source: str,
    arguments: Sequence[Tensor],
    trained: bool | None = None,
    offsets: Sequence[Tensor] = (),
) -> None:
    """Launch a kernel of the file `source`.

    Args:
        name: that of the kernel.
        inputs: for the sizes.
        source: the file.
        arguments: what it takes before the sizes.
        trained: whether gradients of weights are wanted, which kernels of the backward know.
        offsets: what it takes behind the sizes.
    """
    u, segments = inputs.u, inputs.segments()
    directions, batch, tokens, inner = u.shape
    constants = [
        ("DIRECTIONS", directions),
        ("STATES", inputs.num_states()),
        ("WIDTH", inner),
        ("COLUMNS", inputs.projections.shape[-1]),
        ("FP16", int(u.dtype == torch.float16)),
        ("SEGMENTED", int(segments > 1)),
        ("OFFSET", int(bool(inputs.offsets))),
    ]
    if trained is not None:
        constants.append(("TRAINED", int(trained)))
    with device_of(u):
        kernel = runtime.load_kernel(source, name, tuple(constants), u.device.index)
        grid = (-(-inner // CHANNELS), batch, segments)
        span = -(-tokens // segments)
        kernel(grid, WARP * directions, [*arguments, batch, tokens, span, *offsets])
