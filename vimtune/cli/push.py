"""The command `push`: an adapter, or a model that is merged from it, to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.convert import add_format
from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    add_model_options,
    import_packages,
    path,
)


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Upload an adapter and its card to the Hugging Face hub, as vimtune convert writes them.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=path, help="adapter file or run folder")
    parser.add_argument("repository", metavar="USER/NAME", help="where it goes; made where there is none")
    add_format(parser)
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--message", metavar="TEXT", help="title of the commit")
    add_model_options(parser)
    add_import(parser)
    add_common(parser)
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    options = build_parser(prog).parse_strictly(arguments)

    from vimtune.exchange.hub import run_push

    return run_push(**options)
