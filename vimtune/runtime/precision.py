"""Mixed precision: the autocast block and the gradient scaler that a recipe's `amp` means."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

Autocast = Callable[[], AbstractContextManager[Any]]
"""Opens the block in which a model runs."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The type in which matrices are multiplied, by the names that a recipe's `amp` has for it."""


def build_autocast(amp: str, device: torch.device) -> Autocast:
    """A function that opens the block in which the model runs.

    Raises:
        ValueError: the device cannot train in this precision.
    """
    if amp == "none":
        return _no_autocast
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"amp = 'fp16' needs a CUDA GPU and the device is {device}: use bf16 or none")
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"amp = 'bf16' is not supported by {name}: use fp16 or none")
    if amp == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ValueError("amp = 'bf16' on mps needs macOS 14 or newer: use none")
    # A pass reads each weight once, so a cache of casts saves nothing; in a CUDA graph it would go stale.
    return partial(torch.autocast, device.type, DTYPES[amp], cache_enabled=False)


def in_precision(model: Callable[..., Any], autocast: Autocast) -> Callable[..., Any]:
    """`model` as a function whose calls run in the block of `autocast`."""

    def forward(*inputs: Any, **named: Any) -> Any:
        with autocast():
            return model(*inputs, **named)

    return forward


def build_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; disabled, and then the identity, for everything else."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def _no_autocast() -> AbstractContextManager[Any]:
    return nullcontext()
