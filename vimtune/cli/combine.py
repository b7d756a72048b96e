"""The command `combine`: averages, sums and differences of adapters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vimtune import parsers
from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    add_model_options,
    import_packages,
    path,
)
from vimtune.text import quote

HOW = ("exact", "tensors")
"""Values of `vimtune.adapters.arithmetic.How`, which imports torch."""


def weights(text: str) -> list[float]:
    """Factors such as "0.5,0.5" or "1,-1"."""
    try:
        return [float(parsers.number()(part.strip())) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quote(text)}: {error}, one for each adapter: 0.5,0.5") from error


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Average adapters of the same base weights, add or subtract what they do.",
    )
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", type=path, help="adapter files, run folders"
    )
    parser.add_argument(
        "--output", "-o", metavar="FILE", type=path, required=True, help="the .safetensors file to write"
    )
    parser.add_argument(
        "--weights",
        metavar="X,X",
        type=weights,
        help="a factor for each, also negative: --weights=1,-0.5 [average]",
    )
    parser.add_argument(
        "--how",
        choices=HOW,
        default="exact",
        help="exact: sum what they do to weights (ranks of LoRA add up); tensors: average tensors [exact]",
    )
    parser.add_argument(
        "--head", metavar="ADAPTER", type=path, help="whose head and classes it has [average]"
    )
    add_model_options(parser)
    add_import(parser)
    add_common(parser)
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    options = build_parser(prog).parse_strictly(arguments)

    from vimtune.commands.combine import run_combine

    return run_combine(**options)
