"""Recipes in files: what a run begins with, and whether the paths that it names can be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vimtune import parsers
from vimtune.fields import options_of
from vimtune.recipe.components import MethodSettings
from vimtune.recipe.config_files import read_config
from vimtune.recipe.earlier import complete_stored
from vimtune.recipe.options import changed_options, keeping, options_over
from vimtune.recipe.paths import path_problems
from vimtune.recipe.recipe import TASK, Recipe, RecipeError
from vimtune.strict_yaml import read_yaml
from vimtune.tasks import TASKS
from vimtune.text import quote


def load_recipe(
    config: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> Recipe:
    """The recipe of a run: defaults, then the YAML file `config`, then `overrides` (flags).

    With `resume` among the values, the recipe of that run comes before `config`, and its folder is
    the output folder: `load_recipe(None, {"resume": "runs/x"})` is all it takes to continue. With
    `resume` = "auto" that run is the one in `output_dir`, if there is one. With `init_adapter`, task,
    model, method and data of that adapter come first in a new run. What comes later takes the place of what
    came before; of the options of one method those alone that are given (`options_over`). A relative path is
    relative to the working directory, in a file, too. Paths are checked as well. `variant` names one recipe
    of a file that is a grid of them (`vimtune.recipe.config_files`).

    Raises:
        RecipeError: the file, the values or the paths; it has every problem that was found.
    """
    if config is None and variant is not None:
        raise RecipeError([f"variant = {quote(variant)} needs config: the file with the grid"])
    values = {} if config is None else read_values("config", config, partial(read_config, variant=variant))
    values = options_over(values, overrides or {})
    problems: list[str] = []
    resumed: dict[str, Any] = {}
    try:
        resumed = _resumed(values)
    except RecipeError as error:
        problems += error.problems
    else:
        values = options_over(resumed, values)
    problems += path_problems(values)
    if not resumed and values.get("init_adapter") is not None and not problems:
        values = options_over(_continued(values), values)
    try:
        recipe = Recipe.from_values(values)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from error
    if problems:
        raise RecipeError(problems)
    return recipe


def read_values(
    name: str, path: str | os.PathLike[str], read: Callable[[str], dict[str, Any]] = read_yaml
) -> dict[str, Any]:
    """What `read` finds in the YAML file that the value `name` points at.

    Raises:
        RecipeError: it finds nothing, or the value is no path.
    """
    try:
        path = parsers.path(path)
    except ValueError as error:
        raise RecipeError([f"{name} = {quote(path)}: {error}"]) from error
    try:
        return read(path)
    except ValueError as error:
        raise RecipeError([str(error)]) from error


def _continued(values: Mapping[str, Any]) -> dict[str, Any]:
    """Task, model, method and data of the adapter that `init_adapter` names; not the method or the data where
    others are asked for.

    Of the data are taken those options alone that say which these are. The default data set, of which nobody
    has spoken, would have none of the adapter's classes.

    Raises:
        RecipeError: it is no adapter, or its base weights are not where they were.
    """
    from vimtune.adapters import read_adapter_info  # These come late, because they need torch.
    from vimtune.tasks.origin import adapter_path, recipe_of_adapter

    try:
        file = adapter_path(values["init_adapter"])
        stored = recipe_of_adapter(file, values)
        stored |= _with_its_defaults(stored, read_adapter_info(file).options)
        task = TASKS.get(str(values.get(TASK.name, stored.get(TASK.name, TASK.default))))
    except ValueError as error:
        raise RecipeError([f"init_adapter = {quote(values['init_adapter'])}: {error}"]) from error
    keys = {TASK.name, *options_of(task.backbone_options)}
    if values.get("peft") in (None, stored.get("peft")):
        keys |= options_of(MethodSettings).keys()
    data = task.data_options
    if all(values.get(name) is None for name in data.naming):
        keys |= {*data.naming, *data.dividing}
    return {name: value for name, value in stored.items() if name in keys}


def _with_its_defaults(stored: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`peft_kwargs` of the recipe of an adapter, with those of its options that it had by default and that
    have another default now: without them its numbers would mean something else.

    Args:
        stored: the recipe of the adapter.
        options: all options of the adapter, method -> option -> value.

    Raises:
        ValueError: the recipe is wrong.
    """
    if stored.get("peft") is None:
        return {}
    method = MethodSettings(**{key: stored[key] for key in options_of(MethodSettings) if key in stored})
    return {"peft_kwargs": keeping(changed_options(options, method), method)}


def _resumed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the run states that `resume` asks to continue: its recipe, and its folder as `output_dir`."""
    try:
        resume = parsers.optional(parsers.path)(values.get("resume"))
        path = parsers.optional(parsers.path)(values.get("output_dir")) if resume == "auto" else resume
    except ValueError:
        return {}  # no path at all: the field's own parser says it
    if path is None:
        return {}
    try:
        folder = Path(path) if resume == "auto" or os.path.isdir(path) else Path(path).parent
        if not (folder / "recipe.yaml").is_file():
            if resume == "auto":
                return {}  # nothing has begun there: the run starts
            what = "is no run folder: it has no recipe.yaml" if os.path.lexists(path) else "does not exist"
            raise RecipeError([f"resume = {quote(path)} {what}"])
    except OSError as error:
        raise RecipeError([f"resume = {quote(path)}: {error.strerror}"]) from error
    return complete_stored(read_values("resume", folder / "recipe.yaml")) | {"output_dir": str(folder)}
