"""The commands, `vimtune train | compare | search | evaluate | ...`, and `train_vim.py`.

Each command is a file beside this one. Only what it needs is imported, when it runs: `--help` and `--list`
answer without torch. How a command may end is said in `vimtune.exits`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from vimtune import __version__
from vimtune.cli import (
    analyze,
    combine,
    compare,
    convert,
    doctor,
    embed,
    evaluate,
    export,
    merge,
    predict,
    pull,
    push,
    search,
    train,
)
from vimtune.cli.parser import CommandParser
from vimtune.exits import EXIT_CODES, prepare_streams, run_guarded
from vimtune.machine import spin_briefly
from vimtune.text import quote, suggest


class Command(Protocol):
    """What the module of a command offers."""

    def build_parser(self, prog: str) -> CommandParser:
        """The parser of the command, which users type as `prog`."""

    def run(self, prog: str, arguments: Sequence[str]) -> int:
        """Run the command; returns its exit code."""


COMMANDS: dict[str, tuple[str, Command]] = {
    "train": ("fine-tune a model (--list shows models, methods and data sets)", train),
    "compare": ("methods, data sets and seeds side by side, or finished runs", compare),
    "search": ("find methods, places and sizes that score best on validation data", search),
    "evaluate": ("score a model on the data of a task, with an adapter or without", evaluate),
    "analyze": ("what training has changed: weights, features, scans, cost", analyze),
    "predict": ("classes, choices and completions with an adapter file", predict),
    "embed": ("images as vectors, and their nearest neighbours", embed),
    "combine": ("average, add or subtract adapters", combine),
    "merge": ("fold an adapter into a plain checkpoint, and prove it", merge),
    "export": ("write a model for onnxruntime and other programs", export),
    "convert": ("write an adapter as others read it: HF peft, timm, transformers", convert),
    "push": ("upload an adapter or a merged model to the Hugging Face hub", push),
    "pull": ("download one from there", pull),
    "doctor": ("check this machine and every scan backend", doctor),
}
"""The commands by name: the line that `--help` shows, and their modules."""


def _overview() -> str:
    lines = ["usage: vimtune COMMAND [options]", "", "Transfer learning for Vision Mamba.", "", "commands:"]
    lines += [f"  {name:<9} {summary}" for name, (summary, _) in COMMANDS.items()]
    lines += ["", "vimtune COMMAND --help shows the options of a command.", "", "exit codes:"]
    lines += [f"  {code:<9} {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines)


def _dispatch(arguments: Sequence[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(f"vimtune {__version__}")
    elif "--list" in arguments and command not in COMMANDS:
        return train.run("vimtune train", arguments)
    elif command in COMMANDS:
        return COMMANDS[command][1].run(f"vimtune {command}", rest)
    else:
        raise ValueError(f"unknown command {quote(command)}.{suggest(command, COMMANDS)} See vimtune --help")
    return 0


def _run(action: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    prepare_streams()
    spin_briefly()
    return run_guarded(lambda: action(arguments), show_traceback="--traceback" in arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """`vimtune COMMAND ...`; returns the exit code."""
    return _run(_dispatch, arguments)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`python train_vim.py ...`; returns the exit code."""
    return _run(lambda given: train.run("python train_vim.py", given), arguments)
