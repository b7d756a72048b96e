"""Random decisions: a seed for each of them, and the generators that draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed that depends on every argument, equal in all processes and on all machines.

    Each random decision of a run draws from its own seed (run seed, what for, step, ...), so that
    a resumed run needs no stored generator state to continue exactly.
    """
    text = "/".join(str(part) for part in (seed, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and `device` alone: noting a seed for each kind of device that is
    not there, with a stack trace, would take longer than all else between two replayed steps."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator for a block (timm's Mixup draws from it) and restore it."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
