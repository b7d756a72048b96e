"""Backend `triton`: kernels on NVIDIA GPUs, or in Triton's interpreter, for all operations of a mixer.

It can be imported without Triton: the modules with the kernels are imported when they are first used.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from vimtune.machine import installed_version
from vimtune.ops.backend import Backend, Gradients
from vimtune.ops.convolution import ConvInputs, ConvKernels, ConvOptions
from vimtune.ops.cross_entropy import LossInputs, LossKernels
from vimtune.ops.gated_norm import GatedNormInputs, GatedNormKernels
from vimtune.ops.membrane import MembraneInputs, MembraneKernels, MembraneOptions
from vimtune.ops.mixer import MixerInputs, MixerKernels, offset_refusals
from vimtune.ops.mixer_start import StartInputs, StartKernels
from vimtune.ops.norm import NormInputs, NormKernels
from vimtune.ops.scan import ScanInputs, ScanKernels, ScanOptions, time_steps
from vimtune.ops.silu_pair import SiluPair, SiluPairKernels

if TYPE_CHECKING:
    from vimtune.ops.triton import launch

CHUNK = 64
"""Steps between the states that the forward keeps."""


class TritonScan(ScanKernels):
    """The kernels of `triton/scan_kernels.py`, for one direction."""

    def states_shape(self, batch: int, tokens: int, inner: int, states: int) -> tuple[int, ...]:
        # `tokens` may be a symbol of the compiler.
        chunks = cast(int, torch.sym_max(-(-tokens // CHUNK) - 1, 0))
        return (1, batch, chunks, states, inner)

    def forward(
        self, inputs: ScanInputs, options: ScanOptions, save_states: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        from vimtune.ops.triton import launch

        u = inputs.u
        if inputs.state is not None and not save_states:
            segments = launch.num_segments(u)
            if segments > 1:
                return self._run_in_segments(inputs, options, segments)
        out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        states, last = launch.scan_forward(_one_direction(inputs, options), inputs.z, out, 1.0, save_states)
        return out, states, None if inputs.state is None else last.transpose(1, 2)

    def _run_in_segments(
        self, inputs: ScanInputs, options: ScanOptions, segments: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A scan with a state, whose sequences are cut so that enough of them run side by side.

        The recurrence is linear: a first pass finds the state behind each segment for a zero state before it.
        The states before the segments follow from these, and a second pass begins with them.
        """
        u, delta, A, B, C, D, z, delta_bias, state = inputs
        batch, tokens, inner = u.shape
        whole = tokens // segments * segments
        # The tokens that are left over are those that the scan visits last.
        within = slice(tokens - whole, tokens) if options.reverse else slice(whole)
        left_over = slice(tokens - whole) if options.reverse else slice(whole, tokens)
        order = range(segments)[::-1] if options.reverse else range(segments)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, within].reshape(batch * segments, whole // segments, -1)

        parts = ScanInputs(
            cut(u), cut(delta), A, cut(B), cut(C), D, None if z is None else cut(z), delta_bias
        )
        zeros = u.new_zeros(batch * segments, inner, A.shape[1], dtype=torch.float32)
        _, _, ends = self.forward(parts._replace(state=zeros), options, False)
        assert ends is not None and state is not None
        ends = ends.view(batch, segments, inner, -1)
        steps = time_steps(parts.delta.float(), delta_bias, options.delta_softplus)
        decays = torch.exp(steps.sum(1).view(batch, segments, inner, 1) * A)
        starts = torch.empty_like(ends)
        for segment in order:
            starts[:, segment] = state
            state = decays[:, segment] * state + ends[:, segment]
        begun = parts._replace(state=starts.flatten(0, 1))
        out, saved, _ = self.forward(begun, options, False)
        out = out.view(batch, whole, inner)
        if whole < tokens:
            rest = [tensor if tensor is None else tensor[:, left_over] for tensor in (u, delta, B, C, z)]
            behind = ScanInputs(rest[0], rest[1], A, rest[2], rest[3], D, rest[4], delta_bias, state)  # type: ignore[arg-type]
            others, _, last = self.forward(behind, options, False)
            assert last is not None
            out, state = torch.cat([others, out] if options.reverse else [out, others], 1), last
        return out, saved, state

    def backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        states: Tensor,
        inputs: ScanInputs,
        options: ScanOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        from vimtune.ops.triton import launch

        need_u, need_delta, need_A, need_B, need_C, need_D, need_z, need_bias, need_state = needs
        z, D, delta_bias = inputs.z, inputs.D, inputs.delta_bias
        gradients = launch.scan_backward(
            _one_direction(inputs, options),
            grad if z is None else launch.gate_gradient(grad, z, 1.0),
            states,
            launch.ScanNeeds(need_u, need_delta, need_A, need_B or need_C, need_D, need_z, need_bias),
            None if grad_last is None else grad_last.transpose(1, 2).contiguous(),
        )
        grad_B = grad_C = grad_z = None
        if need_B or need_C:
            num_states = inputs.A.shape[1]
            blocks = gradients.BC[0]
            padded = blocks.shape[-1] // 2
            grad_B = blocks[..., :num_states].sum(0).to(inputs.B.dtype) if need_B else None
            grad_C = blocks[..., padded : padded + num_states].sum(0).to(inputs.C.dtype) if need_C else None
        if need_z and z is not None:
            grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
            launch.gate_finish(grad, z, gradients.y, grad_z, 1.0)
        return (
            gradients.u[0] if need_u else None,
            gradients.delta[0] if need_delta else None,
            gradients.A[0].to(inputs.A.dtype) if need_A else None,
            grad_B,
            grad_C,
            gradients.D[0].to(D.dtype) if need_D and D is not None else None,
            grad_z,
            gradients.bias[0].to(delta_bias.dtype) if need_bias and delta_bias is not None else None,
            gradients.state.transpose(1, 2) if need_state else None,
        )


def _one_direction(inputs: ScanInputs, options: ScanOptions) -> launch.ScanInputs:
    """The inputs of a selective scan as the launches take them, which can run two directions at once."""
    from vimtune.ops.triton.launch import Direction, ScanInputs

    return ScanInputs(
        inputs.u,
        inputs.delta,
        inputs.B,
        inputs.C,
        [Direction(inputs.A.contiguous(), inputs.D, inputs.delta_bias)],
        first=int(options.reverse),
        softplus=options.delta_softplus,
        raw=True,
        from_log=False,
        state=None if inputs.state is None else inputs.state.transpose(1, 2).contiguous(),
    )


class TritonConvolution(ConvKernels):
    """The kernels of `triton/conv_kernels.py`."""

    def forward(self, inputs: ConvInputs, options: ConvOptions) -> Tensor:
        from vimtune.ops.triton import convolution

        x, weight, bias = inputs
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        convolution.convolve(x, convolution.transposed(weight), bias, out, *options)
        return out

    def backward(
        self, grad: Tensor, inputs: ConvInputs, options: ConvOptions, needs: Sequence[bool]
    ) -> Gradients:
        from vimtune.ops.triton import convolution

        return convolution.conv_backward(grad, *inputs, *options, needs)


class TritonMixer(MixerKernels):
    """The kernels of a mixer as a whole, launched by `triton/mixer.py`."""

    def refusals(self, inputs: MixerInputs) -> list[str]:
        return [*offset_refusals(*inputs.directions), *_mixer_refusals(inputs.xz)]

    def shapes(self, inputs: MixerInputs, save: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        from vimtune.ops.triton import mixer

        return mixer.shapes(inputs.xz, inputs.directions, save)

    def forward(self, inputs: MixerInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        from vimtune.ops.triton import mixer

        return mixer.forward(inputs.xz, inputs.directions, save)

    def backward(
        self,
        grad: Tensor,
        inputs: MixerInputs,
        results: tuple[Tensor, Tensor, Tensor],
        need_xz: bool,
        needs: Sequence[Sequence[bool]],
    ) -> tuple[Tensor | None, list[list[Tensor | None]]]:
        from vimtune.ops.triton import mixer

        return mixer.backward(grad, inputs.xz, results, inputs.directions, need_xz, needs)


class TritonStart(StartKernels):
    """The kernels of a mixer as a whole whose directions begin with a state."""

    def refusals(self, inputs: StartInputs) -> list[str]:
        return [*offset_refusals(*inputs.directions), *_mixer_refusals(inputs.xz)]

    def forward(self, inputs: StartInputs) -> Tensor:
        from vimtune.ops.triton import mixer

        return mixer.forward(inputs.xz, inputs.directions, False, inputs.starts)[0]


def _mixer_refusals(xz: Tensor) -> list[str]:
    """Why the kernels of a mixer as a whole do not take `xz`."""
    if xz.dtype == torch.float64:
        return ["xz is float64, of which the kernels would need more shared memory than there is"]
    return []


class TritonNorm(NormKernels):
    """The kernels of `triton/norm.py`."""

    def forward(self, inputs: NormInputs, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        from vimtune.ops.triton import norm

        return norm.forward(*inputs, eps, dtype)

    def backward(
        self,
        grad_normed: Tensor,
        grad_total: Tensor | None,
        total: Tensor,
        weight: Tensor,
        inverse: Tensor,
        branch_dtype: torch.dtype | None,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        from vimtune.ops.triton import norm

        return norm.backward(grad_normed, grad_total, total, weight, inverse, branch_dtype, need_weight)


class TritonLoss(LossKernels):
    """The kernels of `triton/cross_entropy.py`."""

    def refusals(self, inputs: LossInputs) -> list[str]:
        dtype = inputs.logits.dtype
        return [f"logits are {dtype}, the kernels compute in fp32"] if dtype == torch.float64 else []

    def forward(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        from vimtune.ops.triton import cross_entropy

        return cross_entropy.forward(*inputs)

    def backward(self, grad: Tensor, inputs: LossInputs, log_sums: Tensor) -> Tensor:
        from vimtune.ops.triton import cross_entropy

        return cross_entropy.backward(grad, *inputs, log_sums)


class TritonGatedNorm(GatedNormKernels):
    """The kernels of `triton/gated_norm.py`."""

    def refusals(self, inputs: GatedNormInputs) -> list[str]:
        from vimtune.ops.triton.gated_norm import LONGEST_GROUP

        reasons = []
        if torch.float64 in (inputs.x.dtype, inputs.gate.dtype):
            reasons.append("tensors are float64, the kernels compute in fp32")
        if inputs.x.shape[-1] > LONGEST_GROUP:
            reasons.append(f"{inputs.x.shape[-1]} channels are more than {LONGEST_GROUP}")
        return reasons

    def forward(self, inputs: GatedNormInputs, groups: int, eps: float) -> Tensor:
        from vimtune.ops.triton import gated_norm

        return gated_norm.forward(inputs, groups, eps)

    def backward(
        self, grad: Tensor, inputs: GatedNormInputs, groups: int, eps: float, need_weight: bool
    ) -> Gradients:
        from vimtune.ops.triton import gated_norm

        return gated_norm.backward(grad, inputs, groups, eps, need_weight)


class TritonMembrane(MembraneKernels):
    """The kernels of `triton/membrane.py`."""

    def refusals(self, inputs: MembraneInputs) -> list[str]:
        return ["x is float64, the kernels compute in fp32"] if inputs.x.dtype == torch.float64 else []

    def forward(self, inputs: MembraneInputs, options: MembraneOptions) -> tuple[Tensor, Tensor]:
        from vimtune.ops.triton import membrane

        return membrane.forward(inputs, options)

    def backward(
        self,
        grad: Tensor,
        grad_mean: Tensor | None,
        result: Tensor,
        options: MembraneOptions,
        need_start: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from vimtune.ops.triton import membrane

        return membrane.backward(grad, grad_mean, result, options, need_start)


class TritonSiluPair(SiluPairKernels):
    """The kernels of `triton/silu_pair.py`."""

    def refusals(self, inputs: SiluPair) -> list[str]:
        wide = any(tensor.dtype == torch.float64 for tensor in inputs)
        return ["tensors are float64, the kernels compute in fp32"] if wide else []

    def forward(self, x: Tensor, pair: SiluPair, skipped: int) -> Tensor:
        from vimtune.ops.triton import silu_pair

        return silu_pair.forward(x, pair, skipped)

    def backward(self, grad: Tensor, pair: SiluPair, skipped: int) -> Gradients:
        from vimtune.ops.triton import silu_pair

        return silu_pair.backward(grad, pair, skipped)


class TritonBackend(Backend):
    """Triton kernels for every size and dtype below fp64."""

    name = "triton"
    summary = "Triton kernels for NVIDIA GPUs"
    packages = ("triton",)
    kernels = (
        TritonScan(),
        TritonConvolution(),
        TritonMixer(),
        TritonStart(),
        TritonNorm(),
        TritonGatedNorm(),
        TritonMembrane(),
        TritonSiluPair(),
        TritonLoss(),
    )

    def refusals(self, device: torch.device) -> list[str]:
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("the package 'triton' is not installed")
        if _is_interpreted():
            return reasons
        if device.type != "cuda":
            reasons.append(f"device is {device.type}, the kernels need cuda (or TRITON_INTERPRET=1)")
        elif torch.version.cuda is None or not torch.cuda.is_available():
            reasons.append("torch has no usable CUDA device")
        elif torch.cuda.get_device_capability(device) < (8, 0):
            reasons.append(f"compute capability {torch.cuda.get_device_capability(device)} is below (8, 0)")
        return reasons

    def advice(self) -> list[str]:
        if not torch.cuda.is_available() or installed_version("triton"):
            return []
        return ["the Triton kernels need the triton package:\n    pip install triton"]

    def reluctance(self, device: torch.device) -> str:
        if device.type != "cuda" and _is_interpreted():
            return "Triton's interpreter is for checking the kernels, and very slow"
        return ""


def _is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device. Triton reads this when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
