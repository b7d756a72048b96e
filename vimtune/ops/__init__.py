"""Selective scan and causal convolution behind one dispatch; see `dispatch.py` for the backends."""

from vimtune.ops.block_product import scaled_block_product
from vimtune.ops.cpu import CpuBackend
from vimtune.ops.cuda import CudaBackend
from vimtune.ops.dispatch import (
    Backend,
    BackendUnavailable,
    backend_names,
    backend_report,
    register_backend,
    resolved_backend,
    set_backend,
    use_backend,
    with_chosen_backend,
)
from vimtune.ops.eager import EagerBackend
from vimtune.ops.functional import causal_conv1d, selective_scan
from vimtune.ops.fused import DirectionWeights, bidirectional_scan, has_bidirectional_scan
from vimtune.ops.norm import add_rms_norm
from vimtune.ops.nvrtc.backend import NvrtcBackend
from vimtune.ops.triton.backend import TritonBackend

# In the order in which `auto` asks them.
register_backend(CpuBackend())
register_backend(NvrtcBackend())
register_backend(TritonBackend())
register_backend(CudaBackend())
register_backend(EagerBackend())

__all__ = [
    "Backend",
    "BackendUnavailable",
    "DirectionWeights",
    "add_rms_norm",
    "backend_names",
    "backend_report",
    "bidirectional_scan",
    "causal_conv1d",
    "has_bidirectional_scan",
    "register_backend",
    "resolved_backend",
    "scaled_block_product",
    "selective_scan",
    "set_backend",
    "use_backend",
    "with_chosen_backend",
]
