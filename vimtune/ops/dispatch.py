"""Which backend computes the scans: each says why it cannot run, `auto` takes the first that can.

A backend is one object with the four kernels (scan and convolution, forward and backward). The
autograd and torch.compile side is written once, in `functional.py`.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from vimtune.utils import suggest

logger = logging.getLogger(__name__)

Gradients = tuple[Tensor | None, ...]
T = TypeVar("T")


class BackendUnavailable(ValueError):
    """A backend was asked for by name and cannot run here; the message carries every reason."""


@dataclass(frozen=True)
class ScanOptions:
    """The non-tensor arguments of a selective scan."""

    delta_softplus: bool
    reverse: bool


class Backend(ABC):
    """Kernels for one kind of machine.

    Tensors are channel-last with unit stride in the last dimension and any stride elsewhere:
    `u`, `delta`, `z`, `x` (B, L, E), `B`, `C` (B, L, N), `A` (E, N), `weight` (E, K), vectors (E,).
    Activations may be fp32, bf16 or fp16; the state is always fp32. Results may have any strides, the
    operations make them contiguous.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    has_fused_kernels: ClassVar[bool] = False
    """Whether it also runs `bidirectional_scan` and `add_rms_norm`."""

    @abstractmethod
    def refusals(self, device: torch.device) -> list[str]:
        """Reasons why this backend cannot run on `device`; empty when it can."""

    @abstractmethod
    def states_shape(self, batch: int, tokens: int, inner: int, states: int) -> tuple[int, ...]:
        """Shape of the fp32 tensor that `scan_forward` saves for `scan_backward`."""

    @abstractmethod
    def scan_forward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        options: ScanOptions,
        save_states: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return `out` (B, L, E) in the dtype of `u`, and the saved states (empty if not wanted)."""

    @abstractmethod
    def scan_backward(
        self,
        grad: Tensor,
        states: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        options: ScanOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        """Gradients of (u, delta, A, B, C, D, z, delta_bias), None where `needs` is False."""

    @abstractmethod
    def conv_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
    ) -> Tensor:
        """Depthwise causal convolution, (B, L, E) in the dtype of `x`."""

    @abstractmethod
    def conv_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        reverse: bool,
        needs: Sequence[bool],
    ) -> Gradients:
        """Gradients of (x, weight, bias), None where `needs` is False."""


_BACKENDS: dict[str, Backend] = {}
_default = "auto"

REFERENCE = "reference"
"""Name of the naive definition. It has no kernels: autograd differentiates it, outside the custom ops."""


class _Chosen(threading.local):
    """What the innermost `use_backend` of the present thread says.

    Not a ContextVar, which torch.compile cannot read before torch 2.14. Attributes of the present thread's
    own are read and guarded by all versions: what was compiled under one choice is not run under another.
    """

    def __init__(self) -> None:
        self.name: str | None = None


_chosen = _Chosen()


def register_backend(backend: Backend) -> None:
    """Make `backend` known; `auto` prefers the one registered first."""
    _BACKENDS[backend.name] = backend


def backend_names() -> list[str]:
    """Names that `backend=` accepts, `auto` first."""
    return ["auto", *_BACKENDS, REFERENCE]


def chosen_backend(name: str) -> str:
    """What `name` stands for in the present thread; still "auto" where nobody has chosen."""
    if name != "auto":
        return name
    chosen = _chosen.name
    return _default if chosen is None else chosen


def set_backend(name: str) -> None:
    """Choose the backend that `backend="auto"` stands for in this process.

    It holds in every thread, also in those that run already, except within their `use_backend` blocks.

    Raises:
        ValueError: unknown name. Whether it can run is checked on use, when the device is known.
    """
    global _default
    _check_name(name)
    _default = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose what `backend="auto"` stands for in the present thread, for the duration of a block.

    Other threads do not see it: neither those that run already nor those that start within the block, as
    the replicas of `torch.nn.DataParallel` do. For all of them there is `set_backend`. Of a forward pass
    within the block the backward pass may run anywhere, it uses the kernels that the forward used. As with
    `torch.no_grad`, coroutines that take turns within one thread share the choice.

    Raises:
        ValueError: unknown name. Whether it can run is checked on use, when the device is known.
    """
    _check_name(name)
    before = _chosen.name
    _chosen.name = name
    try:
        yield
    finally:
        _chosen.name = before


def with_chosen_backend(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, to be called under the present choice in whatever thread.

    For what the backward pass calls again (gradient checkpointing): on GPUs it runs in threads of its own.
    Under the compiler it is `function` itself, for the compiler repeats what it has traced.
    """
    if torch.compiler.is_compiling():
        return function
    name = chosen_backend("auto")

    def call(*arguments: Any, **options: Any) -> T:
        with use_backend(name):
            return function(*arguments, **options)

    return call


def resolve_backend(name: str, device: torch.device) -> Backend:
    """Return the backend whose kernels run on `device`.

    Raises:
        ValueError: unknown name.
        BackendUnavailable: the named backend refuses this device, or has no kernels at all.
    """
    _check_name(name)
    name = chosen_backend(name)
    return _choose_automatically(device.type, device.index) if name == "auto" else _demand(name, device)


def resolved_backend(device: torch.device | str, name: str = "auto") -> str:
    """Name of the backend that `name` means on `device`."""
    if chosen_backend(name) == REFERENCE:
        return REFERENCE
    return resolve_backend(name, torch.device(device)).name


@dataclass(frozen=True)
class BackendStatus:
    name: str
    summary: str
    available: bool
    reasons: list[str]


def backend_report(device: torch.device | str = "cpu") -> list[BackendStatus]:
    """Every backend in order of preference, with the reasons of those that cannot run on `device`."""
    rows = []
    for backend in _BACKENDS.values():
        reasons = backend.refusals(torch.device(device))
        rows.append(BackendStatus(backend.name, backend.summary, not reasons, reasons))
    rows.append(BackendStatus(REFERENCE, "the naive definition, for checking; very slow", True, []))
    return rows


def _check_name(name: str) -> None:
    if name not in _BACKENDS and name not in ("auto", REFERENCE):
        raise ValueError(
            f"unknown backend {name!r}.{suggest(name, backend_names())} Known: {backend_names()}"
        )


def _demand(name: str, device: torch.device) -> Backend:
    if name == REFERENCE:
        raise BackendUnavailable(
            "backend 'reference' has no kernels, so a scripted, traced or exported graph that calls the "
            "operation itself cannot use it: call the Python function, or choose another backend."
        )
    reasons = _BACKENDS[name].refusals(device)
    if reasons:
        raise BackendUnavailable(
            f"backend {name!r} cannot run on {device}: {'; '.join(reasons)}. Use 'auto' or another one."
        )
    return _BACKENDS[name]


@cache
def _choose_automatically(device_type: str, device_index: int | None) -> Backend:
    device = torch.device(device_type) if device_index is None else torch.device(device_type, device_index)
    refused: list[tuple[str, str]] = []
    for backend in _BACKENDS.values():
        reasons = backend.refusals(device)
        if not reasons:
            skipped = "".join(f"; not {name}: {why}" for name, why in refused)
            logger.info("scan backend on %s: %s (%s)%s", device, backend.name, backend.summary, skipped)
            return backend
        refused.append((backend.name, ", ".join(reasons)))
    raise AssertionError("the pure PyTorch backend runs everywhere")
