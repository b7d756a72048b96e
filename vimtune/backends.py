"""Which backends there are, by name; nothing here imports torch.

Recipes and `--help` have to know the names before anything heavy is loaded. This file cannot be within
`vimtune.ops`: importing any part of that room registers all kernels with torch, so that no operation is ever
looked for before its backends are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vimtune.registry import Registry

if TYPE_CHECKING:
    from vimtune.ops.backend import Backend

AUTO = "auto"
"""Stands for the first backend that can run."""
REFERENCE = "reference"
"""Name of the naive definitions. They have no kernels: autograd differentiates them as any function."""

OWN = {
    "cpu": "vimtune.ops.cpu.CpuBackend",
    "nvrtc": "vimtune.ops.nvrtc.backend.NvrtcBackend",
    "triton": "vimtune.ops.triton.backend.TritonBackend",
    "cuda": "vimtune.ops.cuda.CudaBackend",
    "torch": "vimtune.ops.eager.backend.EagerBackend",
}
"""The backends that vimtune brings, in the order in which `auto` asks them: name -> class."""

BACKENDS: Registry[Backend] = Registry("backend")
"""All backends that are registered: those of `OWN` once `vimtune.ops` is imported, and those of packages of
users, which `vimtune.ops.register_backend` adds."""


def backend_names() -> list[str]:
    """Names that `backend=` accepts, `auto` first."""
    return [AUTO, *dict.fromkeys([*OWN, *BACKENDS]), REFERENCE]
