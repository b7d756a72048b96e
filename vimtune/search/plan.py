"""What a search is: the recipe that its trials share, the space, and how many trials there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vimtune import parsers
from vimtune.fields import Option, options_of
from vimtune.files import atomic_write_text
from vimtune.recipe import Recipe, RecipeError, RunSettings, keys_of
from vimtune.search.composing import method_keys, recipe_values
from vimtune.search.reading import SpaceError, parse_space
from vimtune.search.settings import Plain
from vimtune.search.space import Drawn, Space
from vimtune.strict_yaml import MAX_BYTES, read_yaml
from vimtune.tasks import TASKS
from vimtune.text import printable, quote

PLAN = "search.yaml"
"""File of the plan, by which a folder is known to hold a search."""
FORMAT = "vimtune search 1"
"""What the file of a plan calls its format."""
_KEYS = ("format", "name", "trials", "seed", "prune", "space", "recipe")
_OF_A_RUN = ("output_dir", "resume", "force")
"""Keys of the recipe that each trial has for itself."""
MAX_TRIALS = 10_000
"""Most trials of a step."""


@dataclass(frozen=True)
class Plan:
    """A search, as it stands in its folder."""

    name: str
    """What the space is called."""
    recipe: Recipe
    """What the trials share; how the model is adapted is not in it."""
    values: dict[str, Any]
    """What the file of the space says."""
    trials: int
    """How many trials each step has."""
    seed: int
    """Of the draws, apart from the seed of the runs."""
    prune: bool
    """Whether trials that lag behind are ended early."""

    @property
    def space(self) -> Space:
        """The space of the first step.

        Raises:
            SpaceError: with all that is wrong with it.
        """
        return parse_space(self.values, varied_keys(self.recipe.task.name))

    def check(self) -> None:
        """Compare the space with the recipe: both ends of everything that may be drawn.

        Raises:
            RecipeError: with all that is wrong.
        """
        task = self.recipe.task.name
        if "test" not in keys_of(task):
            reason = "so that a trial would open the test split: a search scores on a validation split alone"
            raise SpaceError([f"task {quote(task)} has no key `test`, {reason}"])
        if (length := len(self.text())) > MAX_BYTES:
            raise SpaceError([f"the plan has {length:,} characters; at most {MAX_BYTES:,} are read again"])
        data = self.recipe.to_dict()
        for key, own in (("train_split", "train"), ("eval_split", "val")):
            if data.get(key) not in (None, own):
                raise SpaceError(
                    [
                        f"{key} = {quote(data[key])}: a search trains on train and scores on val; "
                        "leave it out, and give it to what trains the recipe that is found"
                    ]
                )
        space = self.space
        problems: dict[str, None] = {}
        for high in (False, True):
            for part in space.parts if space.alternatives else (None,):
                ends = _Ends(high, part)
                drawn = space.draw(ends, self.base())
                problems |= dict.fromkeys(self._problems(space, drawn))
                if space.has_refinement:
                    refined = space.refine(drawn)
                    problems |= dict.fromkeys(self._problems(refined, refined.draw(ends, self.base())))
        if problems:
            raise SpaceError(problems)

    def _problems(self, space: Space, drawn: Drawn) -> list[str]:
        try:
            Recipe.from_values(self.trial_values(space, drawn, Path("trial")))
        except RecipeError as error:
            return error.problems
        return []

    def base(self, best: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The keys by which those that are drawn may be multiplied; `best` has other values of some."""
        return {**self.recipe.to_dict(), **(best or {})}

    def trial_values(self, space: Space, drawn: Drawn, folder: Path) -> dict[str, Any]:
        """The recipe of a trial in `folder`: it selects by "val", and does not open the test split."""
        values = {**self.recipe.to_dict(), **recipe_values(space, drawn)}
        if "train_split" in values:
            values |= {"train_split": "train", "eval_split": None}
        return values | {"test": False, "output_dir": str(folder), "resume": "auto", "force": False}

    def final_recipe(self, space: Space, drawn: Drawn) -> Recipe:
        """The recipe that trains what was found.

        With `train_size` the examples that selected are trained on as well, and the test split is scored
        once.
        """
        values = {**self.recipe.to_dict(), **recipe_values(space, drawn)}
        if values.get("train_size") is not None and "train_split" in values and values["test"]:
            values |= {"train_split": "train+val", "eval_split": None}
        return Recipe.from_values(values)

    def text(self) -> str:
        """The plan as YAML."""
        left_out = {*_OF_A_RUN, *method_keys()}
        values = {
            "format": FORMAT,
            "name": self.name,
            "trials": self.trials,
            "seed": self.seed,
            "prune": self.prune,
            "space": self.values,
            "recipe": {name: value for name, value in self.recipe.to_dict().items() if name not in left_out},
        }
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        """Write the plan, whole or not at all."""
        atomic_write_text(path, self.text())


def read_plan(path: Path) -> Plan:
    """The plan that `Plan.save` wrote.

    Raises:
        ValueError: the file cannot be read or is not such a plan.
    """
    shown = printable(str(path))
    values = read_yaml(path)
    if values.get("format") != FORMAT:
        raise ValueError(f"{shown} is no plan of a search: expected format: {FORMAT}")
    if set(values) != set(_KEYS):
        raise ValueError(f"{shown}: expected the keys {', '.join(_KEYS)}")
    if not isinstance(values["space"], dict) or not isinstance(values["recipe"], dict):
        raise ValueError(f"{shown}: expected mappings as space and recipe")
    try:
        return Plan(
            name=parsers.text(values["name"]),
            recipe=Recipe.from_values(values["recipe"]),
            values=values["space"],
            trials=parsers.integer(1, MAX_TRIALS)(values["trials"]),
            seed=parsers.integer(0)(values["seed"]),
            prune=parsers.boolean(values["prune"]),
        )
    except RecipeError as error:
        raise ValueError(f"{shown}: its recipe: {'; '.join(error.problems)}") from error
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error


def varied_keys(task: str) -> dict[str, Option]:
    """The keys of recipes of a task that a space may vary: how the model is trained, not on what or where."""
    known = keys_of(task)
    fixed = {"task", *method_keys(), *options_of(RunSettings), *options_of(TASKS.get(task).data_options)}
    return {name: item for name, item in known.items() if name not in fixed}


class _Ends:
    """A chooser that takes one end of everything, with every part that may be there."""

    def __init__(self, high: bool, part: str | None) -> None:
        self._high, self._part = high, part

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """The end of a range."""
        return high if self._high else low

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """The end of a range."""
        return high if self._high else low

    def suggest_categorical(self, name: str, choices: tuple[Plain, ...]) -> Any:
        """True, the part that is asked for, or the first or last of others."""
        if choices == (True, False) or self._part in choices:
            return True if self._part is None or choices == (True, False) else self._part
        return choices[-1] if self._high else choices[0]
