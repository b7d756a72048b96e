"""The operations `selective_scan` and `stateful_scan`: their kernels, and how torch knows them.

The second one begins with a given state and also returns the last one, which a language model hands on from
one part of a text to the next. The same kernels compute both. Being custom operations with fake
implementations they are opaque to torch.compile, torch.export, torch.fx and TorchScript, and differentiable
everywhere. Gradients nobody asks for are not computed.

Shape letters: B batch, L tokens, E inner width, N states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from vimtune.backends import REFERENCE
from vimtune.ops import reference
from vimtune.ops.backend import Gradients, Kernels
from vimtune.ops.dispatch import chosen_backend, find_backend, find_kernels
from vimtune.ops.operation import (
    as_list,
    as_optional,
    check_inputs,
    fake_gradients,
    operation,
    run,
    unit_stride,
    zero_gradients,
)

NUM_INPUTS = 8
"""Number of tensors that `selective_scan` has gradients of; `stateful_scan` has that of the state, too."""


class ScanInputs(NamedTuple):
    """Tensors of a selective scan, in the order of their gradients.

    In kernels they have unit stride in the last dimension and any stride elsewhere. Activations (`u`,
    `delta`, `B`, `C`, `z`) may be fp32, bf16, fp16 or fp64.
    """

    u: Tensor
    """(B, L, E)"""
    delta: Tensor
    """(B, L, E)"""
    A: Tensor
    """(E, N)"""
    B: Tensor
    """(B, L, N)"""
    C: Tensor
    """(B, L, N)"""
    D: Tensor | None = None
    """(E,)"""
    z: Tensor | None = None
    """(B, L, E)"""
    delta_bias: Tensor | None = None
    """(E,)"""
    state: Tensor | None = None
    """(B, E, N), fp32 (fp64 for fp64 activations): the state before the first token. None stands for zeros,
    and says that nobody asks for the last state either."""


class ScanOptions(NamedTuple):
    """The other arguments of a selective scan, see `selective_scan`."""

    delta_softplus: bool
    """Whether time steps are softplus of `delta`, or `delta` itself."""
    reverse: bool
    """Whether the scan runs from the last token to the first."""


class ScanKernels(Kernels[ScanInputs]):
    """Kernels of the selective scan. The state is fp32, for fp64 activations fp64.

    Results may have any strides: the operation makes them contiguous. Inputs are never empty.
    """

    operation = "selective_scan"

    @abstractmethod
    def states_shape(self, batch: int, tokens: int, inner: int, states: int) -> tuple[int, ...]:
        """Shape of the tensor, in the dtype of the state, that `forward` saves for `backward`."""

    @abstractmethod
    def forward(
        self, inputs: ScanInputs, options: ScanOptions, save_states: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the scan.

        Returns:
            The result (B, L, E) in the dtype of `u`, the saved states (empty if not wanted), and the state
            after the last token (B, E, N), in the dtype of the state, if `inputs` have one before the first.
        """

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        states: Tensor,
        inputs: ScanInputs,
        options: ScanOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        """Gradients of the inputs, None where `needs` is False.

        Args:
            grad: gradient of the result (B, L, E), with unit stride in the last dimension.
            grad_last: gradient of the last state (B, E, N), contiguous; None if `inputs` have no state.
            states: what `forward` has saved.
            inputs: those of `forward`.
            options: those of `forward`.
            needs: for each input whether its gradient is wanted.
        """


# torch.library reads these annotations at run time and TorchScript compiles the public function, hence the
# spelled-out Optional. TorchScript drops a branch only if its condition is `not torch.jit.is_scripting()`.


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,  # noqa: UP045
    z: Optional[Tensor] = None,  # noqa: UP045
    delta_bias: Optional[Tensor] = None,  # noqa: UP045
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Selective scan of Mamba; formula and shapes as in `vimtune.ops.reference.selective_scan`.

    `u`, `delta`, `z`: (B, L, E); `A`: (E, N); `B`, `C`: (B, L, N); `D`, `delta_bias`: (E,).
    Returns (B, L, E) in the dtype of `u`. B and L may be 0.

    Raises:
        ValueError: shapes or devices that do not fit together, tensors that are not of floating point
            numbers, or an unknown backend.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only
            `backend="reference"` has.
    """
    if not torch.jit.is_scripting():
        backend = chosen_backend(backend)
        if backend == REFERENCE:
            _check(u, delta, A, B, C, D, z, delta_bias)
            return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
        tensors = u, delta, A, B, C, D, z, delta_bias
        found = run("selective_scan", *tensors, delta_softplus, reverse, backend, torch.is_grad_enabled())
        out: Tensor = found[0]
        return out
    scripted: Tensor = torch.ops.vimtune.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, torch.is_grad_enabled()
    )[0]
    return scripted


def stateful_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,  # noqa: UP045
    z: Optional[Tensor] = None,  # noqa: UP045
    delta_bias: Optional[Tensor] = None,  # noqa: UP045
    delta_softplus: bool = False,
    state: Optional[Tensor] = None,  # noqa: UP045
    backend: str = "auto",
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """A selective scan that begins with a state and returns the last one.

    The formula is that of `vimtune.ops.reference.stateful_scan`. Of a sequence in two parts, the second one
    begun with the last state of the first, the results are those of the whole.

    Args:
        u: (B, L, E), as all other tensors but the state those of `selective_scan`.
        delta: (B, L, E).
        A: (E, N).
        B: (B, L, N).
        C: (B, L, N).
        D: (E,).
        z: (B, L, E).
        delta_bias: (E,).
        delta_softplus: whether time steps are softplus of `delta`, or `delta` itself.
        state: the state before the first token, (B, E, N); zeros if None.
        backend: see `vimtune.ops`.
        reverse: whether the scan runs from the last token to the first.

    Returns:
        The result (B, L, E) in the dtype of `u`, and the state after the token that the scan visits last
        (B, E, N), fp32 (fp64 for fp64 activations).

    Raises:
        ValueError, BackendUnavailable, NotImplementedError: as `selective_scan`.
    """
    if not torch.jit.is_scripting():
        backend = chosen_backend(backend)
        if backend == REFERENCE:
            _check(u, delta, A, B, C, D, z, delta_bias, state)
            return reference.stateful_scan(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reverse
            )
    if state is None:
        state = torch.zeros(u.shape[0], u.shape[-1], A.shape[-1], dtype=_state_dtype(u), device=u.device)
    if not torch.jit.is_scripting():
        tensors = u, delta, A, B, C, D, z, delta_bias, state
        found = run("stateful_scan", *tensors, delta_softplus, reverse, backend, torch.is_grad_enabled())
        return found[0], found[1]
    out, last, _ = torch.ops.vimtune.stateful_scan(
        u, delta, A, B, C, D, z, delta_bias, state, delta_softplus, reverse, backend, torch.is_grad_enabled()
    )
    return out, last


def selective_scan_from(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,  # noqa: UP045
    z: Optional[Tensor] = None,  # noqa: UP045
    delta_bias: Optional[Tensor] = None,  # noqa: UP045
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A selective scan with s_{-1} = `state` (E, N), the same state for all samples.

    The other tensors, the result and the errors are those of `selective_scan`. Kernels that begin with zeros
    do here, too: since the recurrence is linear, what the state adds to their result is added to it.
    """
    if not torch.jit.is_scripting():
        begun = ScanInputs(u, delta, A, B, C, D, z, delta_bias, state)
        if chosen_backend(backend) != REFERENCE and not find_backend(ScanKernels, backend, u.device, begun):
            out = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend)
            added = _state_response(state, delta, A, C, z, delta_bias, delta_softplus, reverse)
            return out + added.to(u.dtype)
    every = state.unsqueeze(0).expand(u.shape[0], -1, -1)
    return stateful_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, every, backend, reverse)[0]


def _state_response(
    state: Tensor,
    delta: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> Tensor:
    """What a state (E, N) before the first token adds to the result of a scan, (B, L, E) in at least fp32.

    It is <exp(T_t A) s_{-1}, C_t> silu(z_t), T_t being the sum of the time steps up to token t.
    """
    dtype = _state_dtype(delta)
    dt = time_steps(delta.to(dtype), delta_bias, delta_softplus)
    elapsed = dt.flip(1).cumsum(1).flip(1) if reverse else dt.cumsum(1)
    A, C, state = A.to(dtype), C.to(dtype), state.to(dtype)
    total = torch.zeros_like(elapsed)
    for n in range(A.shape[1]):  # All states at once would take N times the memory.
        total = total + torch.exp(elapsed * A[:, n]) * state[:, n] * C[..., n, None]
    return total if z is None else total * F.silu(z.to(dtype))


def scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `stateful_scan`, as decoding needs it: in a few operations of PyTorch on any device.

    Args:
        u: (B, E), as `delta` and `z`.
        delta: (B, E).
        A: (E, N).
        B: (B, N).
        C: (B, N).
        D: (E,).
        z: (B, E).
        delta_bias: (E,).
        delta_softplus: whether the time step is softplus of `delta`, or `delta` itself.
        state: the state before the token, (B, E, N).

    Returns:
        The result (B, E) in the dtype of `u`, and the state after the token (B, E, N).
    """
    dtype = state.dtype
    dt, x = time_steps(delta.to(dtype), delta_bias, delta_softplus), u.to(dtype)
    fed = (dt * x).unsqueeze(-1) * B.to(dtype).unsqueeze(1)
    state = torch.exp(dt.unsqueeze(-1) * A.to(dtype)) * state + fed
    y = torch.bmm(state, C.to(dtype).unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def time_steps(delta: Tensor, delta_bias: Tensor | None, softplus: bool) -> Tensor:
    """Time steps, of the shape (..., E) and the dtype of `delta`."""
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def _state_dtype(u: Tensor) -> torch.dtype:
    """The dtype of states for these activations."""
    return torch.promote_types(u.dtype, torch.float32)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None = None,
) -> None:
    """Raise ValueError for tensors that do not fit together."""
    if u.dim() != 3 or A.dim() != 2 or A.shape[1] < 1:
        raise ValueError(f"u must be (B, L, E) and A (E, N); got {tuple(u.shape)} and {tuple(A.shape)}")
    batch, tokens, inner = u.shape
    states = A.shape[1]
    check_inputs(
        u.device,
        u=(u, (batch, tokens, inner)),
        delta=(delta, (batch, tokens, inner)),
        A=(A, (inner, states)),
        B=(B, (batch, tokens, states)),
        C=(C, (batch, tokens, states)),
        D=(D, (inner,)),
        z=(z, (batch, tokens, inner)),
        delta_bias=(delta_bias, (inner,)),
        state=(state, (batch, inner, states)),
    )


def _adjacent(*tensors: Tensor | None) -> ScanInputs:
    """The tensors with unit stride in the last dimension."""
    return ScanInputs(*(None if tensor is None else unit_stride(tensor) for tensor in tensors))  # type: ignore[arg-type]


@operation("selective_scan")
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    z: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    delta_softplus: bool,
    reverse: bool,
    backend: str,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """The result and the saved states."""
    _check(u, delta, A, B, C, D, z, delta_bias)
    inputs = _adjacent(u, delta, A, B, C, D, z, delta_bias)
    _, kernels = find_kernels(ScanKernels, backend, u.device, inputs)
    if u.numel() == 0:
        return _empty_results(kernels, inputs, save_states)
    out, kept, _ = kernels.forward(inputs, ScanOptions(delta_softplus, reverse), save_states)
    return out.contiguous(), kept.contiguous()


@_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, _delta_softplus, _reverse, backend, save_states = arguments
    inputs = ScanInputs(*tensors)
    return _empty_results(find_kernels(ScanKernels, backend, inputs.u.device, inputs)[1], inputs, save_states)


def _empty_results(kernels: ScanKernels, inputs: ScanInputs, save_states: bool) -> tuple[Tensor, Tensor]:
    """Tensors like those that the kernels return."""
    u = inputs.u
    batch, tokens, inner = u.shape
    shape = kernels.states_shape(batch, tokens, inner, inputs.A.shape[1]) if save_states else (0,)
    return u.new_empty(u.shape), u.new_empty(shape, dtype=_state_dtype(u))


@operation("selective_scan_backward")
def _scan_backward(
    grad: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    z: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    delta_softplus: bool,
    reverse: bool,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the tensors from `u` on."""
    inputs = _adjacent(u, delta, A, B, C, D, z, delta_bias)
    _, kernels = find_kernels(ScanKernels, backend, u.device, inputs)
    if u.numel() == 0:
        return zero_gradients(inputs[:NUM_INPUTS], needs, grad)
    options = ScanOptions(delta_softplus, reverse)
    found = kernels.backward(unit_stride(grad), None, states, inputs, options, [*needs, False])
    return as_list(found[:NUM_INPUTS], grad)


@_scan_backward.register_fake
def _(grad: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, _delta_softplus, _reverse, _backend, needs = arguments
    return fake_gradients(tensors, needs, grad)


def _register_autograd(op: CustomOpDef, backward: str, num_tensors: int) -> None:
    """Let the operation `backward` differentiate a scan of so many tensors, whose last result are the states
    that it saves. Behind the tensors a scan takes its options, the backend, and whether to save states."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, (*options, backend, save_states) = inputs[:num_tensors], inputs[num_tensors:]
        if not save_states:
            raise RuntimeError("a scan was called without saved states but needs a gradient")
        ctx.save_for_backward(output[-1], *tensors)
        ctx.mark_non_differentiable(output[-1])
        # The backend by its own name: the backward pass may run in another thread, or after another choice,
        # and has to read what the forward pass has saved.
        name, _ = find_kernels(ScanKernels, backend, tensors[0].device, ScanInputs(*tensors))
        ctx.options = (*options, name)

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:num_tensors])
        gradients = run(backward, *grads[:-1], *ctx.saved_tensors, *ctx.options, needs)
        return *as_optional(gradients, needs), *[None] * (len(ctx.options) + 1)

    op.register_autograd(differentiate, setup_context=setup)


_register_autograd(_scan, "selective_scan_backward", NUM_INPUTS)


@operation("stateful_scan")
def _stateful_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    z: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    state: Tensor,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the last state, and the saved states."""
    _check(u, delta, A, B, C, D, z, delta_bias, state)
    inputs = _with_state(u, delta, A, B, C, D, z, delta_bias, state)
    _, kernels = find_kernels(ScanKernels, backend, u.device, inputs)
    if u.numel() == 0:
        out, kept = _empty_results(kernels, inputs, save_states)
        return out, state.to(_state_dtype(u), copy=True), kept
    out, kept, last = kernels.forward(inputs, ScanOptions(delta_softplus, reverse), save_states)
    assert last is not None, "kernels return the last state to those who give the first one"
    return out.contiguous(), last.contiguous(), kept.contiguous()


def _with_state(*tensors: Tensor | None) -> ScanInputs:
    """The tensors as kernels take them, the last one being the state."""
    inputs = _adjacent(*tensors)
    assert inputs.state is not None
    return inputs._replace(state=inputs.state.to(_state_dtype(inputs.u)).contiguous())


@_stateful_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _delta_softplus, _reverse, backend, save_states = arguments
    inputs = ScanInputs(*tensors)
    kernels = find_kernels(ScanKernels, backend, inputs.u.device, inputs)[1]
    out, kept = _empty_results(kernels, inputs, save_states)
    return out, inputs.A.new_empty(tensors[-1].shape, dtype=_state_dtype(inputs.u)), kept


@operation("stateful_scan_backward")
def _stateful_scan_backward(
    grad: Tensor,
    grad_last: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    z: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    state: Tensor,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the tensors from `u` on."""
    inputs = _with_state(u, delta, A, B, C, D, z, delta_bias, state)
    _, kernels = find_kernels(ScanKernels, backend, u.device, inputs)
    if u.numel() == 0:
        *others, _ = zero_gradients(inputs, needs, grad)
        return [*others, grad_last.to(state.dtype, copy=True) if needs[-1] else grad.new_empty(0)]
    options = ScanOptions(delta_softplus, reverse)
    last = grad_last.to(_state_dtype(u)).contiguous()
    found = list(kernels.backward(unit_stride(grad), last, states, inputs, options, needs))
    if found[-1] is not None:
        found[-1] = found[-1].to(state.dtype)
    return as_list(found, grad)


@_stateful_scan_backward.register_fake
def _(grad: Tensor, grad_last: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, _delta_softplus, _reverse, _backend, needs = arguments
    return fake_gradients(tensors, needs, grad)


_register_autograd(_stateful_scan, "stateful_scan_backward", NUM_INPUTS + 1)
