"""The commands: `vimtune train | predict | merge | doctor`, and `train_vim.py`.

Only what a command needs is imported, when it runs: `--help` and `--list` answer without torch.
How a command may end is said in `exits.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vimtune import __version__, catalog, parsers
from vimtune.exits import EXIT_CODES, prepare_streams, run_guarded
from vimtune.recipe import GROUPS, Recipe, RecipeError, load_recipe
from vimtune.text import quote, shorten
from vimtune.utils import suggest

TRAIN_DESCRIPTION = """\
Fine-tune a Vision Mamba. Without arguments: a few minutes on embedded data.
Every flag below is also a key of the YAML file; a flag wins over the file."""

TRAIN_EXAMPLES = """\
examples:
  {prog} --dataset flowers --peft prodial
  {prog} --dataset folder --data-dir my/images --peft lora --rank 8
  {prog} --config my-recipe.yaml --epochs 50
  {prog} --resume runs/my-run

The repository's folder configs/ has recipes for --config."""


class _Parser(argparse.ArgumentParser):
    """Full flag names only, one-line errors, and a suggestion for a misspelt flag or command."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{shorten(message, 400)}. See {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own goes on when it cannot write

    def unknown_arguments(self, arguments: Sequence[str]) -> list[str]:
        """One line for each argument that no option of this parser takes."""
        options = [option for action in self._actions for option in action.option_strings]
        flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
        lines = [f"unknown flag {shorten(flag)}.{suggest(flag, options)}" for flag in flags]
        # What follows an unknown flag is its value; alone it is a surplus argument.
        return lines or [f"unexpected argument {quote(argument)}" for argument in arguments]

    def parse_strictly(self, arguments: Sequence[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            raise ValueError("; ".join(self.unknown_arguments(unknown)) + f" See {self.prog} --help")
        return namespace


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        # argparse needs room for one word beside the flags, and nothing wraps well in less.
        width = max(min(shutil.get_terminal_size().columns, 120) - 2, 48)
        super().__init__(prog, max_help_position=28, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        return super()._format_action_invocation(action)


def _add_common(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    parser.add_argument(
        "--version", action="version", version=f"vimtune {__version__}", help="show the version and stop"
    )


# ---------------------------------------------------------------------------------------------
# train


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help_line(field: dataclasses.Field[Any]) -> str:
    """The field's help and, in brackets, its default."""
    default = getattr(Recipe(), field.name)
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, list):
        shown = ",".join(f"{value:g}" for value in default)
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    bracket = "" if default is None or default == {} else f" [{shown}]"
    return (field.metadata["help"] + bracket).replace("%", "%%")


def build_train_parser(prog: str) -> _Parser:
    """Parser whose flags are the recipe's fields, grouped as there; all values stay text."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config FILE [--variant X]] [--KEY VALUE ...]",
        description=TRAIN_DESCRIPTION,
        epilog=TRAIN_EXAMPLES.format(prog=prog),
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this help and stop")
    general.add_argument("--config", metavar="FILE", help="recipe in YAML")
    general.add_argument("--variant", metavar="X", help="which recipe of a file that is a grid of them")
    general.add_argument("--list", action="store_true", help="list models, methods, data sets, and stop")
    _add_common(general)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in dataclasses.fields(Recipe):
        boolean = isinstance(field.default, bool)
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if boolean else {"metavar": "X"}
        group = groups[field.metadata["group"]]
        group.add_argument(_flag(field.name), dest=field.name, help=_help_line(field), **kind)
    return parser


def _read_recipe(parser: _Parser, arguments: Sequence[str]) -> Recipe | None:
    """The recipe that the command line asks for, or None when `--list` was given."""
    namespace, surplus = parser.parse_known_args(arguments)
    given = vars(namespace)
    if given.pop("list", False):
        return None
    given.pop("traceback", None)
    config, variant = given.pop("config", None), given.pop("variant", None)
    problems = parser.unknown_arguments(surplus)
    try:
        recipe = load_recipe(config, given, variant)
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems]) from error
    if problems:
        raise RecipeError(problems)
    return recipe


def _train(prog: str, arguments: Sequence[str]) -> int:
    recipe = _read_recipe(build_train_parser(prog), arguments)
    if recipe is None:
        print(listing(shutil.get_terminal_size((100, 24)).columns))
        return 0
    from vimtune.train import train

    train(recipe)
    return 0


def listing(width: int) -> str:
    """Models, methods with their fields and defaults, and data sets, as text of `width` columns."""
    lines: list[str] = []
    tables = {
        "Models (--model)": catalog.MODELS,
        "Methods (--peft)": catalog.METHODS,
        "Data sets (--dataset)": catalog.DATASETS,
    }
    for title, table in tables.items():
        lines += ["", title] if lines else [title]
        column = max(map(len, table)) + 4
        for name, description in table.items():
            lines += _hanging(f"  {name}", description, column, width)
            if table is catalog.METHODS:
                fields = [f"{key}={default}" for key, (_, default, _) in catalog.METHOD_FIELDS[name].items()]
                lines += _hanging("", ", ".join(fields), column, width) if fields else []
    return "\n".join(lines)


def _hanging(label: str, text: str, column: int, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, max(width - column, 30)) or [""]
    return [f"{label:<{column}}{wrapped[0]}", *(" " * column + line for line in wrapped[1:])]


# ---------------------------------------------------------------------------------------------
# predict, merge, doctor


def _path(text: str) -> Path:
    try:
        return Path(parsers.path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quote(text)}: {error}") from error


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=_path,
        help="base weights; default: those the adapter was trained on",
    )
    parser.add_argument("--device", metavar="X", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--backend", metavar="X", default="auto", help="selective scan backend [auto]")
    parser.add_argument(
        "--force", action="store_true", help="use the adapter although the base weights are others"
    )


def _predict(prog: str, arguments: Sequence[str]) -> int:
    parser = _Parser(prog=prog, description="Classify images with a trained adapter file.")
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", type=_path, help="images, or folders of images")
    parser.add_argument(
        "--adapter", metavar="FILE", type=_path, required=True, help="adapter file, run folder or merged file"
    )
    _add_model_options(parser)
    parser.add_argument("--top-k", metavar="N", type=int, default=3, help="classes per image [3]")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="images at a time [32]")
    parser.add_argument(
        "--on-corrupt",
        metavar="X",
        default="report",
        help="unreadable images: report (the others are classified, exit code 1), skip (exit code 0), "
        "error (stop at the first) [report]",
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        type=_path,
        action="append",
        default=[],
        help="also write .csv or .json",
    )
    _add_common(parser)
    options = parser.parse_strictly(arguments)

    from vimtune.predict import run_predict

    return run_predict(
        inputs=options.inputs,
        adapter=options.adapter,
        checkpoint=options.checkpoint,
        outputs=options.output,
        top_k=options.top_k,
        batch_size=options.batch_size,
        on_corrupt=options.on_corrupt,
        device=options.device,
        backend=options.backend,
        force=options.force,
    )


def _merge(prog: str, arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog=prog,
        description="Fold an adapter into its base weights: one plain checkpoint without any adapter left.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=_path, help="adapter file or run folder")
    parser.add_argument(
        "--output", "-o", metavar="FILE", type=_path, required=True, help="the .safetensors file to write"
    )
    _add_model_options(parser)
    _add_common(parser)
    options = parser.parse_strictly(arguments)

    from vimtune.merging import run_merge

    return run_merge(
        adapter=options.adapter,
        output=options.output,
        checkpoint=options.checkpoint,
        device=options.device,
        backend=options.backend,
        force=options.force,
    )


def _doctor(prog: str, arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog=prog,
        description="Show what this machine offers, check every scan backend, and say what to install.",
    )
    _add_common(parser)
    parser.parse_strictly(arguments)

    from vimtune.doctor import run_doctor

    return run_doctor()


# ---------------------------------------------------------------------------------------------
# entries

COMMANDS: dict[str, tuple[str, Callable[[str, Sequence[str]], int]]] = {
    "train": ("fine-tune a model (--list shows models, methods and data sets)", _train),
    "predict": ("classify images with an adapter file", _predict),
    "merge": ("fold an adapter into a plain checkpoint, and prove it", _merge),
    "doctor": ("check this machine and every scan backend", _doctor),
}


def _overview() -> str:
    lines = ["usage: vimtune COMMAND [options]", "", "Transfer learning for Vision Mamba.", "", "commands:"]
    lines += [f"  {name:<9} {summary}" for name, (summary, _) in COMMANDS.items()]
    lines += ["", "vimtune COMMAND --help shows the options of a command.", "", "exit codes:"]
    lines += [f"  {code:<9} {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines)


def _dispatch(arguments: Sequence[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(f"vimtune {__version__}")
    elif command == "--list":
        return _train("vimtune train", arguments)
    elif command in COMMANDS:
        return COMMANDS[command][1](f"vimtune {command}", rest)
    else:
        raise ValueError(f"unknown command {quote(command)}.{suggest(command, COMMANDS)} See vimtune --help")
    return 0


def _run(action: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    prepare_streams()
    return run_guarded(lambda: action(arguments), show_traceback="--traceback" in arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """`vimtune COMMAND ...`; returns the exit code."""
    return _run(_dispatch, arguments)


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`python train_vim.py ...`; returns the exit code."""
    return _run(lambda given: _train("python train_vim.py", given), arguments)
