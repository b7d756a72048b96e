"""The command `evaluate`: scores of a model on the data of a task, with an adapter or without."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    build_key_parser,
    import_packages,
    path,
)
from vimtune.cli.train import add_recipe_flags, recipe_groups
from vimtune.fields import Option, options_of
from vimtune.recipe import keys_without_use
from vimtune.tasks import TASKS, EvaluateOptions

EXAMPLES = """\
examples:
  {prog} --task arc_easy --model state-spaces/mamba-130m-hf
  {prog} --adapter runs/my-run
  {prog} --adapter runs/my-run -o page.html --mistakes mistakes.csv
  {prog} --adapter runs/my-run --folder my/images --flip
  {prog} --adapter runs/my-run --split val -o scores.json
  {prog} --adapter merged.safetensors --dataset flowers"""
"""What stands below the options in the help; `{prog}` is the command."""


def _option_groups() -> dict[str, dict[str, Option]]:
    """The options of the evaluations of every task, by the title of their group."""
    classes: list[type[EvaluateOptions]] = [
        EvaluateOptions,
        *(task.evaluate_options for _, task in TASKS.items()),
    ]
    return {options.title: options_of(options) for options in classes}


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser, general = build_key_parser(
        prog,
        usage=f"{prog} [--adapter FILE] [--config FILE [--variant X]] [--KEY VALUE ...]",
        description="Score a model on the data of a task: scores, classes, confusions, calibration, "
        "mistakes.\nWhat an adapter was trained on is taken from its file; flags change single values of it, "
        "and\nname the data of a merged file.",
        epilog=EXAMPLES,
    )
    general.add_argument(
        "--adapter", metavar="FILE", type=path, help="adapter file, run folder or merged file"
    )
    general.add_argument("--split", metavar="X", help="what is scored: test, val [test]")
    general.add_argument(
        "--output", "-o", metavar="FILE", type=path, action="append", help="also write .html, .json or .csv"
    )
    general.add_argument("--mistakes", metavar="FILE", type=path, help="write wrong answers as .csv")
    general.add_argument("--config", metavar="FILE", help="recipe in YAML")
    general.add_argument("--variant", metavar="X", help="which recipe of a file that is a grid of them")
    add_import(general)
    add_common(general)
    add_recipe_flags(parser, {**_option_groups(), **recipe_groups()}, keys_without_use("scores"))
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    given = build_parser(prog).parse_strictly(arguments)
    names = ("adapter", "split", "output", "mistakes", "config", "variant")
    own = {name: given.pop(name, None) for name in names}

    from vimtune.commands.evaluate import run_evaluate

    return run_evaluate(
        values=given,
        config=own["config"],
        variant=own["variant"],
        adapter=own["adapter"],
        split=own["split"],
        outputs=own["output"] or [],
        mistakes=own["mistakes"],
    )
