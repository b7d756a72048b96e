"""Commands, names and tables of the package as it has them."""

from __future__ import annotations

import contextlib
import importlib
import io
import os

from markdown_tables import write_table

from vimtune import cli
from vimtune.cli.listing import TARGETS
from vimtune.data.datasets import dataset_options, list_datasets
from vimtune.loggers import list_loggers
from vimtune.tasks import TASKS

COLUMNS = "100"
"""How wide the help of commands is."""


def commands() -> str:
    """The help of every command, and the lists."""
    parts = []
    for name, (summary, _) in cli.COMMANDS.items():
        parts += [f"## vimtune {name}", f"{summary[0].upper()}{summary[1:]}.", _printed(name, "--help")]
    return "\n\n".join([*parts, "## vimtune --list", _printed("--list")])


def _printed(*arguments: str) -> str:
    """What a command line prints, as a block."""
    os.environ["COLUMNS"] = COLUMNS
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        cli.main(arguments)
    return f"```text\n{shown.getvalue().strip()}\n```"


def names(room: str) -> str:
    """The public names of a package, of which mkdocstrings makes sections."""
    public = importlib.import_module(room).__all__
    return "\n\n".join(f"::: {room}.{name}" for name in sorted(public, key=str.lower))


def targets() -> str:
    """What targets may be."""
    return write_table(["`--targets`", "what"], [[f"`{name}`", meaning] for name, meaning in TARGETS.items()])


def models() -> str:
    """The models of every task."""
    backbones = {task.backbone_options.models_title: task.backbone_options for _, task in TASKS.items()}
    parts = []
    for title, backbone in backbones.items():
        rows = [[f"`{name}`", summary] for name, summary in backbone.known_models().items()]
        parts += [f"### {title}", write_table(["`--model`", "what"], rows)]
    return "\n\n".join(parts)


def data_sets() -> str:
    """The data sets of images with their options."""
    rows = []
    for name, summary in list_datasets().items():
        options = ", ".join(f"`{option}={default}`" for option, default in dataset_options(name).items())
        rows.append([f"`{name}`", summary, options])
    return write_table(["`--dataset`", "what", "options (`--dataset-kwargs`)"], rows)


def loggers() -> str:
    """The loggers."""
    rows = [[f"`{name}`", summary] for name, summary in list_loggers().items()]
    return write_table(["`--logger`", "what"], rows)


def tasks() -> str:
    """The tasks."""
    rows = [[f"`{name}`", task.summary] for name, task in TASKS.items()]
    return write_table(["`--task`", "what"], rows)
