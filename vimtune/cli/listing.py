"""What `--list` shows: everything that is registered, by kind."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from vimtune.data.datasets import dataset_options, list_datasets
from vimtune.fields import options_of
from vimtune.methods import METHODS
from vimtune.tasks import TASKS

Entry = tuple[str, Mapping[str, object]]
"""Summary of a thing, and its options with their defaults."""


def listing(width: int) -> str:
    """Models, methods, data sets and tasks with their options, as text of `width` columns."""
    models = {task.backbone_options.models_title: task.backbone_options for _, task in TASKS.items()}
    tables: dict[str, Mapping[str, Entry]] = {
        **{
            f"{title} (--model)": {name: (summary, {}) for name, summary in backbone.known_models().items()}
            for title, backbone in models.items()
        },
        "Methods (--peft)": {name: (method.summary, _defaults(method)) for name, method in METHODS.items()},
        "Data sets (--dataset)": {
            name: (summary, dataset_options(name)) for name, summary in list_datasets().items()
        },
        "Tasks (--task)": {name: (task.summary, _defaults(task)) for name, task in TASKS.items()},
    }
    return "\n\n".join("\n".join(_table(title, entries, width)) for title, entries in tables.items())


def _defaults(cls: type) -> dict[str, object]:
    return {name: option.default for name, option in options_of(cls).items()}


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
