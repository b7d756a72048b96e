"""Backend `nvrtc`: the inside of the mixer and ProDiaL's weights in CUDA C++, compiled at run time; the rest
is Triton's.

Sizes and dtypes that the CUDA kernels do not have (`scan.covers`) run in Triton as well.
"""

from __future__ import annotations

from functools import cache

import torch

from vimtune.ops.nvrtc import runtime, scan
from vimtune.ops.triton.backend import TritonBackend


class NvrtcBackend(TritonBackend):
    name = "nvrtc"
    summary = "CUDA kernels compiled at run time by torch's NVRTC, with Triton's around them"

    def refusals(self, device):
        reasons = super().refusals(device)
        if device.type != "cuda":
            return [f"device is {device.type}, the kernels need cuda"]
        return reasons or _compile_errors(*torch.cuda.get_device_capability(device))


@cache
def _compile_errors(major: int, minor: int) -> list[str]:
    constants = (("WIDTH", 384), ("COLUMNS", 48), ("FP16", 0), ("SEGMENTED", 0))
    try:
        runtime.compile_source(scan.FORWARD, constants, f"sm_{major}{minor}")
    except runtime.CompileError as error:
        return [str(error)]
    return []
