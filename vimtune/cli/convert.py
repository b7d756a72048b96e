"""The command `convert`: an adapter as it is passed on, in one of several formats."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    add_model_options,
    add_new_folder,
    import_packages,
    path,
)
from vimtune.exchange.formats import FORMATS

EXAMPLES = """\
examples:
  {prog} runs/my-run -o my-lora --to peft
  {prog} my-lora --model vim_tiny_patch16_224 --classes names.txt -o flowers
  {prog} my-texts --task text --model state-spaces/mamba-130m-hf -o texts"""
"""What stands below the options in the help; `{prog}` is the command."""


def add_format(parser: CommandParser) -> None:
    """Add the flags that name a format and what its card says of the license."""
    shown = "; ".join(f"{name}: {form.summary}" for name, form in FORMATS.items())
    parser.add_argument("--to", choices=list(FORMATS), default="vimtune", help=f"{shown} [vimtune]")
    parser.add_argument(
        "--license", metavar="X", help="license that the card names, as the hub writes it: apache-2.0"
    )


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Write an adapter as it is passed on: its files in a format that others read, a card.\n"
        "Nothing in them names a folder of this computer.",
        epilog=EXAMPLES.format(prog=prog),
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", type=path, help="adapter file, run folder, or folder of HF peft"
    )
    add_new_folder(parser)
    add_format(parser)
    parser.add_argument(
        "--task", metavar="X", help="of a folder of HF peft: its task, such as text [classification]"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=path,
        help="of a folder of HF peft: names of classes, one a line",
    )
    add_model_options(
        parser, model="of a folder of HF peft: its model; else where the language model is, if it was moved"
    )
    add_import(parser)
    add_common(parser)
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    options = build_parser(prog).parse_strictly(arguments)

    from vimtune.exchange.hub import run_convert

    return run_convert(**options)
