"""The command `pull`: an adapter or a merged model from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.parser import CommandParser, add_common, add_new_folder
from vimtune.exchange.formats import FORMATS


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Download an adapter or a merged model from the Hugging Face hub.\n"
        "With HF_HUB_OFFLINE what was downloaded before is used.",
    )
    parser.add_argument("repository", metavar="USER/NAME", help="where it is")
    add_new_folder(parser)
    parser.add_argument("--revision", metavar="X", help="a branch, tag or commit")
    parser.add_argument("--to", choices=list(FORMATS), help="the files of this format alone")
    add_common(parser)
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = build_parser(prog).parse_strictly(arguments)

    from vimtune.exchange.hub import run_pull

    return run_pull(**options)
