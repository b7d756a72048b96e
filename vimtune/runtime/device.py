"""The device that the name in a recipe or on the command line means."""

from __future__ import annotations

import torch


def resolve_device(
    name: str, local_rank: int = 0, local_world_size: int = 1, own_gpu: bool = False
) -> torch.device:
    """The device that a recipe's `device` means for this process.

    Args:
        name: the recipe's; "auto" is an NVIDIA GPU, else for a process alone Apple's, else the processor.
        local_rank, local_world_size: number of the process on this machine, and how many there are.
        own_gpu: take the only GPU that this process sees for its own, whatever its number.

    Raises:
        ValueError: not a device, or one this machine does not have.
    """
    if name == "auto":
        name = _best_device(local_world_size)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device = {name!r}: expected auto, cpu, cuda, cuda:<index> or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is not None and local_world_size > 1:
            raise ValueError(f"device = {name!r} names one GPU for {local_world_size} processes: use cuda")
        own = 0 if own_gpu and count == 1 else local_rank
        index = own if device.index is None else device.index
        if index >= count:
            raise ValueError(f"device = {name!r}: GPU {index} is asked for and this machine has {count}")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device = 'mps' is not available on this machine: use cpu")
    if device.type == "mps" and local_world_size > 1:
        raise ValueError(f"device = 'mps' cannot be shared by {local_world_size} processes: use cpu, or one")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device = {name!r}: expected auto, cpu, cuda, cuda:<index> or mps")
    return device


def _best_device(local_world_size: int) -> str:
    """The name of the fastest kind of device that a process has. Apple's GPU is one, and gloo, which connects
    processes there, does not know it."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and local_world_size == 1 else "cpu"
