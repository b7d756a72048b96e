"""Backend `cpu`: compiled, vectorised, multi-threaded fp32 kernels for any CPU with a C++ compiler.

The library is built at first use (`build.py`) and called through ctypes, which releases the GIL.
Half-precision activations are converted to fp32 and back. fp64 takes the pure PyTorch path: it
serves gradient checks, where speed does not matter.

Shape letters: B batch, L tokens, E inner width, N states, K filter width.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vimtune.ops.cpu.build import BuildError, load_library
from vimtune.ops.cpu.library import ConvInputs, Kernels, ScanInputs, empty
from vimtune.ops.cpu.selftest import check_kernels
from vimtune.ops.dispatch import Backend, Gradients
from vimtune.ops.eager import EagerBackend

logger = logging.getLogger(__name__)


class CpuBackend(Backend):
    name = "cpu"
    summary = "compiled for this CPU, multi-threaded"

    def __init__(self) -> None:
        self._eager = EagerBackend()
        self._lock = threading.Lock()
        self._loaded: Kernels | str | None = None

    def refusals(self, device):
        if device.type != "cpu":
            return [f"it runs on the CPU, not on {device.type}"]
        loaded = self._load()
        return [loaded] if isinstance(loaded, str) else []

    def states_shape(self, batch, tokens, inner, states):
        return (-(-tokens // self._kernels().chunk), batch, states, inner)

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, options, save_states):
        batch, tokens, inner = u.shape
        shape = self.states_shape(batch, tokens, inner, A.shape[1]) if save_states else (0,)
        if u.dtype == torch.float64:
            out, _ = self._eager.scan_forward(u, delta, A, B, C, D, z, delta_bias, options, False)
            return out, u.new_zeros(shape)
        saved = empty(shape)
        inputs = ScanInputs(*map(_single, (u, delta, A, B, C, D, z, delta_bias)))
        out = self._kernels().scan_forward(inputs, options, saved if save_states else None)
        return out.to(u.dtype), saved

    def scan_backward(self, grad, states, u, delta, A, B, C, D, z, delta_bias, options, needs):
        given = (u, delta, A, B, C, D, z, delta_bias)
        if u.dtype == torch.float64:
            # The two backends save states of different layout; fp64 computes its own again.
            _, states = self._eager.scan_forward(*given, options, True)
            return self._eager.scan_backward(grad, states, *given, options, needs)
        inputs = ScanInputs(*map(_single, given))
        return _back(self._kernels().scan_backward(grad.float(), states, inputs, options, needs), given)

    def conv_forward(self, x, weight, bias, silu, reverse):
        if x.dtype == torch.float64:
            return self._eager.conv_forward(x, weight, bias, silu, reverse)
        inputs = ConvInputs(*map(_single, (x, weight, bias)))
        return self._kernels().conv_forward(inputs, silu, reverse).to(x.dtype)

    def conv_backward(self, grad, x, weight, bias, silu, reverse, needs):
        if x.dtype == torch.float64:
            return self._eager.conv_backward(grad, x, weight, bias, silu, reverse, needs)
        given = (x, weight, bias)
        inputs = ConvInputs(*map(_single, given))
        return _back(self._kernels().conv_backward(grad.float(), inputs, silu, reverse, needs), given)

    def _kernels(self) -> Kernels:
        loaded = self._load()
        if isinstance(loaded, str):
            raise BuildError(loaded)
        return loaded

    def _load(self) -> Kernels | str:
        """The kernels, or why there are none; tried once per process."""
        with self._lock:
            if self._loaded is None:
                try:
                    kernels = Kernels(load_library())
                    check_kernels(kernels)
                    self._loaded = kernels
                except BuildError as error:
                    self._loaded = str(error)
                    logger.warning(
                        "No compiled CPU kernels, scans on the CPU take the several times slower pure "
                        "PyTorch path: %s. A C++17 compiler (for example `apt install g++`, or the "
                        "environment variable CXX) makes them available at the next start.",
                        error,
                    )
            return self._loaded


def _single(tensor: Any) -> Any:
    """A tensor in fp32; None stays None."""
    return None if tensor is None else tensor.float()


def _back(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Gradients:
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, inputs, strict=True)
    )
