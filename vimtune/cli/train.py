"""The command `train`: every key of a recipe as a flag."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence

from vimtune.cli.listing import listing
from vimtune.cli.parser import CommandParser, add_common, add_import, build_key_parser, import_packages
from vimtune.fields import Option, options_of
from vimtune.recipe import TASK, Recipe, RecipeError, components_of, load_recipe
from vimtune.tasks import TASKS

DESCRIPTION = """\
Fine-tune a Vision Mamba. Without any flag, ProDiaL is compared with a
linear probe on embedded data, in two minutes. Every flag below is also
a key of the YAML file; a flag wins over the file."""
"""What `--help` says above the options."""

EXAMPLES = """\
examples:
  {prog} --dataset flowers --peft prodial
  {prog} --dataset folder --data-dir my/images --peft lora --rank 8
  {prog} --config my-recipe.yaml --epochs 50
  {prog} --resume runs/my-run

The repository's folder configs/ has recipes for --config."""
"""What `--help` says below the options."""


SHORT_FLAGS = {"output_dir": ("-o",)}
"""Short flags of keys, as other commands have them for what they write."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help_line(item: Option) -> str:
    """The option's help and, in brackets, its default."""
    default = item.default
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, list):
        shown = ",".join(map(str, default))
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    bracket = "" if default is None or default == {} else f" [{shown}]"
    return (item.help + bracket).replace("%", "%%")


def recipe_groups() -> dict[str, dict[str, Option]]:
    """The keys of recipes by the title under which `--help` shows them, with those of every task."""
    groups: dict[str, dict[str, Option]] = {}
    owners: dict[str, list[str]] = {}  # names of tasks by their options, which several have in common
    for name, task in TASKS.items():
        for attribute, component in components_of(task).items():
            groups.setdefault(getattr(component, "title", attribute), options_of(component))
        owners.setdefault(repr(options_of(task)), []).append(name)
    tasks = {f"task {', '.join(names)}": options_of(TASKS.get(names[0])) for names in owners.values()}
    return {**groups, "task": {TASK.name: TASK}, **tasks}


def _add_flag(group: argparse._ArgumentGroup, name: str, declared: Mapping[str, Option]) -> None:
    """Add the flag of a key.

    Args:
        group: where `--help` shows it.
        name: the key.
        declared: the key by the title of each group that has it. Tasks may declare the same name in different
            ways: the flag then takes what any of them takes, says so, and the chosen task reads the value.
    """
    flag = _flag(name)
    lines = {title: _help_line(item) for title, item in declared.items()}
    if len(set(lines.values())) == 1:
        help = next(iter(lines.values()))
    else:
        help = "; ".join(f"{title}: {line}" for title, line in lines.items())
    switches = [isinstance(item.default, bool) for item in declared.values()]
    if all(switches):
        group.add_argument(flag, dest=name, help=help, action=argparse.BooleanOptionalAction)
    elif any(switches) or any(item.switch for item in declared.values()):
        # The flag alone says something, and it may have a value: in all tasks, or in some of them.
        group.add_argument(flag, dest=name, help=help, metavar="X", nargs="?", const="true")
        group.add_argument(
            _flag(f"no_{name}"), dest=name, help=f"{flag} false", action="store_const", const="false"
        )
    else:
        group.add_argument(flag, *SHORT_FLAGS.get(name, ()), dest=name, help=help, metavar="X")


def build_parser(prog: str) -> CommandParser:
    """Parser whose flags are the recipe's fields, grouped as there; all values stay text."""
    parser, general = build_key_parser(
        prog,
        usage=f"{prog} [--config FILE [--variant X]] [--KEY VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    general.add_argument("--config", metavar="FILE", help="recipe in YAML")
    general.add_argument("--variant", metavar="X", help="which recipe of a file that is a grid of them")
    general.add_argument(
        "--list", action="store_true", help="list models, methods, data sets, tasks, and stop"
    )
    add_import(general)
    add_common(general)
    add_recipe_flags(parser, recipe_groups())
    return parser


def add_recipe_flags(
    parser: CommandParser,
    groups: Mapping[str, Mapping[str, Option]],
    left_out: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for every key of `groups`, which are keys of recipes by the title of their group.

    Keys of `left_out` get none, and their texts are what the parser says to whoever gives one.
    """
    parser.left_out = dict(left_out or {})
    added: set[str] = set(parser.left_out)
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for name in options:
            if name not in added:
                declared = {owner: items[name] for owner, items in groups.items() if name in items}
                _add_flag(group, name, declared)
                added.add(name)


def _read_recipe(parser: CommandParser, arguments: Sequence[str]) -> Recipe | None:
    """The recipe that the command line asks for, or None when `--list` was given."""
    given, problems = parser.parse_leniently(arguments)
    if given.pop("list", False):
        return None
    config, variant = given.pop("config", None), given.pop("variant", None)
    try:
        recipe = load_recipe(config, given, variant)
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems]) from error
    if problems:
        raise RecipeError(problems)
    return recipe


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if not arguments:
        from vimtune.compare.quickstart import run_quickstart

        return run_quickstart()
    import_packages(prog, arguments)
    recipe = _read_recipe(build_parser(prog), arguments)
    if recipe is None:
        print(listing(shutil.get_terminal_size((100, 24)).columns))
        return 0
    from vimtune.training import train

    train(recipe)
    return 0
