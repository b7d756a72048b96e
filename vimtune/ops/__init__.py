"""Operations of Vision Mamba behind one dispatch.

Each operation has a file: `scan.py`, `ssd.py`, `convolution.py`, `mixer.py`, `ssd_mixer.py`, `norm.py`,
`cross_entropy.py`, `block_product.py`, `membrane.py`, `silu_pair.py`, `mixer_start.py` for mixers that begin
with a state, and `prompt.py`, `step.py` and `ssd_mixer_step.py` for what generating text needs.
Their naive definitions are in `reference.py`. A backend (`backend.py`) has kernels for as many of them as it
likes: `cpu/`, `nvrtc/`, `triton/`, `cuda.py`, `eager.py`. Which one runs is decided in `dispatch.py`.
"""

from importlib import import_module

from vimtune.backends import OWN, backend_names
from vimtune.ops.backend import Backend, BackendUnavailable, Kernels
from vimtune.ops.block_product import scaled_block_product
from vimtune.ops.convolution import causal_conv1d
from vimtune.ops.cross_entropy import token_losses
from vimtune.ops.dispatch import (
    backend_report,
    has_kernels,
    register_backend,
    resolved_backend,
    set_backend,
    use_backend,
    with_chosen_backend,
)
from vimtune.ops.gated_norm import gated_rms_norm
from vimtune.ops.membrane import membrane
from vimtune.ops.mixer import DirectionStart, DirectionWeights, bidirectional_scan, causal_mixer
from vimtune.ops.mixer_start import bidirectional_scan_from, start_behind
from vimtune.ops.norm import add_rms_norm, has_add_rms_norm
from vimtune.ops.prompt import causal_prompt
from vimtune.ops.scan import scan_step, selective_scan, stateful_scan
from vimtune.ops.silu_pair import add_silu_pair
from vimtune.ops.ssd import ssd, ssd_step
from vimtune.ops.ssd_mixer import SsdMixerOptions, SsdWeights, ssd_mixer
from vimtune.ops.ssd_mixer_step import ssd_mixer_step
from vimtune.ops.step import causal_step

for _path in OWN.values():
    _module, _, _class = _path.rpartition(".")
    register_backend(getattr(import_module(_module), _class)())

__all__ = [
    "Backend",
    "BackendUnavailable",
    "DirectionStart",
    "DirectionWeights",
    "Kernels",
    "SsdMixerOptions",
    "SsdWeights",
    "add_rms_norm",
    "add_silu_pair",
    "backend_names",
    "backend_report",
    "bidirectional_scan",
    "bidirectional_scan_from",
    "causal_conv1d",
    "causal_mixer",
    "causal_prompt",
    "causal_step",
    "gated_rms_norm",
    "has_add_rms_norm",
    "has_kernels",
    "membrane",
    "register_backend",
    "resolved_backend",
    "scaled_block_product",
    "scan_step",
    "selective_scan",
    "set_backend",
    "ssd",
    "ssd_mixer",
    "ssd_mixer_step",
    "ssd_step",
    "start_behind",
    "stateful_scan",
    "token_losses",
    "use_backend",
    "with_chosen_backend",
]
