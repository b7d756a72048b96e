"""The command `doctor`: check this machine and every scan backend."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.parser import CommandParser, add_common


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Show what this machine offers, check every scan backend, and say what to install.",
    )
    add_common(parser)
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    build_parser(prog).parse_strictly(arguments)

    from vimtune.commands.doctor import run_doctor

    return run_doctor()
