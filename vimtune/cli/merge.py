"""The command `merge`: fold an adapter into its base weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    add_model_options,
    import_packages,
    path,
)
from vimtune.tasks.merging import Precision


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Fold an adapter into its base weights: plain weights without any adapter left.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=path, help="adapter file or run folder")
    parser.add_argument(
        "--output",
        "-o",
        metavar="PATH",
        type=path,
        required=True,
        help="what is written: a .safetensors file, or for a language model a folder",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="type of the weights that are written: fp32, fp16 (half the size), bf16 [fp32]",
    )
    add_model_options(parser)
    add_import(parser)
    add_common(parser)
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    options = build_parser(prog).parse_strictly(arguments)

    from vimtune.commands.merge import run_merge

    return run_merge(**options)
