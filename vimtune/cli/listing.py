"""What `--list` shows: everything that is registered, by kind."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from vimtune.data.datasets import dataset_options, list_datasets
from vimtune.fields import options_of
from vimtune.loggers import list_loggers
from vimtune.methods import METHODS, Method
from vimtune.recipe.optimizers import list_optimizers
from vimtune.tasks import TASKS

TARGETS = {
    "in_proj, A_log, conv1d.bias": "a weight or parameter of every block",
    "x_proj, x_proj[dt|B]": "both scan directions where the model has two; [...] names rows",
    "x_proj_b, mixer.x_proj": "one direction: the reverse one, and the one that is named from above",
    "scan(), out_proj()": "calls, for methods that surround them",
    "re:(in|out)_proj": "all in whose path the regular expression is found",
    "!layers.0., !x_proj": "not these, whatever the others stand for",
}
"""What `--targets` takes; `vimtune.adapters.targets` has the whole grammar."""

Entry = tuple[str, Mapping[str, object]]
"""Summary of a thing, and its options with their defaults."""


def listing(width: int) -> str:
    """What is registered, by kind, and its options, as text of `width` columns."""
    models = {task.backbone_options.models_title: task.backbone_options for _, task in TASKS.items()}
    tables: dict[str, Mapping[str, Entry]] = {
        **{
            f"{title} (--model)": {name: (summary, {}) for name, summary in backbone.known_models().items()}
            for title, backbone in models.items()
        },
        "Methods (--peft)": {
            **{name: (method.summary, _own_defaults(method)) for name, method in METHODS.items()},
            "any of them": ("options that every method has", _defaults(Method)),
        },
        "Targets (--targets)": {target: (meaning, {}) for target, meaning in TARGETS.items()},
        "Data sets (--dataset)": {
            name: (summary, dataset_options(name)) for name, summary in list_datasets().items()
        },
        "Optimizers (--opt)": {name: (summary, {}) for name, summary in list_optimizers().items()},
        "Loggers (--logger)": {name: (summary, {}) for name, summary in list_loggers().items()},
        "Tasks (--task)": {name: (task.summary, _defaults(task)) for name, task in TASKS.items()},
    }
    return "\n\n".join("\n".join(_table(title, entries, width)) for title, entries in tables.items())


def _defaults(cls: type) -> dict[str, object]:
    return {name: option.default for name, option in options_of(cls).items()}


def _own_defaults(method: type[Method]) -> dict[str, object]:
    """The options of a method without those that it has as every method has them."""
    common = _defaults(Method).items()
    return {name: default for name, default in _defaults(method).items() if (name, default) not in common}


def _table(title: str, entries: Mapping[str, Entry], width: int) -> list[str]:
    """The lines about one kind of things."""
    lines = [title]
    column = max(map(len, entries)) + 4
    for name, (summary, options) in entries.items():
        lines += _hanging(f"  {name}", summary, column, width)
        if options:
            shown = ", ".join(f"{option}={default}" for option, default in options.items())
            lines += _hanging("", shown, column, width)
    return lines


def _hanging(label: str, text: str, column: int, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, max(width - column, 30)) or [""]
    return [f"{label:<{column}}{wrapped[0]}", *(" " * column + line for line in wrapped[1:])]
