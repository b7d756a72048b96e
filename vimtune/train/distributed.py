"""The processes of a run: device choice and the few collectives the trainer needs.

`torchrun` and `accelerate launch` describe the processes in environment variables; without them
the run is one process and every collective here is the identity. Gradients are summed by one flat
all-reduce per optimizer step rather than by DistributedDataParallel: what an adapter trains is
small, micro-batches then communicate once, and a process whose share of a batch is empty still
takes part.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes, on the device it came from."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)  # NCCL moves tensors of the GPU only
        dist.all_reduce(total)
        return total.to(tensor.device)

    def sum_gradients_(self, parameters: Sequence[Tensor]) -> None:
        """Sum `.grad` of `parameters` over all processes; a missing gradient counts as zero."""
        if self.world_size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, piece in zip(parameters, gradients, pieces, strict=True):
            parameter.grad = gradient.copy_(piece.view_as(gradient))

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's `value`, in every process."""
        return self.gather(value)[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process run the block before the others (for downloads and caches)."""
        if not self.is_main:
            self.gather(None)
        try:
            yield
        finally:
            if self.is_main:
                self.gather(None)


def resolve_device(name: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """The device that a recipe's `device` means for this process.

    Raises:
        ValueError: not a device, or one this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device = {name!r}: expected auto, cpu, cuda, cuda:<index> or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is not None and local_world_size > 1:
            raise ValueError(f"device = {name!r} names one GPU for {local_world_size} processes: use cuda")
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise ValueError(f"device = {name!r}: GPU {index} is asked for and this machine has {count}")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device = 'mps' is not available on this machine: use cpu")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device = {name!r}: expected auto, cpu, cuda, cuda:<index> or mps")
    return device


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name} = {text!r}: expected a whole number") from None


@contextmanager
def open_processes(device_name: str) -> Iterator[Processes]:
    """Join the processes announced by the environment, if any, and choose this process's device."""
    rank, world_size = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    local_rank = _environment("LOCAL_RANK", 0)
    device = resolve_device(device_name, local_rank, _environment("LOCAL_WORLD_SIZE", world_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joins = world_size > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    notes = logging.getLogger("vimtune")
    level = notes.level
    if rank > 0:  # one process tells what all of them do; warnings pass
        notes.setLevel(max(logging.WARNING, level))
    try:
        yield Processes(rank, world_size, device)
    finally:
        notes.setLevel(level)
        if joins:
            dist.destroy_process_group()
