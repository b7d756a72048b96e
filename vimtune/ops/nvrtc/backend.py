"""Backend `nvrtc`: the inside of the mixer and ProDiaL's weights in CUDA C++, compiled at run time.

Everything else, and tensors of sizes and dtypes that the CUDA kernels do not have, runs in the kernels of
Triton: this backend offers those, too, after its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vimtune.ops.backend import Backend
from vimtune.ops.block_product import ProductInputs, ProductKernels
from vimtune.ops.mixer import MixerInputs, MixerKernels
from vimtune.ops.mixer_start import StartInputs, StartKernels
from vimtune.ops.nvrtc import block_product, mixer, runtime, scan, ssd_step, step
from vimtune.ops.prompt import PromptKernels
from vimtune.ops.ssd_mixer_step import SsdStepInputs, SsdStepKernels
from vimtune.ops.step import StepInputs, StepKernels
from vimtune.ops.triton.backend import TritonBackend


class NvrtcMixer(MixerKernels):
    """The kernels of `nvrtc/mixer.py`, for bf16 and fp16 activations and up to 32 states."""

    def refusals(self, inputs: MixerInputs) -> list[str]:
        return mixer.refusals(inputs.xz, inputs.directions)

    def shapes(self, inputs: MixerInputs, save: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return mixer.shapes(inputs.xz, inputs.directions, save)

    def forward(self, inputs: MixerInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        return mixer.forward(inputs.xz, inputs.directions, save)

    def backward(
        self,
        grad: Tensor,
        inputs: MixerInputs,
        results: tuple[Tensor, Tensor, Tensor],
        need_xz: bool,
        needs: Sequence[Sequence[bool]],
    ) -> tuple[Tensor | None, list[list[Tensor | None]]]:
        return mixer.backward(grad, inputs.xz, results, inputs.directions, need_xz, needs)


class NvrtcStart(StartKernels):
    """The kernels of `nvrtc/mixer.py` for mixers that begin with a state, with the limits of the others."""

    def refusals(self, inputs: StartInputs) -> list[str]:
        return mixer.refusals(inputs.xz, inputs.directions)

    def forward(self, inputs: StartInputs) -> Tensor:
        return mixer.forward_from(inputs.xz, inputs.directions, inputs.starts)


class NvrtcPrompt(PromptKernels):
    """The kernels of `nvrtc/mixer.py` for prompts, with the limits of those for training."""

    def refusals(self, inputs: MixerInputs) -> list[str]:
        return mixer.refusals(inputs.xz, inputs.directions)

    def forward(self, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
        return mixer.prompt(inputs.xz, inputs.directions)


class NvrtcStep(StepKernels):
    """The kernel of `nvrtc/step.py`, for bf16 and fp16 activations."""

    def refusals(self, inputs: StepInputs) -> list[str]:
        return step.refusals(inputs)

    def forward(self, inputs: StepInputs) -> Tensor:
        return step.mixer_step(inputs)


class NvrtcSsdStep(SsdStepKernels):
    """The kernels of `nvrtc/ssd_step.py`, for bf16 and fp16 activations."""

    def refusals(self, inputs: SsdStepInputs) -> list[str]:
        return ssd_step.refusals(inputs)

    def forward(self, inputs: SsdStepInputs) -> Tensor:
        return ssd_step.mixer_step(inputs)


class NvrtcProduct(ProductKernels):
    """The kernels of `nvrtc/block_product.py`, for fp32."""

    def refusals(self, inputs: ProductInputs) -> list[str]:
        return block_product.refusals(*inputs)

    def forward(self, inputs: ProductInputs) -> Tensor:
        return block_product.scaled_block_product(*inputs)

    def backward(
        self, grad: Tensor, inputs: ProductInputs, need_scale: bool, need_blocks: bool
    ) -> tuple[Tensor, Tensor]:
        return block_product.scaled_block_product_backward(grad, *inputs, need_scale, need_blocks)


class NvrtcBackend(Backend):
    """CUDA C++ for NVIDIA GPUs, and Triton's kernels for what it does not have."""

    name = "nvrtc"
    summary = "CUDA kernels compiled at run time by torch's NVRTC, with Triton's around them"

    def __init__(self) -> None:
        """A backend with the kernels of both; nothing is compiled yet."""
        self._triton = TritonBackend()
        self.kernels = (
            NvrtcMixer(),
            NvrtcStart(),
            NvrtcPrompt(),
            NvrtcStep(),
            NvrtcSsdStep(),
            NvrtcProduct(),
            *self._triton.kernels,
        )

    def refusals(self, device: torch.device) -> list[str]:
        if device.type != "cuda":
            return [f"device is {device.type}, the kernels need cuda"]
        return self._triton.refusals(device) or _compile_errors(*torch.cuda.get_device_capability(device))


@cache
def _compile_errors(major: int, minor: int) -> list[str]:
    """Why NVRTC does not compile for this compute capability; empty if it does."""
    sizes = ("DIRECTIONS", 2), ("STATES", 16), ("WIDTH", 384), ("COLUMNS", 48)
    constants = (*sizes, ("FP16", 0), ("SEGMENTED", 0), ("OFFSET", 0))
    try:
        runtime.compile_source(scan.FORWARD, constants, f"sm_{major}{minor}")
    except runtime.CompileError as error:
        return [str(error)]
    return []
