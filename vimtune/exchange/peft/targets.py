"""The setting `target_modules`, by which HF peft knows the modules of an adapter: stating it, and comparing
it with the tensors of a file.

It is a list of paths, or of what they end with behind a dot; or a text, which is a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from vimtune.exchange.peft.form import PeftConfig
from vimtune.text import quote


def state_targets(model: nn.Module, paths: Sequence[str]) -> list[str] | str:
    """The shortest form in which HF peft finds these modules and no others: the last parts of their paths,
    the paths, or a regular expression."""
    everything = [path for path, _ in model.named_modules()]
    last = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    for ends in (last, list(paths)):
        if sorted(path for path in everything if not _ends(path).isdisjoint(ends)) == sorted(paths):
            return ends
    return "|".join(map(re.escape, paths))


def compare_targets(model: nn.Module, config: PeftConfig, paths: Collection[str]) -> None:
    """Compare the modules for which a file has tensors with those that its settings name.

    A name that no module of the model has is no contradiction: HF peft passes over it, too.

    Args:
        model: the base model.
        config: the settings.
        paths: paths of the modules for which there are tensors.

    Raises:
        ValueError: tensors for a module that is not named, or none for a name.
    """
    named = config.target_modules
    if isinstance(named, str):
        # It is "all-linear", which names no module, or a regular expression. The file may come from anybody,
        # and such an expression may take for ever: it is never run.
        return
    for path in paths:
        if _ends(path).isdisjoint(named):
            raise ValueError(
                f"it has tensors for {quote(path)}, and its target_modules {quote(named)} do not name that: "
                "expected settings and tensors of one adapter"
            )
    if config.exclude_modules or config.layers_to_transform not in (None, []):
        return  # Which modules these take away again is not worked out here.
    saved = [
        f".{name}." for name in config.modules_to_save or ()
    ]  # HF peft trains these and all in them whole.
    meant = {
        end
        for path, _ in model.named_modules()
        if not any(name in f".{path}." for name in saved)
        for end in _ends(path)
    }
    meant -= {end for path in paths for end in _ends(path)}
    for name in named:
        if name in meant:
            raise ValueError(
                f"its target_modules name {quote(name)}, and it has no tensors for that: expected settings "
                "and tensors of one adapter"
            )


def _ends(path: str) -> set[str]:
    """A path and what follows each of its dots: the names by which HF peft finds the module."""
    parts = path.split(".")
    return {".".join(parts[first:]) for first in range(len(parts))}
