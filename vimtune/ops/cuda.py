"""Backend `cuda`: the compiled kernels of mamba-ssm and causal-conv1d, where installed and right.

Those kernels want (B, E, L), and ours is channel-last. The scan therefore transposes on the way in
and out (the convolution takes channel-last views as they are), and the reverse direction flips the
tokens. The backend is offered after a numeric self-test on the device, since the packages are often built for
another torch or card. The scan's extension is probed itself: importing the package `mamba_ssm` pulls in
language-model code that may be missing.

Shape letters: B batch, L tokens, E inner width, N states, K filter width.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vimtune.machine import installed_version
from vimtune.ops import reference
from vimtune.ops.backend import Backend, Gradients
from vimtune.ops.convolution import ConvInputs, ConvKernels, ConvOptions
from vimtune.ops.operation import constant_for_compiler, wanted
from vimtune.ops.scan import NUM_INPUTS, ScanInputs, ScanKernels, ScanOptions
from vimtune.ops.ssd import SsdInputs, SsdKernels, SsdOptions

MAX_STATES = 256
"""Most states that the scan of mamba-ssm has."""
SSD_MODULE = "mamba_ssm.ops.triton.ssd_combined"
"""Module of mamba-ssm with the scan of Mamba-2."""
SSD_CHUNK = 256
"""Tokens of a chunk of that scan, as in the published models."""
TOLERANCE = 1e-3
"""Largest error in the self-test relative to the largest value, fp32; the kernels use fast exponentials."""


class CudaScan(ScanKernels):
    """The selective scan of mamba-ssm. It keeps no states: the backward pass runs the forward again."""

    def refusals(self, inputs: ScanInputs) -> list[str]:
        reasons = _dtype_refusals(inputs.u)
        if inputs.A.shape[1] > MAX_STATES:
            reasons.append(f"states are {inputs.A.shape[1]}, the kernels have up to {MAX_STATES}")
        if inputs.state is not None:
            reasons.append("the kernels do not begin with a state")
        return reasons

    def states_shape(self, batch: int, tokens: int, inner: int, states: int) -> tuple[int, ...]:
        return (0,)

    def forward(
        self, inputs: ScanInputs, options: ScanOptions, save_states: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, _ = self._scan(inputs, options)
        return out, torch.empty(0, dtype=torch.float32, device=out.device), None

    def _scan(self, inputs: ScanInputs, options: ScanOptions) -> tuple[Tensor, tuple[Any, ...]]:
        """Result (B, L, E) and what the backward kernel wants to see again."""
        u, delta, A, B, C, D, z, delta_bias, _ = inputs
        columns: list[Any] = [None if x is None else _to_columns(x, options.reverse) for x in (u, delta, z)]
        low = u.dtype
        small = [_to_columns(x.to(low), options.reverse)[:, None] for x in (B, C)]
        vectors: list[Any] = [None if x is None else x.float().contiguous() for x in (A, D, delta_bias)]
        extension = importlib.import_module("selective_scan_cuda")
        out, states, *gated = extension.fwd(
            columns[0], columns[1].to(low), vectors[0], *small, vectors[1],
            None if z is None else columns[2].to(low), vectors[2], options.delta_softplus,
        )  # fmt: skip
        result = gated[0] if z is not None else out
        return _from_columns(result, options.reverse), (columns, small, vectors, states, out)

    def backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        states: Tensor,
        inputs: ScanInputs,
        options: ScanOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        _, (columns, small, vectors, chunk_states, out) = self._scan(inputs, options)
        extension = importlib.import_module("selective_scan_cuda")
        low = inputs.u.dtype
        gated = inputs.z is not None
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, *rest = extension.bwd(
            columns[0], columns[1].to(low), vectors[0], *small, vectors[1],
            columns[2].to(low) if gated else None, vectors[2],
            _to_columns(grad.to(low), options.reverse), chunk_states, out if gated else None, None,
            options.delta_softplus, False,
        )  # fmt: skip
        found = [
            _from_columns(grad_u, options.reverse),
            _from_columns(grad_delta, options.reverse),
            grad_A,
            _from_columns(grad_B.squeeze(1), options.reverse),
            _from_columns(grad_C.squeeze(1), options.reverse),
            grad_D,
            _from_columns(rest[0], options.reverse) if rest else None,
            grad_bias,
            None,
        ]
        return wanted(found, inputs, needs)


class CudaConvolution(ConvKernels):
    """The convolution of causal-conv1d."""

    def refusals(self, inputs: ConvInputs) -> list[str]:
        return _dtype_refusals(inputs.x)

    def forward(self, inputs: ConvInputs, options: ConvOptions) -> Tensor:
        x, weight, bias = inputs
        functions = importlib.import_module("causal_conv1d.cpp_functions")
        filters, bias = _half_like(x, weight), None if bias is None else _half_like(x, bias)
        out = functions.causal_conv1d_fwd_function(
            _conv_columns(x, options.reverse), filters, bias, None, None, None, options.silu
        )
        return _from_columns(out, options.reverse)

    def backward(
        self, grad: Tensor, inputs: ConvInputs, options: ConvOptions, needs: Sequence[bool]
    ) -> Gradients:
        x, weight, bias = inputs
        functions = importlib.import_module("causal_conv1d.cpp_functions")
        filters, low_bias = _half_like(x, weight), None if bias is None else _half_like(x, bias)
        grad_x, grad_weight, grad_bias, _ = functions.causal_conv1d_bwd_function(
            _conv_columns(x, options.reverse), filters, low_bias,
            _conv_columns(grad.to(x.dtype), options.reverse), None, None, None, None, False, options.silu,
        )  # fmt: skip
        return wanted((_from_columns(grad_x, options.reverse), grad_weight, grad_bias), inputs, needs)


class CudaSsd(SsdKernels):
    """The scan of Mamba-2 of mamba-ssm, written in Triton. Its backward pass begins with the inputs."""

    def refusals(self, inputs: SsdInputs) -> list[str]:
        return _dtype_refusals(inputs.x) or _precision_refusals(inputs.x) or _ssd_errors()

    def forward(self, inputs: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        x, *others = _ssd_arguments(inputs)
        combined = importlib.import_module(SSD_MODULE)
        results = combined._mamba_chunk_scan_combined_fwd(
            x, *others, SSD_CHUNK, **_ssd_options(inputs, options)
        )
        return results[0], results[5].float(), ()  # between them is what backward computes again

    def backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        kept: Sequence[Tensor],
        inputs: SsdInputs,
        options: SsdOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        x, *others = _ssd_arguments(inputs)
        combined = importlib.import_module(SSD_MODULE)
        # The kernels read the result of the forward pass only where there is a gate; x has its shape.
        *found, grad_D, _, grad_bias, grad_state = combined._mamba_chunk_scan_combined_bwd(
            grad.to(x.dtype), x, *others, x, SSD_CHUNK,
            dfinal_states=grad_last, **_ssd_options(inputs, options),
        )  # fmt: skip
        return wanted([*found, grad_D, grad_bias, grad_state], inputs, needs)


def _ssd_arguments(inputs: SsdInputs) -> list[Tensor]:
    """x, dt, A, B and C as mamba-ssm wants them."""
    low = inputs.x.dtype
    return [inputs.x, inputs.dt, inputs.A.float(), inputs.B.to(low), inputs.C.to(low)]


def _ssd_options(inputs: SsdInputs, options: SsdOptions) -> dict[str, Any]:
    """What mamba-ssm takes by name in both passes."""
    _, _, _, _, _, D, dt_bias, state = inputs
    return {
        "D": None if D is None else D.float(),
        "dt_bias": None if dt_bias is None else dt_bias.float(),
        "initial_states": None if state is None else state.to(inputs.x.dtype),
        **options._asdict(),
    }


class CudaBackend(Backend):
    """Compiled kernels of other projects, where they are installed."""

    name = "cuda"
    summary = "mamba-ssm and causal-conv1d"
    packages = ("mamba-ssm", "causal-conv1d")
    kernels = (CudaScan(), CudaConvolution(), CudaSsd())

    def refusals(self, device: torch.device) -> list[str]:
        reasons = _import_errors()
        if device.type != "cuda":
            reasons.append(f"device is {device.type}, the kernels need cuda")
        elif not reasons:
            # A thread of its own knows nothing of the operation within which somebody may ask, where autograd
            # is off.
            with ThreadPoolExecutor(1) as pool:
                reasons.extend(pool.submit(_self_test, device.index or 0).result())
        return reasons

    def advice(self) -> list[str]:
        if not torch.cuda.is_available() or all(map(installed_version, self.packages)):
            return []
        needs = "" if shutil.which("nvcc") else " (compiles for minutes and needs nvcc, which is not there)"
        return [
            f"optional, the kernels of mamba-ssm as one more backend{needs}:\n"
            '    pip install --no-build-isolation "vimtune[cuda]"'
        ]


def _dtype_refusals(activations: Tensor) -> list[str]:
    """The kernels have fp32, bf16 and fp16."""
    return ["fp64 is more than the kernels have"] if activations.dtype == torch.float64 else []


def _precision_refusals(activations: Tensor) -> list[str]:
    """Triton multiplies matrices of fp32 in TF32, where torch does so only if it is told."""
    if activations.dtype == torch.float32 and not _tf32_is_accepted():
        return ["fp32 would be rounded to TF32: torch.set_float32_matmul_precision('high') accepts that"]
    return []


@constant_for_compiler
def _tf32_is_accepted() -> bool:
    """Whether products of fp32 may be rounded to TF32."""
    return torch.get_float32_matmul_precision() != "highest"


def _half_like(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution wants filter and activations in one dtype."""
    return weight.to(x.dtype).contiguous()


def _conv_columns(x: Tensor, reverse: bool) -> Tensor:
    """(B, E, L) in scan order: a view of channel-last rows where they are aligned to 16 bytes."""
    rows = x.flip(1) if reverse else x
    columns = rows.transpose(1, 2)
    return columns if x.shape[2] % 8 == 0 and rows.stride(1) % 8 == 0 else columns.contiguous()


def _to_columns(x: Tensor, reverse: bool) -> Tensor:
    """(B, L, E) to contiguous (B, E, L), in scan order."""
    return (x.flip(1) if reverse else x).transpose(1, 2).contiguous()


def _from_columns(x: Tensor, reverse: bool) -> Tensor:
    """(B, E, L) in scan order to (B, L, E), strided."""
    rows = x.transpose(1, 2)
    return rows.flip(1) if reverse else rows


def _import_errors() -> list[str]:
    """Why the packages cannot be used; empty if they can."""
    reasons = []
    for module, package in (("selective_scan_cuda", "mamba-ssm"), ("causal_conv1d", "causal-conv1d")):
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{package} is not usable: {type(error).__name__}: {error}")
    return reasons


@cache
def _ssd_import_errors() -> list[str]:
    """Why mamba-ssm's scan of Mamba-2 cannot be used; empty if it can."""
    try:
        combined = importlib.import_module(SSD_MODULE)
        _ = combined._mamba_chunk_scan_combined_fwd, combined._mamba_chunk_scan_combined_bwd
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return [f"mamba-ssm's scan of Mamba-2 is not usable: {type(error).__name__}: {error}"]
    return []


@constant_for_compiler
def _ssd_errors() -> list[str]:
    """`_ssd_import_errors`, which the compiler does not look into."""
    return _ssd_import_errors()


@cache
def _self_test(index: int) -> list[str]:
    """Compare both kernels with the reference, forward and backward; reasons against them if they differ."""
    device = torch.device("cuda", index)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    batch, tokens, inner, states = 2, 21, 16, 16
    scan = ScanInputs(
        normal(batch, tokens, inner),
        normal(batch, tokens, inner),
        -torch.rand(inner, states, generator=generator).to(device) - 0.1,
        normal(batch, tokens, states),
        normal(batch, tokens, states),
        normal(inner),
        normal(batch, tokens, inner),
        normal(inner),
    )
    conv = ConvInputs(normal(batch, tokens, inner), normal(inner, 4), normal(inner))
    grad = normal(batch, tokens, inner)
    scanning, filtering = ScanOptions(delta_softplus=True, reverse=True), ConvOptions(silu=True, reverse=True)
    scan_kernels, conv_kernels = CudaScan(), CudaConvolution()
    try:
        out, kept, _ = scan_kernels.forward(scan, scanning, True)
        *gradients, _ = scan_kernels.backward(grad, None, kept, scan, scanning, [True] * len(scan))
        found = [out, *gradients]
        expected = _expected(reference.selective_scan, (*scan[:NUM_INPUTS], *scanning), grad)
        found.append(conv_kernels.forward(conv, filtering))
        found.extend(conv_kernels.backward(grad, conv, filtering, [True] * len(conv)))
        expected += _expected(reference.causal_conv1d, (*conv, *filtering), grad)
    except (RuntimeError, TypeError, AttributeError) as error:
        # It may have another version's signature, or not run on this card.
        return [f"self-test failed: {str(error).splitlines()[0]}"]
    pairs: Iterable[tuple[Any, Tensor]] = zip(found, expected, strict=True)
    worst = max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return (
        [] if worst <= TOLERANCE else [f"self-test failed: relative error {worst:.1e} against the reference"]
    )


def _expected(function: Callable[..., Tensor], arguments: Sequence[Any], grad: Tensor) -> list[Tensor]:
    """Result and gradients of a reference function of these tensors and options."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
        out = function(*leaves)
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]
