"""The compiled kernels as Python functions on fp32 tensors.

Shape letters: B batch, L tokens, E inner width, N states, K filter width.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimtune.ops.convolution import ConvInputs, ConvOptions
from vimtune.ops.cpu.build import BuildError
from vimtune.ops.scan import ScanInputs, ScanOptions


def _structure(name: str, pointers: str, integers: str) -> type[ctypes.Structure]:
    """A C structure of pointers followed by int64 numbers; both are given by the names of the fields."""
    fields: list[tuple[str, Any]] = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in integers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


ScanArguments = _structure(
    "ScanArguments",
    "u delta A B C D z bias grad first grad_last out saved last grad_first "
    "grad_u grad_delta grad_A grad_B grad_C grad_D grad_z grad_bias launch",
    "batch tokens inner states u_batch u_token delta_batch delta_token A_row B_batch B_token "
    "C_batch C_token z_batch z_token grad_batch grad_token first_batch num_threads softplus reverse",
)
"""Mirrors the struct of the same name in scan.cpp."""
ConvArguments = _structure(
    "ConvArguments",
    "x weight bias grad tail out grad_x grad_weight grad_bias launch",
    "batch tokens inner width x_batch x_token grad_batch grad_token num_threads silu reverse",
)
"""Mirrors the struct of the same name in conv.cpp."""


SCAN_GRADIENTS = (
    *("grad_u", "grad_delta", "grad_A", "grad_B", "grad_C", "grad_D", "grad_z", "grad_bias"),
    "grad_first",
)
"""Names of the gradients in the structure of a scan, in the order of `ScanInputs`."""


class Library:
    """Calls into one loaded library. All tensors are fp32 with unit stride in the last dimension."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Find the functions of a compiled library.

        Raises:
            BuildError: it lacks one.
        """
        try:
            self._functions = {
                "scan_forward": library.vimtune_scan_forward,
                "scan_backward": library.vimtune_scan_backward,
                "conv_forward": library.vimtune_conv_forward,
                "conv_backward": library.vimtune_conv_backward,
            }
            self.chunk = int(library.vimtune_scan_chunk())  # So many tokens lie between saved states.
        except AttributeError as error:
            raise BuildError(f"the compiled library lacks a function: {error}") from error
        self._launcher = _team_launcher()
        self._process = os.getpid()

    def scan_forward(
        self, inputs: ScanInputs, options: ScanOptions, saved: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return `out`, (B, L, E), and the last state if there is a first one; fill `saved`,
        (chunks, B, N, E), when given."""
        out, first = empty(inputs.u.shape), _states_first(inputs.state)
        last = None if first is None else torch.empty_like(first)
        arguments = _scan_arguments(inputs, options)
        arguments.first_batch = 0 if first is None else first.stride(0)
        self._call("scan_forward", arguments, out=out, saved=saved, first=first, last=last)
        return out, _states_last(last)

    def scan_from(self, inputs: ScanInputs, options: ScanOptions, state: Tensor) -> Tensor:
        """Return `out`, (B, L, E), of a scan that begins with the same state (E, N) for all samples."""
        out, first = empty(inputs.u.shape), state.t().contiguous()
        arguments = _scan_arguments(inputs, options)
        self._call("scan_forward", arguments, out=out, first=first)
        return out

    def scan_backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        saved: Tensor,
        inputs: ScanInputs,
        options: ScanOptions,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients in the order of `inputs`, None where `needs` is False."""
        arguments = _scan_arguments(inputs, options)
        arguments.grad_batch, arguments.grad_token = grad.stride()[:2]
        by_columns = inputs._replace(A=inputs.A.t(), state=_states_first(inputs.state))
        gradients = _empty_where_needed(by_columns, needs)
        outputs = dict(zip(SCAN_GRADIENTS, gradients, strict=True))
        before = {"grad": grad, "grad_last": _states_first(grad_last), "saved": saved}
        self._call("scan_backward", arguments, **before, **outputs)
        if gradients[2] is not None:
            gradients[2] = gradients[2].t().contiguous()
        gradients[-1] = _states_last(gradients[-1])
        return gradients

    def conv_forward(self, inputs: ConvInputs, options: ConvOptions, tail: Tensor | None = None) -> Tensor:
        """Return the filtered `x`, (B, L, E), which begins behind the inputs `tail` (E, K - 1) or zeros."""
        out, before = empty(inputs.x.shape), None if tail is None else tail.t().contiguous()
        inputs = _columns_first(inputs)
        self._call("conv_forward", _conv_arguments(inputs, options), out=out, tail=before)
        return out

    def conv_backward(
        self, grad: Tensor, inputs: ConvInputs, options: ConvOptions, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients in the order of `inputs`, None where `needs` is False."""
        inputs = _columns_first(inputs)
        arguments = _conv_arguments(inputs, options)
        arguments.grad_batch, arguments.grad_token = grad.stride()[:2]
        gradients = _empty_where_needed(inputs, needs)
        outputs = dict(zip(("grad_x", "grad_weight", "grad_bias"), gradients, strict=True))
        self._call("conv_backward", arguments, grad=grad, **outputs)
        if gradients[1] is not None:
            gradients[1] = gradients[1].t().contiguous()
        return gradients

    def _call(self, function: str, arguments: Any, **tensors: Tensor | None) -> None:
        """Run a kernel. The caller holds every tensor of `arguments` until this returns."""
        for name, tensor in tensors.items():
            setattr(arguments, name, _address(tensor))
        arguments.num_threads = torch.get_num_threads()
        # The team's threads do not survive a fork: a child brings its own.
        arguments.launch = self._launcher if os.getpid() == self._process else None
        if self._functions[function](ctypes.byref(arguments)) != 0:
            raise MemoryError(f"out of memory in the CPU kernel {function}")


def empty(shape: Sequence[int]) -> Tensor:
    """What a kernel writes to, whatever default dtype and device are set."""
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu")


def _address(tensor: Tensor | None) -> int | None:
    """What the library knows a tensor by."""
    return None if tensor is None else tensor.data_ptr()


def _empty_where_needed(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradients that are wanted."""
    return [
        empty(tensor.shape) if needed and tensor is not None else None
        for tensor, needed in zip(inputs, needs, strict=True)
    ]


def _states_first(state: Tensor | None) -> Tensor | None:
    """A state (B, E, N) as the kernels have it: (B, N, E)."""
    return None if state is None else state.transpose(1, 2).contiguous()


def _states_last(state: Tensor | None) -> Tensor | None:
    """A state (B, N, E) of the kernels as (B, E, N)."""
    return None if state is None else state.transpose(1, 2).contiguous()


def _columns_first(inputs: ConvInputs) -> ConvInputs:
    """The kernels read the filter tap by tap: (K, E)."""
    return inputs._replace(weight=inputs.weight.t().contiguous())


def _scan_arguments(inputs: ScanInputs, options: ScanOptions) -> Any:
    """The structure of scan.cpp without gradients and results."""
    arguments: Any = ScanArguments()
    arguments.batch, arguments.tokens, arguments.inner = inputs.u.shape
    arguments.states = inputs.A.shape[1]
    for name in ("u", "delta", "B", "C", "z"):
        tensor = getattr(inputs, name)
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
            setattr(arguments, f"{name}_batch", tensor.stride(0))
            setattr(arguments, f"{name}_token", tensor.stride(1))
    arguments.A, arguments.A_row = inputs.A.data_ptr(), inputs.A.stride(0)
    arguments.D, arguments.bias = _address(inputs.D), _address(inputs.delta_bias)
    arguments.softplus, arguments.reverse = options.delta_softplus, options.reverse
    return arguments


def _conv_arguments(inputs: ConvInputs, options: ConvOptions) -> Any:
    """The structure of conv.cpp without gradients and results; the filter of `inputs` is (K, E)."""
    arguments: Any = ConvArguments()
    x = inputs.x
    arguments.batch, arguments.tokens, arguments.inner = x.shape
    arguments.width = inputs.weight.shape[0]
    arguments.x, arguments.x_batch, arguments.x_token = x.data_ptr(), x.stride(0), x.stride(1)
    arguments.weight, arguments.bias = inputs.weight.data_ptr(), _address(inputs.bias)
    arguments.silu, arguments.reverse = options
    return arguments


def _team_launcher() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch uses, or None where there is none.

    Looked up through torch's own library, so that it is the runtime torch runs on and no second one.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(entry, ctypes.c_void_p).value
