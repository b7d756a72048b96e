"""What a backend is: a named set of kernels, each for one operation, that says where it can run.

Every operation has a file of its own in this folder, which defines a subclass of `Kernels`: what its kernels
compute, from which tensors. A backend holds objects of such subclasses, for as many operations as it likes.
Which of several backends runs is decided in `dispatch.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

Inputs = TypeVar("Inputs")
"""The inputs of an operation."""
Gradients = Sequence[Tensor | None]
"""Gradients of the tensors of an operation, in their order; None where nobody asked for one."""


class BackendUnavailable(ValueError):
    """A backend was asked for by name and cannot run here; the message carries every reason."""


class Kernels(ABC, Generic[Inputs]):
    """Kernels of one backend for one operation.

    Each operation subclasses this with its methods (`forward`, `backward` and the shapes of what the first
    saves for the second), and backends subclass that. `Inputs` is the tuple of the operation's tensors.
    """

    operation: ClassVar[str]
    """Name of the operation, as of `torch.ops.vimtune`."""

    def refusals(self, inputs: Inputs) -> list[str]:
        """Reasons why the kernels do not take tensors of these sizes and dtypes; empty when they do.

        It is asked at every call and while torch.compile traces, so it looks at nothing but shapes, dtypes
        and devices.
        """
        return []


class Backend(ABC):
    """Kernels for one kind of machine."""

    name: ClassVar[str]
    """What users call it: `backend="triton"`."""
    summary: ClassVar[str]
    """One line about it, for logs and `vimtune doctor`."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions that it needs beside torch, whose versions `vimtune doctor` shows."""
    kernels: Sequence[Kernels[Any]] = ()
    """What it offers. Of several kernels for one operation the first that take a call's tensors run."""

    @abstractmethod
    def refusals(self, device: torch.device) -> list[str]:
        """Reasons why this backend cannot run on `device`; empty when it can."""

    def reluctance(self, device: torch.device) -> str:
        """Why `auto` passes over this backend on `device` although it could run; empty if it does not."""
        return ""

    def advice(self) -> list[str]:
        """What to install so that this backend runs on this machine: a reason and a command per entry.

        Empty where it runs already, or where the machine is not of its kind.
        """
        return []


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor torch's current one; nothing happens for tensors on the CPU."""
    context: AbstractContextManager[Any] = torch.cuda.device_of(tensor)
    return context
