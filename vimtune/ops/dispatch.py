"""Which backend computes an operation: each says why it cannot, `auto` takes the first that can.

The choice is made in two steps. Which backends have kernels for an operation and can run on a device is found
once and remembered. Whether their kernels take tensors of the given sizes and dtypes is asked at every call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch

from vimtune.backends import AUTO, BACKENDS, REFERENCE, backend_names
from vimtune.ops.backend import Backend, BackendUnavailable, Inputs, Kernels
from vimtune.ops.operation import constant_for_compiler
from vimtune.text import suggest

logger = logging.getLogger(__name__)

P = ParamSpec("P")
"""The arguments of a function."""
T = TypeVar("T")
"""What a function returns."""
K = TypeVar("K", bound=Kernels[Any])
"""The kernels of an operation."""

SCAN = "selective_scan"
"""The operation by whose backend reports and `vimtune doctor` go."""

# ---------------------------------------------------------------------------------------------
# The backends there are

_KERNELS: dict[tuple[str, str], tuple[Kernels[Any], ...]] = {}
"""Kernels by the names of backend and operation, in the backend's order."""


def register_backend(backend: Backend) -> None:
    """Make `backend` known under its name. `auto` prefers the one that was registered first.

    Raises:
        ValueError: the name is not one, or belongs to another backend.
    """
    if backend.name in (AUTO, REFERENCE):
        raise ValueError(f"backend {backend.name!r}: this name has a meaning of its own; choose another one")
    BACKENDS.add(backend.name, backend)
    for key in [key for key in _KERNELS if key[0] == backend.name]:
        del _KERNELS[key]
    for kernels in backend.kernels:
        key = backend.name, kernels.operation
        _KERNELS[key] = (*_KERNELS.get(key, ()), kernels)
    _offers.cache_clear()


def has_kernels(backend: str, operation: str) -> bool:
    """Whether the backend of this name has kernels for an operation, on whatever device."""
    return (backend, operation) in _KERNELS


@dataclass(frozen=True)
class BackendStatus:
    """A line of `vimtune doctor`: whether a backend can run on a device, and every reason why not."""

    name: str
    summary: str
    available: bool
    reasons: list[str]


def backend_report(device: torch.device | str = "cpu") -> list[BackendStatus]:
    """Every backend in order of preference, with the reasons of those that cannot run on `device`."""
    rows = []
    for name, backend in BACKENDS.items():
        reasons = backend.refusals(torch.device(device))
        rows.append(BackendStatus(name, backend.summary, not reasons, reasons))
    rows.append(BackendStatus(REFERENCE, "the naive definition, for checking; very slow", True, []))
    return rows


def _check_name(name: str) -> None:
    """Raise ValueError for a name that no backend has."""
    if name not in (AUTO, REFERENCE) and name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r}.{suggest(name, backend_names())} Known: {backend_names()}"
        )


# ---------------------------------------------------------------------------------------------
# What users choose

_default = AUTO
"""What `set_backend` has chosen."""


class _Chosen(threading.local):
    """What the innermost `use_backend` of the present thread says.

    It is no ContextVar, which torch.compile cannot read before torch 2.14. Attributes of the present thread's
    own are read and guarded by all versions: what was compiled under one choice is not run under another.
    """

    def __init__(self) -> None:
        """Every thread begins without a choice of its own."""
        self.name: str | None = None


_chosen = _Chosen()


def chosen_backend(name: str) -> str:
    """What `name` stands for in the present thread; still "auto" where nobody has chosen."""
    if name != AUTO:
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
    the replicas of `torch.nn.DataParallel` do. For all of them there is `set_backend`. The backward pass of
    a forward pass within the block may run anywhere: it uses the kernels that the forward used. As with
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


def with_chosen_backend(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, to be called under the present choice in whatever thread.

    It is for what the backward pass calls again (gradient checkpointing), which on GPUs runs in threads of
    its own. Under the compiler it is `function` itself, for the compiler repeats what it has traced.
    """
    if torch.compiler.is_compiling():
        return function
    name = chosen_backend(AUTO)

    def call(*arguments: P.args, **options: P.kwargs) -> T:
        with use_backend(name):
            return function(*arguments, **options)

    return call


# ---------------------------------------------------------------------------------------------
# Which kernels run


@dataclass(frozen=True)
class _Offers:
    """Backends for one operation on one device, whatever the sizes.

    Attributes:
        names: backends that have kernels for it and can run, in order of preference.
        refused: why each of the others is not among them.
        impossible: whether a single backend was asked for, which cannot run on the device at all.
    """

    names: tuple[str, ...]
    refused: tuple[str, ...]
    impossible: bool = False


@cache
def _offers(operation: str, name: str, device: torch.device) -> _Offers:
    """Look for backends that `name` may stand for; "auto" stands for all that are not reluctant."""
    _check_name(name)
    if name != AUTO:
        reasons = [] if name == REFERENCE else BACKENDS.get(name).refusals(device)
        if reasons:
            return _Offers((), tuple(reasons), impossible=True)
        return _Offers((name,), ()) if has_kernels(name, operation) else _Offers((), (_lacks(operation),))
    names: list[str] = []
    refused: list[str] = []
    for each, backend in BACKENDS.items():
        if not has_kernels(each, operation):
            refused.append(f"{each}: {_lacks(operation)}")
            continue
        reasons = backend.refusals(device)
        if not reasons and backend.reluctance(device):
            reasons = [backend.reluctance(device)]
        if reasons:
            refused.append(f"{each}: {', '.join(reasons)}")
            continue
        if not names:
            skipped = "".join(f"; not {reason}" for reason in refused)
            logger.info("%s on %s: backend %s (%s)%s", operation, device, each, backend.summary, skipped)
        names.append(each)
    return _Offers(tuple(names), tuple(refused))


def _lacks(operation: str) -> str:
    """The reason of a backend without kernels for `operation`."""
    return f"it has no kernels for {operation}"


def resolved_backend(device: torch.device | str, name: str = AUTO, operation: str = SCAN) -> str:
    """Name of the backend that `name` means for an operation on `device`, where sizes do not forbid it.

    Raises:
        ValueError: unknown name.
        BackendUnavailable: the named backend cannot run there, or no backend has kernels.
    """
    device = torch.device(device)
    chosen = chosen_backend(name)
    if chosen == REFERENCE:
        return REFERENCE
    offers = _offers(operation, chosen, device)
    if not offers.names:
        _refuse(operation, chosen, device, [])
    return offers.names[0]


@constant_for_compiler
def candidates(operation: str, chosen: str, device: torch.device, is_order: bool) -> tuple[str, ...]:
    """Names of the backends that may run an operation on `device`, in order; none where its formula has to.

    To the compiler the answer is a constant. It sees what has been chosen, and compiles anew after another
    choice.

    Args:
        operation: name of the operation.
        chosen: what `chosen_backend` says.
        device: where the tensors are.
        is_order: whether the call itself names this backend, and not the choice of the thread or process:
            one that was chosen for scans, and does not exist here, does not forbid the formula.

    Raises:
        BackendUnavailable: the call names a backend that cannot run on `device`.
    """
    if chosen == REFERENCE:
        return ()
    offers = _offers(operation, chosen, device)
    if offers.impossible and is_order:
        _refuse(operation, chosen, device, [])
    return offers.names


def find_backend(kind: type[Kernels[Inputs]], name: str, device: torch.device, inputs: Inputs) -> str:
    """Name of the backend whose kernels compute an operation, or an empty string where its formula has to.

    Args:
        kind: class of the operation's kernels.
        name: the argument `backend` of a call.
        device: where the tensors are.
        inputs: the tensors.

    Raises:
        ValueError: unknown name.
        BackendUnavailable: `name` is not "auto", and this backend cannot run on `device`.
    """
    found = _first_offer(kind, name, device, inputs)
    return "" if found is None else found[0]


def find_offered(kind: type[K], name: str, device: torch.device, inputs: tuple[Any, ...]) -> K | None:
    """The kernels that compute an operation, or None where it has to be composed of others.

    Arguments and errors are those of `find_backend`.
    """
    found = _first_offer(kind, name, device, inputs)
    return None if found is None else cast(K, found[1])


def _first_offer(
    kind: type[Kernels[Any]], name: str, device: torch.device, inputs: Any
) -> tuple[str, Kernels[Any]] | None:
    """Name and kernels of the first backend that takes the tensors of `find_backend`."""
    operation = kind.operation
    for each in candidates(operation, chosen_backend(name), device, name != AUTO):
        for kernels in _KERNELS[each, operation]:
            if not kernels.refusals(inputs):
                return each, kernels
    return None


def find_kernels(kind: type[K], name: str, device: torch.device, inputs: tuple[Any, ...]) -> tuple[str, K]:
    """Name of the backend that computes an operation without a formula, and its kernels.

    The arguments are those of `find_backend`.

    Raises:
        ValueError: unknown name.
        BackendUnavailable: no backend that `name` stands for takes such tensors; the message has the reasons.
    """
    operation, chosen = kind.operation, chosen_backend(name)
    reasons = []
    for each in _offers(operation, chosen, device).names:
        for kernels in _KERNELS[each, operation]:
            refused = kernels.refusals(inputs)
            if not refused:
                return each, cast(K, kernels)
            reasons += refused if chosen == each else [f"{each}: {', '.join(refused)}"]
    _refuse(operation, chosen, device, reasons)


def _refuse(operation: str, chosen: str, device: torch.device, because_of_sizes: list[str]) -> NoReturn:
    """Raise BackendUnavailable with all reasons."""
    if chosen == REFERENCE:
        raise BackendUnavailable(
            "backend 'reference' has no kernels, so a scripted, traced or exported graph that calls the "
            "operation itself cannot use it: call the Python function, or choose another backend."
        )
    offers = _offers(operation, chosen, device)
    reasons = "; ".join([*offers.refused, *because_of_sizes])
    if chosen == AUTO:
        raise BackendUnavailable(f"no backend can run {operation} on {device}: {reasons}")
    what = "run" if offers.impossible else f"run this {operation}"
    raise BackendUnavailable(
        f"backend {chosen!r} cannot {what} on {device}: {reasons}. Use 'auto' or another one."
    )
