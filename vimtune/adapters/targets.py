"""From what the user calls a target to the parameters it stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from vimtune.adapters.rule import base_parameters
from vimtune.utils import suggest

ALIASES = {"both": ("in_proj", "out_proj")}

_INDEX = re.compile(r"\.(\d+)\.")


def resolve_targets(
    model: nn.Module, targets: str | Sequence[str], layers: Sequence[int] | None = None
) -> list[str]:
    """Parameter paths for `targets`, in model order.

    A target is the last part of a module's path ("in_proj": its weight), of a parameter's path
    ("A_log", or "conv1d.bias"), a whole path, or an alias ("both"). Strings may list several,
    separated by commas.

    Args:
        model: the backbone.
        targets: one or several targets.
        layers: keep only these blocks (negative counts from the end); all if None.

    Raises:
        ValueError: a target or layer that the model does not have; the message lists those it has.
    """
    names = targets.split(",") if isinstance(targets, str) else list(targets)
    names = [part for name in names for part in ALIASES.get(name.strip(), (name.strip(),))]
    paths = [path for path, _ in base_parameters(model)]
    unmatched = [name for name in names if not any(matches(path, name) for path in paths)]
    if unmatched or not names:
        known = available_targets(paths)
        wrong = ", ".join(map(repr, unmatched)) or "an empty list"
        hint = suggest(unmatched[0], known) if unmatched else ""
        raise ValueError(f"unknown target {wrong}.{hint} Targets of this model: {', '.join(known)}")
    chosen = [path for path in paths if any(matches(path, name) for name in names)]
    return chosen if layers is None else _in_layers(chosen, layers)


def available_targets(paths: Sequence[str]) -> list[str]:
    """Every short name that `resolve_targets` understands for these parameter paths."""
    short = list(ALIASES)
    for path in paths:
        parts = path.split(".")
        name = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else ".".join(parts[-2:])
        if parts[-1] not in ("weight", "bias"):
            name = parts[-1]
        if name not in short:
            short.append(name)
    return short


def block_index(path: str) -> int | None:
    """Index of the block a parameter belongs to: the first number in its path."""
    match = _INDEX.search(path)
    return int(match.group(1)) if match else None


def matches(path: str, name: str) -> bool:
    """Whether the target `name` means the parameter at `path`."""
    return any(path == full or path.endswith("." + full) for full in (name, f"{name}.weight"))


def _in_layers(paths: list[str], layers: Sequence[int]) -> list[str]:
    indices = {index for path in paths if (index := block_index(path)) is not None}
    depth = max(indices) + 1 if indices else 0
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not layers:
        raise ValueError(
            f"layers {list(layers)}: the blocks with such targets are 0 to {depth - 1} (or -{depth} to -1)"
        )
    wanted = {layer % depth for layer in layers}
    return [path for path in paths if block_index(path) in wanted]
