"""Backend `cpu`: compiled, vectorised, multi-threaded fp32 kernels for any CPU with a C++ compiler.

The library is built at first use (`build.py`) and called through ctypes, which releases the GIL.
Half-precision activations are converted to fp32 and back. For fp64, which serves gradient checks, where speed
does not matter, the kernels of plain PyTorch are offered after the compiled ones.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vimtune.ops.backend import Backend, Gradients
from vimtune.ops.convolution import ConvInputs, ConvKernels, ConvOptions
from vimtune.ops.cpu.build import BuildError, find_compiler, load_library
from vimtune.ops.cpu.library import Library, empty
from vimtune.ops.cpu.selftest import check_library
from vimtune.ops.eager.convolution import EagerConvolution
from vimtune.ops.eager.scan import EagerScan
from vimtune.ops.mixer import DirectionStart, DirectionWeights, offset_refusals, scan_parameters
from vimtune.ops.mixer_start import StartInputs, StartKernels
from vimtune.ops.scan import ScanInputs, ScanKernels, ScanOptions

logger = logging.getLogger(__name__)


class CpuScan(ScanKernels):
    """The selective scan of scan.cpp."""

    def __init__(self, library: Callable[[], Library]) -> None:
        """Kernels of what `library` returns, which is called when they run."""
        self._library = library

    def refusals(self, inputs: ScanInputs) -> list[str]:
        return _dtype_refusals(inputs.u)

    def states_shape(self, batch: int, tokens: int, inner: int, states: int) -> tuple[int, ...]:
        return (-(-tokens // self._library().chunk), batch, states, inner)

    def forward(
        self, inputs: ScanInputs, options: ScanOptions, save_states: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, tokens, inner = inputs.u.shape
        saved = empty(self.states_shape(batch, tokens, inner, inputs.A.shape[1]) if save_states else (0,))
        single = ScanInputs(*map(_single, inputs))  # type: ignore[arg-type]
        out, last = self._library().scan_forward(single, options, saved if save_states else None)
        return out.to(inputs.u.dtype), saved, last

    def backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        states: Tensor,
        inputs: ScanInputs,
        options: ScanOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        single = ScanInputs(*map(_single, inputs))  # type: ignore[arg-type]
        found = self._library().scan_backward(grad.float(), grad_last, states, single, options, needs)
        return _back(found, inputs)


class CpuConvolution(ConvKernels):
    """The convolution of conv.cpp."""

    def __init__(self, library: Callable[[], Library]) -> None:
        """Kernels of what `library` returns, which is called when they run."""
        self._library = library

    def refusals(self, inputs: ConvInputs) -> list[str]:
        return _dtype_refusals(inputs.x)

    def forward(self, inputs: ConvInputs, options: ConvOptions) -> Tensor:
        single = ConvInputs(*map(_single, inputs))  # type: ignore[arg-type]
        return self._library().conv_forward(single, options).to(inputs.x.dtype)

    def backward(
        self, grad: Tensor, inputs: ConvInputs, options: ConvOptions, needs: Sequence[bool]
    ) -> Gradients:
        single = ConvInputs(*map(_single, inputs))  # type: ignore[arg-type]
        return _back(self._library().conv_backward(grad.float(), single, options, needs), inputs)


class CpuStart(StartKernels):
    """The inside of a mixer that begins with a state, of the kernels of scan.cpp and conv.cpp."""

    def __init__(self, library: Callable[[], Library]) -> None:
        """Kernels of what `library` returns, which is called when they run."""
        self._library = library

    def refusals(self, inputs: StartInputs) -> list[str]:
        return [*offset_refusals(*inputs.directions), *_dtype_refusals(inputs.xz)]

    def forward(self, inputs: StartInputs) -> Tensor:
        directions = zip(inputs.directions, inputs.starts, (False, True), strict=True)
        ahead, back = (self._one_direction(inputs.xz, *own) for own in directions)
        return (ahead + back) / 2

    def _one_direction(
        self, xz: Tensor, weights: DirectionWeights, start: DirectionStart, reverse: bool
    ) -> Tensor:
        """The gated scan (B, L, E) of one direction in the dtype of `xz`."""
        x, z = xz.chunk(2, dim=-1)
        filtering = ConvInputs(*map(_single, (x, weights.conv_weight, weights.conv_bias)))  # type: ignore[arg-type]
        u = (
            self._library()
            .conv_forward(filtering, ConvOptions(True, reverse), start.tail.float())
            .to(xz.dtype)
        )
        scanning = u, *scan_parameters(u, weights), weights.D, z, weights.dt_bias
        inputs = ScanInputs(*map(_single, scanning))  # type: ignore[arg-type]
        return self._library().scan_from(inputs, ScanOptions(True, reverse), start.state.float()).to(xz.dtype)


class CpuBackend(Backend):
    """Kernels compiled for this CPU."""

    name = "cpu"
    summary = "compiled for this CPU, multi-threaded"

    def __init__(self) -> None:
        """A backend that has not built its library yet."""
        self._lock = threading.Lock()
        self._loaded: Library | str | None = None
        self.scan = CpuScan(self.library)
        self.convolution = CpuConvolution(self.library)
        self.start = CpuStart(self.library)
        self.kernels = (self.scan, self.convolution, self.start, EagerScan(), EagerConvolution())

    def refusals(self, device: torch.device) -> list[str]:
        if device.type != "cpu":
            return [f"it runs on the CPU, not on {device.type}"]
        loaded = self._load()
        return [loaded] if isinstance(loaded, str) else []

    def advice(self) -> list[str]:
        if torch.cuda.is_available():
            return []
        try:
            find_compiler()
        except BuildError:
            missing = f"CXX={os.environ['CXX']} is not there" if os.environ.get("CXX") else "none was found"
            return [f"the fast CPU kernels need a C++ compiler, {missing}:\n    {_command_for_compiler()}"]
        return []

    def library(self) -> Library:
        """The compiled kernels.

        Raises:
            BuildError: there are none.
        """
        loaded = self._load()
        if isinstance(loaded, str):
            raise BuildError(loaded)
        return loaded

    def _load(self) -> Library | str:
        """The kernels, or why there are none; tried once per process."""
        with self._lock:
            if self._loaded is None:
                try:
                    library = Library(load_library())
                    check_library(library)
                    self._loaded = library
                except BuildError as error:
                    self._loaded = str(error)
                    logger.warning(
                        "No compiled CPU kernels, scans on the CPU take the several times slower pure "
                        "PyTorch path: %s. A C++17 compiler (for example `apt install g++`, or the "
                        "environment variable CXX) makes them available at the next start.",
                        error,
                    )
            return self._loaded


def _command_for_compiler() -> str:
    """The command that makes a C++ compiler available on a system like this one."""
    if os.environ.get("CXX"):
        return "unset CXX"
    if sys.platform == "win32":
        return "wsl --install    (they are built under Linux and macOS)"
    if sys.platform == "darwin":
        return "xcode-select --install"
    for tool, line in {"apt-get": "apt-get install g++", "dnf": "dnf install gcc-c++"}.items():
        if shutil.which(tool):
            return f"sudo {line}"
    return "conda install -c conda-forge gxx"


def _dtype_refusals(activations: Tensor) -> list[str]:
    """The compiled kernels compute in fp32."""
    return ["fp64 is more than the compiled kernels have"] if activations.dtype == torch.float64 else []


def _single(tensor: Tensor | None) -> Tensor | None:
    """A tensor in fp32; None stays None."""
    return None if tensor is None else tensor.float()


def _back(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Gradients:
    """Gradients in the dtypes of the tensors that they belong to."""
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, inputs, strict=True)
    )
