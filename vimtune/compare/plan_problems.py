"""What is wrong with a plan whose keys are right by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vimtune.compare.plan_keys import parse_rate, parse_rates
from vimtune.data.datasets import DATASETS
from vimtune.methods import METHODS
from vimtune.recipe import Recipe, RecipeError, path_problems
from vimtune.tasks import TASKS
from vimtune.text import quote, suggest

if TYPE_CHECKING:
    from vimtune.compare.plan import Plan


def problems_of(plan: Plan, check_paths: bool) -> list[str]:
    """A line for each problem: of names, of the grid of runs, and of their recipes where the grid is right.

    Args:
        plan: what is compared.
        check_paths: whether data and weights have to be there.
    """
    names, grid = [*_name_problems(plan)], [*_grid_problems(plan)]
    return [*names, *(grid or _recipe_problems(plan, check_paths))]


def _name_problems(plan: Plan) -> Iterator[str]:
    """Methods and data sets whose name says nothing while their keys do not either."""
    for name, entry in plan.methods.items():
        if "peft" not in entry:
            yield f"methods: {quote(name)} is no method, and has no key peft.{suggest(name, METHODS)}"
    if (reference := plan.options.reference) is not None and reference not in plan.methods:
        yield f"reference = {quote(reference)} is none of the methods.{suggest(reference, plan.methods)}"
    if "dataset" in plan.base or "task" in plan.base:
        return
    for name, entry in plan.data.items():
        if "dataset" not in entry and "task" not in entry:
            hint = suggest(name, [*DATASETS, *TASKS])
            yield f"data: {quote(name)} is no data set and no task, and has no key dataset or task.{hint}"


def _grid_problems(plan: Plan) -> Iterator[str]:
    """What the lists of seeds, learning rates and devices demand of each other and of other keys."""
    seeds, devices = plan.options.seeds, plan.options.devices or []
    for seed in plan.lr_seeds:
        if seed not in seeds:
            yield f"lr_seeds: {seed} is not among the seeds {', '.join(map(str, seeds))}"
    if len({device.partition(":")[0] for device in devices}) > 1:
        yield f"devices = {quote(devices)}: expected devices of one kind, so that all runs compare"
    places = {"": {"lrs": plan.options.lrs, **plan.base}}
    for kind, entries in (("methods", plan.methods), ("data", plan.data)):
        places |= {f"{kind}: {name}: ": entry for name, entry in entries.items()}
    for where, entry in places.items():
        yield from _rate_problems(where, entry)
        if plan.options.data_seeds is not None and "data_seed" in entry:
            yield f"{where}data_seed = {quote(entry['data_seed'])}: set by the key data_seeds"


def _recipe_problems(plan: Plan, check_paths: bool) -> Iterator[str]:
    """What is wrong with the recipes of the runs; what several of them share is said once."""
    found: dict[str, list[tuple[str, str]]] = {}
    for pair in plan.pairs:
        for problem in dict.fromkeys(_problems_of_pair(plan, *pair, check_paths)):
            found.setdefault(problem, []).append(pair)
    for problem, pairs in found.items():
        yield f"{_whose(plan, pairs)}{problem}"


def _problems_of_pair(plan: Plan, method: str, data: str, check_paths: bool) -> Iterator[str]:
    """What is wrong with the recipes of a method on a data set."""
    rates = plan.rates(method, data)
    for lr in rates:
        values = plan.recipe_values(plan.cells(method, data, lr)[0])
        try:
            recipe = Recipe.from_values(values)
        except RecipeError as error:
            yield from error.problems
            continue
        if check_paths:
            yield from path_problems(values)
        if len(rates) > 1 and recipe.data.selection_split == "test":
            yield (
                "the test split would choose the learning rate (train_split, eval_split): give one "
                "learning rate, or leave the validation split out of training"
            )


def _whose(plan: Plan, pairs: Iterable[tuple[str, str]]) -> str:
    """Before the problem of some pairs of a method and a data set: which they are."""
    pairs = list(pairs)
    methods, data = dict.fromkeys(pair[0] for pair in pairs), dict.fromkeys(pair[1] for pair in pairs)
    if len(pairs) == len(plan.pairs):
        return ""
    if len(pairs) == len(methods) * len(plan.data):
        return f"methods: {', '.join(methods)}: "
    if len(pairs) == len(data) * len(plan.methods):
        return f"data: {', '.join(data)}: "
    return f"{', '.join(f'{method} on {name}' for method, name in pairs)}: "


def _rate_problems(where: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the learning rates that one place of a plan gives."""
    given = {key: values[key] for key in ("lr", "lrs") if values.get(key) is not None}
    for key, value in given.items():
        try:
            parse_rates(value) if key == "lrs" else parse_rate(value)
        except ValueError as error:
            yield f"{where}{key} = {quote(value)}: {error}"
    if len(given) == 2:
        yield f"{where}lr and lrs are given: lr is one learning rate, lrs are several to choose from"
