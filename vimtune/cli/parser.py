"""The parser of command lines: strict, with one-line errors, and what several commands have in common."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vimtune import __version__, parsers
from vimtune.plugins import import_package
from vimtune.text import quote, shorten, suggest

SHARED_FLAGS = ("traceback", "packages")
"""What `add_common` and `add_import` add: `vimtune.cli.main` and `import_packages` read it."""

_MAX_OWNERS = 4
"""Commands that are named where a flag belongs to others than the one that was given."""


class CommandParser(argparse.ArgumentParser):
    """Full flag names only, one-line errors, and a suggestion for a misspelt flag or command."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.left_out: dict[str, str] = {}
        """Keys that other commands have flags for, and why this one has none."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line with `message`.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{shorten(message, 400)}. See {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        """Print the help; unlike argparse's own, this one fails where it cannot write."""
        print(self.format_help(), end="", file=file)

    def unknown_arguments(self, arguments: Sequence[str]) -> list[str]:
        """One line for each argument that no option of this parser takes."""
        flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
        lines = [f"unknown flag {shorten(flag)}{self._hint_of_flag(flag)}" for flag in flags]
        # What follows an unknown flag is its value; alone it is a surplus argument.
        return lines or [
            f"unexpected argument {quote(argument)}{self._hint(argument)}." for argument in arguments
        ]

    def _hint(self, argument: str) -> str:
        """What was probably meant by an argument without a flag, where commands like this one take a run."""
        if self.has("--adapter"):
            return f": an adapter or a run is given as --adapter {shorten(argument)}"
        return ""

    def _hint_of_flag(self, flag: str) -> str:
        """Why this command does not have a flag, or which ones do, and what was probably meant by it."""
        if flag == "--data-dir" and any(action.dest == "inputs" for action in self._actions):
            return f". Images and folders are given without a flag: {self.prog} FOLDER"
        key = flag.lstrip("-").replace("-", "_")
        reason = self.left_out.get(key) or self.left_out.get(key.removeprefix("no_"))
        if reason:
            return f": {reason}."
        owners = _owners(flag)
        # The dashes, which all flags share, are no likeness. A flag that others have is hardly misspelt.
        names = [option.lstrip("-") for option in self._option_string_actions]
        similar = suggest(flag.lstrip("-"), names, "--", likeness=0.7 if owners else 0.5)
        return f".{owners}{similar}"

    def has(self, flag: str) -> bool:
        """Whether a flag such as "--lr" is one of this command."""
        return flag in self._option_string_actions

    def parse_leniently(self, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Parse a command line of which something may be left over.

        Returns:
            The values of its own flags by name, without those that every command has; and one line for each
            argument that is left over.
        """
        namespace, unknown = self.parse_known_args(arguments)
        values = {name: value for name, value in vars(namespace).items() if name not in SHARED_FLAGS}
        return values, self.unknown_arguments(unknown)

    def parse_strictly(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The values of a command line of which nothing may be left over; see `parse_leniently`.

        Raises:
            ValueError: the command line is not one of this parser.
        """
        values, problems = self.parse_leniently(arguments)
        if problems:
            raise ValueError("; ".join(problems) + f" See {self.prog} --help")
        return values


def _owners(flag: str) -> str:
    """A sentence that names the commands which have a flag; empty if none has."""
    from vimtune.cli import COMMANDS  # They import this module.

    prog = "vimtune"
    names = [
        name for name, (_, command) in COMMANDS.items() if command.build_parser(f"{prog} {name}").has(flag)
    ]
    if not names:
        return ""
    shown = names if len(names) <= _MAX_OWNERS else [*names[:_MAX_OWNERS], "others"]
    return f" It belongs to {prog} {' and '.join(', '.join(shown).rsplit(', ', 1))}."


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help in the width of the terminal, with "--[no-]flag" for flags that are on or off."""

    def __init__(self, prog: str) -> None:
        # argparse needs room for one word beside the flags, and nothing wraps well in less.
        width = max(min(shutil.get_terminal_size().columns, 120) - 2, 48)
        super().__init__(prog, max_help_position=28, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        return super()._format_action_invocation(action)


def build_key_parser(
    prog: str, *, usage: str, description: str, epilog: str
) -> tuple[CommandParser, argparse._ArgumentGroup]:
    """The parser of a command that has a flag for every key of a file, and its group "general".

    What is not given on the command line is missing in the result, so that the file or the default decides.

    Args:
        prog: the command as users type it.
        usage: what stands in one line above the help.
        description: what the command does.
        epilog: examples, in which `{prog}` is the command.
    """
    parser = CommandParser(
        prog=prog,
        usage=usage,
        description=description,
        epilog=epilog.format(prog=prog),
        argument_default=argparse.SUPPRESS,
        add_help=False,  # which would stand in a group of its own
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this help and stop")
    return parser, general


def add_common(parser: argparse._ActionsContainer) -> None:
    """Add the flags that every command has."""
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    parser.add_argument(
        "--version", action="version", version=f"vimtune {__version__}", help="show the version and stop"
    )


def add_import(parser: argparse._ActionsContainer) -> None:
    """Add the flag that names packages of the user's own."""
    parser.add_argument(
        "--import",
        dest="packages",
        metavar="PACKAGE",
        action="append",
        help="import this package, or several: a,b; what it registers can be used like the rest",
    )


def import_packages(prog: str, arguments: Sequence[str]) -> None:
    """Import the packages that a command line names, before anything else of it is read.

    Raises:
        ValueError: one cannot be imported, or none is named after the flag.
    """
    parser = CommandParser(prog=prog, add_help=False)
    add_import(parser)
    given, _ = parser.parse_known_args(arguments)
    for names in given.packages or ():
        for package in names.split(","):
            import_package(package.strip())


def path(text: str) -> Path:
    """A path that was given as an argument, with `~` replaced. Whether anything is there is not asked."""
    try:
        return Path(parsers.path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quote(text)}: {error}") from error


def whole_number(name: str, value: str | int) -> int:
    """The number that the flag of `name` gives.

    Raises:
        ValueError: no whole number from 1 on.
    """
    try:
        return int(parsers.integer(1)(value))
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} {quote(str(value))}: {error}") from None


BASE = ("checkpoint", "model", "tokenizer")
"""Flags that say where the base weights of an adapter are now; `add_model_options` adds them."""


def add_new_folder(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the folder which a command makes."""
    parser.add_argument(
        "--output", "-o", dest="folder", metavar="DIR", type=path, required=True, help="a new folder"
    )


def add_output_dir(parser: argparse._ActionsContainer, help: str) -> None:
    """Add the flag that names the folder in which a command has several runs."""
    parser.add_argument("--output-dir", "-o", metavar="DIR", type=path, help=help)


def add_model_options(
    parser: argparse.ArgumentParser, model: str = "where the language model is, if not in its old place"
) -> None:
    """Add the flags of the commands that build a model from an adapter file, with `model` as what the help
    says of --model."""
    parser.add_argument("--model", metavar="X", help=model)
    parser.add_argument("--tokenizer", metavar="X", help="where its tokenizer is")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=path,
        help="base weights; default: those the adapter was trained on",
    )
    parser.add_argument("--device", metavar="X", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--backend", metavar="X", default="auto", help="selective scan backend [auto]")
    parser.add_argument(
        "--force", action="store_true", help="use the adapter although base weights or tokenizer are others"
    )
