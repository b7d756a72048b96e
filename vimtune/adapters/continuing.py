"""Training that goes on from an adapter file, also where classes have come or gone. C classes, D width."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vimtune.adapters.identity import has_base
from vimtune.adapters.info import AdapterFileError, AdapterInfo
from vimtune.adapters.manage import demand_adapter
from vimtune.adapters.store import check_head, demand_architecture, other_base, read_adapter, refusing
from vimtune.adapters.tensors import adapter_state_dict, load_adapter_state_dict
from vimtune.adapters.wrappers import unwrap
from vimtune.fields import options_of
from vimtune.methods import Method, differing_options, resolve_options
from vimtune.text import printable, quote

logger = logging.getLogger(__name__)

_SHOWN = 5
"""Names of classes that a message lists."""


def start_from(
    model: nn.Module, path: str | Path, *, classes: Sequence[str] | None = None, force: bool = False
) -> AdapterInfo:
    """Give the active adapter of a model the values of a file, as the start of a new training.

    The adapter was injected by the same method at the same places. Of the head, each class that the file
    knows by name gets its row; the others keep their fresh ones. What was kept is logged, and
    which options are others.

    Args:
        model: a model with an adapter.
        path: a file written by `save_adapter`.
        classes: the C names of the classes of this head; None where they are those of the file, in its order.
        force: take it although the base weights differ.

    Raises:
        AdapterFileError: not an adapter file, one of another method or other base weights, or one that does
            not fit.
        ValueError: the model has no adapter.
    """
    model = unwrap(model)
    _, record = demand_adapter(model)
    info, tensors = read_adapter(path)
    demand_architecture(model, path, info, force)
    if info.method != record.method:
        raise AdapterFileError(
            f"{printable(str(path))} is an adapter of method {info.method}, and this one is of "
            f"{record.method}: continue with the same method"
        )
    if not force and not has_base(model, info.base_hash, info.base_origin, record.name):
        raise other_base(path, info)
    _warn_of_options(path, info, record.options)
    own = adapter_state_dict(model, record.name)
    with refusing(path):
        check_head(info, tensors, record.head)
        for key in (f"{head}.value" for head in record.head):
            if key in tensors:
                tensors[key] = _rows_by_name(tensors[key], own[key], info.classes, classes)
        load_adapter_state_dict(model, tensors, record.name)
    if record.head and classes is not None:
        _log_kept(path, info.classes, classes)
    return info


def _warn_of_options(path: str | Path, info: AdapterInfo, options: Mapping[str, Any]) -> None:
    """Say which options the adapter of a file had otherwise: with another formula the same values are another
    function, and with another learning rate, say, they are not. Which it is nobody can tell from outside, but
    of the options that all methods have: these are about training."""
    others = [
        f"{option} of {name} was {quote(was)} and is {quote(now)}"
        for name, option, was, now in differing_options(info.options, resolve_options(info.method, options))
        if option not in options_of(Method)
    ]
    if others:
        logger.warning(
            "%s was trained with other options, so that it may start as another function: %s",
            printable(str(path)),
            "; ".join(others),
        )


def _rows_by_name(given: Tensor, own: Tensor, theirs: Sequence[str], ours: Sequence[str] | None) -> Tensor:
    """A parameter of a head, (C, ...), in which each class that a file knows has its row of the file.

    Args:
        given: that of the file.
        own: that of the model, as it starts.
        theirs: names of the classes of the file; empty where nobody gave names.
        ours: those of the model.

    Raises:
        ValueError: the file names no classes and has another number of them.
    """
    if ours is None or not theirs:
        if given.shape != own.shape:
            raise ValueError(
                f"its head has {len(given)} outputs and this one {len(own)}, and without names of classes "
                "nobody knows which are the same"
            )
        return given
    places = {name: row for row, name in enumerate(theirs)}
    known = [row for row, name in enumerate(ours) if name in places]
    rows = own.clone()
    if given.shape[1:] == own.shape[1:]:  # If not, the whole tensor is refused for its shape.
        rows[known] = given[[places[ours[row]] for row in known]].to(own)
        return rows
    return given


def _log_kept(path: str | Path, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Say which classes of the head go on."""
    new = [name for name in ours if name not in set(theirs)]
    gone = [name for name in theirs if name not in set(ours)]
    parts = [f"{len(ours) - len(new)} of {len(ours)} classes keep their part of the head"]
    parts += [
        f"{word}: {', '.join(map(quote, names[:_SHOWN]))}{' ...' if len(names) > _SHOWN else ''}"
        for word, names in (("new", new), ("no longer there", gone))
        if names and theirs
    ]
    logger.info("continuing from %s; %s", printable(str(path)), "; ".join(parts))
