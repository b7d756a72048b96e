"""The command `predict`: classes of images and texts, choices and completions, with an adapter file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vimtune.cli.parser import (
    BASE,
    CommandParser,
    add_common,
    add_import,
    add_model_options,
    import_packages,
    path,
)
from vimtune.cli.train import add_recipe_flags
from vimtune.fields import Option, options_of
from vimtune.tasks import TASKS, PredictOptions

EXAMPLES = """\
examples:
  {prog} photo.jpg --adapter runs/my-run
  {prog} my/images --adapter runs/my-run -o classes.csv
  {prog} "a text" more.jsonl --adapter runs/my-texts

An adapter of texts takes texts, files (.jsonl, .csv, .tsv) and - for standard input, where each line is a
text; one of questions with choices takes the lines of its data set, of which the answer may be left out."""
"""What stands below the options in the help; `{prog}` is the command."""


def _groups() -> dict[str, dict[str, Option]]:
    """The options of the answers of every task, by the title of their group."""
    classes: list[type[PredictOptions]] = [
        PredictOptions,
        *(task.predict_options for _, task in TASKS.items()),
    ]
    return {options.title: options_of(options) for options in classes}


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Answer for images or texts with a trained adapter file.",
        epilog=EXAMPLES.format(prog=prog),
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="images and folders of images; texts and files of texts"
    )
    parser.add_argument(
        "--adapter", metavar="FILE", type=path, required=True, help="adapter file, run folder or merged file"
    )
    add_model_options(parser)
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        type=path,
        action="append",
        default=[],
        help="also write .csv or .json",
    )
    add_import(parser)
    add_common(parser)
    parser.argument_default = argparse.SUPPRESS
    add_recipe_flags(parser, _groups())
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    options = build_parser(prog).parse_strictly(arguments)
    names = {name for items in _groups().values() for name in items}

    from vimtune.commands.predict import run_predict

    return run_predict(
        inputs=options["inputs"],
        adapter=options["adapter"],
        options={name: options[name] for name in names & options.keys()},
        outputs=options["output"],
        base={name: options[name] for name in BASE},
        device=options["device"],
        backend=options["backend"],
        force=options["force"],
    )
