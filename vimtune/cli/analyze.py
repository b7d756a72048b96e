"""The command `analyze`: what training has done to a model, as one report with pictures."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.analysis.registry import ANALYSES, NUM_BATCHES, NUM_IMAGES, parse_names
from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    build_key_parser,
    import_packages,
    path,
    whole_number,
)
from vimtune.cli.train import add_recipe_flags, recipe_groups
from vimtune.recipe import keys_without_use

EXAMPLES = """\
examples:
  {prog} runs/my-run
  {prog} runs/my-run --only components,transformation -o report.html
  {prog} merged.safetensors --checkpoint base.safetensors --dataset flowers

analyses:
"""
"""What stands below the options in the help, before the table of analyses; `{prog}` is the command."""


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    table = "\n".join(f"  {name:<15} {summary}" for name, summary in ANALYSES.items())
    parser, general = build_key_parser(
        prog,
        usage=f"{prog} RUN [--only NAMES] [-o FILE] [--KEY VALUE ...]",
        description="Compare a trained model with what training found: weights, features, scans, cost. "
        "What it was trained on\nis taken from its file; flags change single values of it. Without -o the "
        "report is written beside the adapter.",
        epilog=EXAMPLES + table,
    )
    general.add_argument("trained", metavar="RUN", type=path, help="run folder, adapter file or merged file")
    general.add_argument("--only", metavar="NAMES", help="analyses to run, such as cost,similarity [all]")
    general.add_argument("--split", metavar="X", help="where images are taken from: test, val [test]")
    general.add_argument("--images", metavar="N", help=f"at most so many images [{NUM_IMAGES}]")
    general.add_argument("--batches", metavar="N", help=f"at most so many training batches [{NUM_BATCHES}]")
    general.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        type=path,
        action="append",
        help=".html (pictures) or .json (numbers)",
    )
    add_import(general)
    add_common(general)
    add_recipe_flags(parser, recipe_groups(), keys_without_use("loss"))
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    given = build_parser(prog).parse_strictly(arguments)
    own = {
        name: given.pop(name, None) for name in ("trained", "only", "split", "images", "batches", "output")
    }
    names = list(ANALYSES) if own["only"] is None else parse_names(own["only"])
    images = whole_number("images", own["images"] or NUM_IMAGES)
    batches = whole_number("batches", own["batches"] or NUM_BATCHES)

    from vimtune.analysis.command import run_analyze

    return run_analyze(
        trained=own["trained"],
        names=names,
        values=given,
        split=own["split"] or "test",
        num_images=images,
        num_batches=batches,
        outputs=own["output"] or [],
    )
