"""Random numbers of images, computed on the device as a function of (seed, epoch, image, number of the draw).

There is no generator with a state: each number is a hash of what it belongs to, so that neither the batch
in which an image comes, nor the rank, nor what was drawn before can change it. The hash is the output
function of SplitMix64 (Steele, Lea, Flood 2014), applied to the image's counter and then to the draw's. B
images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BITS = 24
"""Random bits of a number: as many as float32 holds."""


def _signed(value: int) -> int:
    """The int64 that has the bits of an unsigned number of 64 bits."""
    return value - 2**64 if value >= 2**63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
"""Distance between counters: 2 ** 64 over the golden ratio."""
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
"""The multipliers of SplitMix64."""


def uniforms(seed: int, epoch: int, images: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each of `images`: float32 (B, count).

    `images` (B,) int64 are draws as in `vimtune.data.loading.batch_sampler`: indices, where no image comes
    twice.
    """
    key = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    of_images = _mix(images * _STEP + _signed(key))
    draws = torch.arange(1, count + 1, device=images.device) * _STEP
    return _shift(_mix(of_images[:, None] + draws), 64 - _BITS).float() * 2.0**-_BITS


def _mix(bits: Tensor) -> Tensor:
    """Hash int64; products wrap around as those of unsigned numbers do."""
    bits = (bits ^ _shift(bits, 30)) * _FACTORS[0]
    bits = (bits ^ _shift(bits, 27)) * _FACTORS[1]
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Shift int64 to the right and fill with zeros, as unsigned numbers are shifted."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


class Draws:
    """Hands out the numbers of a batch, column by column, so that no number serves twice."""

    def __init__(self, table: Tensor) -> None:
        """Hand out `table`, (B, count)."""
        self._table = table
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """The next `count` numbers of each image: (B, count)."""
        first, self._taken = self._taken, self._taken + count
        assert self._taken <= self._table.shape[1], "an augmentation states how much it draws"
        return self._table[:, first : self._taken]

    def one(self) -> Tensor:
        """The next number of each image: (B,)."""
        return self.take(1)[:, 0]

    def rest(self) -> Tensor:
        """The numbers of each image that are left: (B, ...)."""
        return self.take(self._table.shape[1] - self._taken)
