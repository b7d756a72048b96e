"""From bytes to what a model takes, on the host or on the device where a batch has arrived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Normalisation:
    """Scales bytes to [0, 1], subtracts a mean and divides by a standard deviation, on any device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """`mean` and `std` have a number for each RGB channel, of values in [0, 1]."""
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std)
        )
        self._on_devices: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a process gets that prepares images: nothing on a GPU, which it would have to open."""
        return {**self.__dict__, "_on_devices": {}}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Images uint8 (..., H, W, 3) as float32 (..., 3, H, W), on the same device."""
        planes = pixels.movedim(-1, -3)
        return self.scale_(planes.to(torch.float32, memory_format=torch.contiguous_format))

    def scale_(self, images: Tensor) -> Tensor:
        """Normalise float32 (..., 3, H, W) of values from 0 to 255 in place."""
        mean, std = self.on(images.device)
        return images.div_(255).sub_(mean).div_(std)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on a device, (3, 1, 1) each."""
        # A copy to a GPU for every batch would make the host wait.
        if device not in self._on_devices:
            self._on_devices[device] = self._mean.to(device), self._std.to(device)
        return self._on_devices[device]
