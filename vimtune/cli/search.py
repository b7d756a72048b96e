"""The command `search`: which methods, places and sizes score best on a validation split."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimtune import parsers
from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    add_output_dir,
    build_key_parser,
    import_packages,
    path,
)
from vimtune.cli.train import add_recipe_flags, recipe_groups
from vimtune.fields import options_of
from vimtune.recipe import MethodSettings
from vimtune.text import quote

if TYPE_CHECKING:
    from vimtune.search.plan import Plan

OWN_FLAGS = (
    "space",
    "trials",
    "workers",
    "search_seed",
    "prune",
    "output_dir",
    "resume",
    "config",
    "variant",
)
"""Flags of the search itself."""

EXAMPLES = """\
examples:
  {prog} --space mambapeft --dataset vtab --data-dir my/vtab-1k --train-size 1000
  {prog} --space my-space.yaml --config my-recipe.yaml --trials 50 --workers 4
  {prog} --resume runs/my-search"""
"""What stands below the options in the help; `{prog}` is the command."""


def _left_out() -> dict[str, str]:
    """The keys of recipes that trials do not share, and why."""
    of_methods = dict.fromkeys(options_of(MethodSettings), "the space says how trials adapt the model")
    of_a_run = dict.fromkeys(("output_dir", "resume", "force"), "trials go on with the data they began with")
    return {**of_methods, **of_a_run}


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser, general = build_key_parser(
        prog,
        usage=f"{prog} --space FILE [--config FILE] [--KEY VALUE ...]",
        description="Search for methods, places, sizes and hyper-parameters that score best on a validation "
        "split.\nThe test split is never opened. What is found is a recipe, best.yaml in the folder of the "
        "search.",
        epilog=EXAMPLES,
    )
    general.add_argument("--space", metavar="X", help="what is tried: a YAML file, or mambapeft (published)")
    general.add_argument("--trials", metavar="N", help="trials of each step [100]")
    general.add_argument("--workers", metavar="N", help="trials at once, each in a process of its own [1]")
    general.add_argument("--search-seed", metavar="N", help="seed of what is drawn, apart from --seed [0]")
    general.add_argument(
        "--prune",
        action=argparse.BooleanOptionalAction,
        help="end trials early that are below the median of the others [on]",
    )
    add_output_dir(general, "folder of the search [runs/search-<space>-<time>]")
    general.add_argument("--resume", metavar="X", type=path, help="go on with the search in this folder")
    general.add_argument("--config", metavar="FILE", help="recipe in YAML that all trials share")
    general.add_argument("--variant", metavar="X", help="which recipe of a file that is a grid of them")
    add_import(general)
    add_common(general)
    add_recipe_flags(parser, recipe_groups(), _left_out())
    return parser


def _number(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """The whole number of a flag.

    Raises:
        ValueError: it is none, or out of its range.
    """
    value = given.get(name, default)
    try:
        number: int = parsers.integer(low, high)(value)
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} {quote(value)}: {error}") from error
    return number


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    given = build_parser(prog).parse_strictly(arguments)
    own = {name: given.pop(name) for name in OWN_FLAGS if name in given}
    workers = _number(own, "workers", 1, 1, 1024)

    from vimtune.search.study import require_optuna

    require_optuna()
    plan, folder = _resumed(own, given) if "resume" in own else _planned(prog, own, given)
    plan.check()

    from vimtune.search.search import begin, run_search

    if "resume" not in own:
        begin(plan, folder)
    run_search(plan, folder, workers)
    return 0


def _planned(prog: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Plan, Path]:
    """The plan of a new search, and its folder.

    Args:
        prog: the command, for messages.
        own: the flags of the search itself.
        given: those of the recipe.

    Raises:
        ValueError: no space, or one that cannot be read; a recipe or a number that is wrong.
    """
    from vimtune.recipe import load_recipe
    from vimtune.search.plan import MAX_TRIALS, Plan
    from vimtune.search.reading import published_spaces, read_space_file

    if "space" not in own:
        known = ", ".join(published_spaces())
        raise ValueError(f"--space is missing: expected a YAML file or one of {known}. See {prog} --help")
    name = Path(own["space"]).stem
    plan = Plan(
        name=name,
        recipe=load_recipe(own.get("config"), given, own.get("variant")),
        values=read_space_file(own["space"]),
        trials=_number(own, "trials", 100, 1, MAX_TRIALS),
        seed=_number(own, "search_seed", 0, 0, 2**63 - 1),
        prune=own.get("prune", True),
    )
    for key, setting in plan.space.keys.items():
        if key in given and setting.times != key:  # A range of factors multiplies what is given.
            raise ValueError(
                f"--{key.replace('_', '-')} {quote(given[key])} would have no effect: the space draws {key} "
                "in every trial. Leave the flag out, or take the key out of the space"
            )
    return plan, own.get("output_dir") or Path(f"runs/search-{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _resumed(own: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Plan, Path]:
    """The plan of the search to go on with, and its folder; the arguments are those of `_planned`.

    Raises:
        ValueError: no search is there, or flags would change it.
    """
    from vimtune.search.plan import PLAN, read_plan

    for name in (*given, *own):
        if name not in ("resume", "workers"):
            raise ValueError(
                f"--resume goes on with a search as it was planned: leave out --{name.replace('_', '-')}"
            )
    folder: Path = own["resume"]
    if not (folder / PLAN).is_file():
        raise ValueError(f"--resume {quote(str(folder))} is no folder of a search: it has no {PLAN}")
    return read_plan(folder / PLAN), folder
