"""`vimtune combine`: an adapter file that is a weighted sum of others, such as the average over seeds.

`vimtune.adapters.arithmetic` says what is summed and how.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vimtune import parsers
from vimtune.adapters import (
    AdapterInfo,
    active_adapter,
    combine,
    load_adapter,
    read_adapter_info,
    save_adapter,
)
from vimtune.adapters.arithmetic import How
from vimtune.console import build_console, print_line
from vimtune.models.merged import is_merged_file
from vimtune.output import check_output
from vimtune.runtime.device import resolve_device
from vimtune.tasks.origin import adapter_path, given_base, task_of
from vimtune.text import counted, printable, quote
from vimtune.weight_files import SAFETENSORS

RESULT = "combined"
"""Name of the result on the model that is used."""


def combine_files(
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    how: How = "exact",
    head: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    force: bool = False,
) -> AdapterInfo:
    """Write an adapter that is a weighted sum of adapter files of the same base weights.

    Args:
        adapters: files, or folders of runs.
        output: the .safetensors file to write.
        weights: a factor for each; their average if None.
        how: what is summed, see `vimtune.adapters.arithmetic`.
        head: the one of `adapters` whose head and class names the result has; None for the average of heads
            of the same classes.
        checkpoint: where the base weights of an adapter of images are now, as for `load_predictor`.
        model: where the base model of an adapter of texts is now, as there.
        tokenizer: where its tokenizer is now, as there.
        device: "auto", "cpu", "cuda", "cuda:<index>" or "mps".
        backend: scan backend, see `vimtune.ops`.
        force: take adapters although their base weights are others.

    Returns:
        What the file says about itself.

    Raises:
        ValueError: adapters that do not belong to one base, or do not sum so, or a file that cannot be
            written.
    """
    if isinstance(adapters, str | bytes | os.PathLike) or not isinstance(adapters, Iterable):
        raise ValueError(f"adapters = {quote(adapters)}: expected a list of adapter files or run folders")
    paths = [adapter_path(adapter, f"adapters[{number}]") for number, adapter in enumerate(adapters)]
    if not paths:
        raise ValueError("adapters is empty: expected at least one adapter file or run folder")
    target = parsers.given_path("output", output, "the file to write")
    check_output(target, (SAFETENSORS,), paths)
    for path in paths:
        if is_merged_file(path):
            raise ValueError(f"{quote(str(path))} is merged already: expected adapter files or run folders")
    if weights is not None and len(weights) != len(paths):
        raise ValueError(f"{len(weights)} weights for {len(paths)} adapters: expected one for each")
    infos = [read_adapter_info(path) for path in paths]
    place = None if head is None else _place(adapter_path(head, "head"), paths)
    base = given_base(checkpoint, model, tokenizer)
    opened: Any = task_of(infos[0]).open_predictor(paths[0], base, resolve_device(device), backend, force)
    factors = [1 / len(paths)] * len(paths) if weights is None else list(weights)
    return combine_on(opened.model, paths, target, factors, how=how, head=place, force=force)


def combine_on(
    model: nn.Module,
    paths: Sequence[Path],
    output: Path,
    weights: Sequence[float],
    *,
    how: How = "exact",
    head: int | None = None,
    force: bool = False,
) -> AdapterInfo:
    """`combine_files` on a model that has the first of the adapters, and then the result.

    Raises:
        ValueError: as `combine_files`.
    """
    infos = [read_adapter_info(path) for path in paths]
    _check_classes(paths, infos, head)
    first = active_adapter(model)
    assert first is not None, "the model has the first of the adapters"
    names = [first.name, *(f"{RESULT}_{index}" for index in range(2, len(paths) + 1))]
    for path, name in zip(paths[1:], names[1:], strict=True):
        load_adapter(model, path, name=name, force=force)
    coefficients = dict(zip(names, weights, strict=True))
    combine(
        model,
        coefficients,
        name=RESULT,
        how=how,
        head=None if head is None else names[head],
        called={name: str(path) for name, path in zip(names, paths, strict=True)},
    )
    said = infos[head or 0]
    parts = [
        {"file": path.name, "method": info.method, "weight": weight}
        for path, info, weight in zip(paths, infos, weights, strict=True)
    ]
    return save_adapter(
        model,
        output,
        name=RESULT,
        classes=said.classes,
        preprocessing=said.preprocessing,
        extra={**said.extra, "combined": {"how": how, "adapters": parts}},
    )


def _place(head: Path, paths: Sequence[Path]) -> int:
    if head not in paths:
        listed = ", ".join(printable(str(path)) for path in paths)
        raise ValueError(f"head = {quote(str(head))}: expected one of the adapters {listed}")
    return list(paths).index(head)


def _check_classes(paths: Sequence[Path], infos: Sequence[AdapterInfo], head: int | None) -> None:
    """Raise ValueError where heads would be averaged whose rows are different classes."""
    for path, info in zip(paths, infos, strict=True):
        if head is None and info.classes != infos[0].classes:
            raise ValueError(
                f"{quote(str(path))} has other classes than {quote(str(paths[0]))}, so that their heads do "
                "not average: say whose head the result has (head, --head)"
            )


def run_combine(*, adapters: Sequence[Path], output: Path, how: How, **options: Any) -> int:
    """`vimtune combine`: write the file, say what it is. Returns the exit code.

    Args:
        adapters, output, how, **options: those of `combine_files`.
    """
    info = combine_files(adapters, output, how=how, **options)
    console = build_console()
    many = counted(len(adapters), "adapters")
    print_line(console, f"{many} combined ({how}) into {output}, which is {info.method}")
    return 0
