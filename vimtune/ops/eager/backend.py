"""Backend `torch`: plain PyTorch on any device, with hand-written backward passes."""

from __future__ import annotations

import torch

from vimtune.ops.backend import Backend
from vimtune.ops.eager.convolution import EagerConvolution
from vimtune.ops.eager.gated_norm import EagerGatedNorm
from vimtune.ops.eager.scan import EagerScan
from vimtune.ops.eager.ssd import EagerSsd


class EagerBackend(Backend):
    """Plain PyTorch, which runs wherever torch does."""

    name = "torch"
    summary = "pure PyTorch, runs everywhere"
    kernels = (EagerScan(), EagerConvolution(), EagerSsd(), EagerGatedNorm())

    def refusals(self, device: torch.device) -> list[str]:
        return []
