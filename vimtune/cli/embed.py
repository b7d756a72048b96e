"""The command `embed`: images as vectors, and their nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    import_packages,
    path,
    whole_number,
)

EXAMPLES = """\
examples:
  {prog} my/images --adapter runs/my-run -o images.npz
  {prog} photo.jpg --adapter runs/my-run --among images.npz --top-k 5
  {prog} my/images --model vim_tiny_patch16_224 -o images.csv"""
"""What stands below the options in the help; `{prog}` is the command."""


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Write the features of images before the head of a model, or find the images of such a "
        "file that are\nmost like others.",
        epilog=EXAMPLES.format(prog=prog),
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", type=path, help="images and folders of images")
    parser.add_argument(
        "--adapter", metavar="FILE", type=path, help="adapter file, run folder or merged file"
    )
    parser.add_argument("--model", metavar="X", help="a model without an adapter instead (see --list)")
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=path, help="base weights; default: the model's or adapter's own"
    )
    parser.add_argument("--among", metavar="FILE", type=path, help="find neighbours in this .npz file")
    parser.add_argument("--top-k", metavar="N", default="5", help="neighbours of each image [5]")
    parser.add_argument("--batch-size", metavar="N", default="32", help="images at a time [32]")
    parser.add_argument(
        "--output",
        "-o",
        dest="outputs",
        metavar="FILE",
        type=path,
        action="append",
        default=[],
        help="vectors: .npz or .csv; neighbours: .csv or .json",
    )
    parser.add_argument("--device", metavar="X", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--backend", metavar="X", default="auto", help="selective scan backend [auto]")
    parser.add_argument(
        "--force", action="store_true", help="use the adapter although base weights are others"
    )
    add_import(parser)
    add_common(parser)
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    options = build_parser(prog).parse_strictly(arguments)
    counts = {name: whole_number(name, options[name]) for name in ("top_k", "batch_size")}

    from vimtune.commands.embed import run_embed

    return run_embed(**{**options, **counts})
