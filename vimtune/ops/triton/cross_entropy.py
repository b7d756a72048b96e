"""Launches of the kernels of cross_entropy_kernels.py.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.cross_entropy import IGNORED
from vimtune.ops.triton.common import next_power_of_2
from vimtune.ops.triton.cross_entropy_kernels import loss_backward_kernel, loss_kernel

LONGEST_PART = 4096
"""Most logits of a row that a program holds at once."""
WARPS = 8
"""Warps of a program."""


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and logarithms of the sums of exponentials, both (T,) in fp32; all tensors are contiguous."""
    tokens, size = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    log_sums = torch.empty_like(losses)
    with device_of(logits):
        loss_kernel[(tokens,)](
            logits, labels, losses, log_sums, size, PART=_part(size), IGNORED=IGNORED, num_warps=WARPS
        )
    return losses, log_sums


def backward(grad: Tensor, logits: Tensor, labels: Tensor, log_sums: Tensor) -> Tensor:
    """Gradient of the logits (T, V), in their dtype."""
    tokens, size = logits.shape
    grad_logits, part = torch.empty_like(logits), _part(size)
    with device_of(logits):
        loss_backward_kernel[(tokens, -(-size // part))](
            grad, logits, labels, log_sums, grad_logits, size, PART=part, IGNORED=IGNORED, num_warps=WARPS
        )
    return grad_logits


def _part(size: int) -> int:
    """How many logits of a row a program holds at once."""
    return min(LONGEST_PART, next_power_of_2(size))
