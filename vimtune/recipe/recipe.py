"""The recipe: everything that defines a training run, as one validated table."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vimtune.fields import Option, Options, options_of, parse_fields
from vimtune.files import atomic_write_text
from vimtune.parsers import given_file
from vimtune.problems import ProblemsError
from vimtune.recipe.components import MethodSettings, OptimisationSettings, RunSettings
from vimtune.recipe.handed_on import parse_handed_on
from vimtune.recipe.options import changed_options, keeping
from vimtune.recipe.paths import path_problems
from vimtune.recipe.rules import contradictions
from vimtune.run_folder import cannot_make, obstacle
from vimtune.schema import check
from vimtune.tasks import TASKS, BackboneOptions, DataOptions, Task
from vimtune.text import quote, suggest

COMPONENTS: dict[str, type[Options]] = {
    "method": MethodSettings,
    "optimisation": OptimisationSettings,
    "run": RunSettings,
}
"""The components that are the same in the recipes of all tasks: attribute of the recipe -> class."""

TASK = Option(
    "task",
    str,
    "classification",
    "what the model is trained for (see --list)",
    TASKS.parse,
)
"""The key that chooses the task of a recipe."""

METHOD_DEFAULTS = "method_defaults"
"""Key of recipes in files under which the options stand that the method of the recipe has by default:
method -> option -> value."""

_OWN_PATHS = ("data_dir", "train_file", "val_file", "test_file", "output_dir", "resume")
"""Keys that name folders and files of the computer on which the run is."""
_NAMED_PATHS = ("checkpoint", "model", "tokenizer", "teacher", "init_adapter")
"""Keys of which a file or folder of that computer may be the value."""


class RecipeError(ProblemsError):
    """A recipe that cannot run; `problems` lists every reason, one line each."""

    subject = "the recipe"


def components_of(task: type[Task]) -> dict[str, type[Options]]:
    """The components of the recipes of a task beside the task itself: attribute of the recipe -> class."""
    return {"data": task.data_options, "backbone": task.backbone_options, **COMPONENTS}


def keys_of(task: str) -> dict[str, Option]:
    """The keys of the recipes of a task: its own after those of the components.

    Raises:
        ValueError: unknown task, or an option of the task has the name of another key.
    """
    keys = {TASK.name: TASK}
    for component in components_of(TASKS.get(task)).values():
        keys |= options_of(component)
    own = options_of(TASKS.get(task))
    for name in own:
        if name in keys:
            raise ValueError(f"task {quote(task)}: its option {name} is a key of all its recipes: rename it")
    return keys | own


@dataclass(frozen=True, init=False)
class Recipe:
    """Everything that defines a run, as a composition of components.

    A recipe is built from the options of all components side by side, Recipe(dataset="flowers", peft="lora",
    lr=1e-3); what is not given has its default. Building one checks it.
    """

    data: DataOptions
    backbone: BackboneOptions
    method: MethodSettings
    task: Task
    optimisation: OptimisationSettings
    run: RunSettings

    def __init__(self, **values: Any) -> None:
        """Build a recipe from values of its keys, as Python, YAML or a flag gives them.

        Raises:
            RecipeError: all that is wrong with the values.
        """
        self._build(values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a mapping, whose keys a user may have written.

        Raises:
            RecipeError: all that is wrong with the keys and values.
        """
        recipe = cls.__new__(cls)
        recipe._build(values)
        return recipe

    def _build(self, values: Mapping[Any, Any]) -> None:
        problems: list[str] = []
        chosen = TASK.default
        try:
            chosen = TASK.parse(values.get(TASK.name, TASK.default))
        except ValueError as error:
            problems.append(f"{TASK.name} = {quote(values[TASK.name])}: {error}")
        task = TASKS.get(chosen)
        known = keys_of(chosen)
        defaults, values = values.get(METHOD_DEFAULTS, {}), dict(values)
        values.pop(METHOD_DEFAULTS, None)
        problems += [_unknown_key(key, values[key], chosen, known) for key in values if key not in known]
        parsed: dict[str, Any] = {}
        components = components_of(task)
        for component in (*components.values(), task):
            right, wrong = parse_fields(component, values)
            parsed |= right
            problems += wrong.values()
        for component in components.values():
            problems += component.handed_on_problems(parsed)
        handed_on, more = parse_handed_on(parsed)
        parsed |= handed_on
        problems += [*contradictions(parsed), *more]
        if defaults and not problems:
            problems += _keep_defaults(parsed, defaults)
        if problems:
            raise RecipeError(problems)
        for attribute, component in {**components, "task": task}.items():
            own = {name: parsed[name] for name in options_of(component)}
            object.__setattr__(self, attribute, component(**own))

    def _components(self) -> Iterator[Options]:
        yield from (self.data, self.backbone, self.method, self.task, self.optimisation, self.run)

    def replace(self, **changes: Any) -> Recipe:
        """This recipe with other values of some keys.

        Raises:
            RecipeError: all that is wrong with the new recipe.
        """
        return self.from_values({**self.to_dict(), **changes})

    def run_dir(self) -> Path:
        """`output_dir`, or a new name under runs/ made of data set, model, method and the time."""
        if self.run.output_dir is not None:
            return Path(self.run.output_dir)
        moment = time.strftime("%Y%m%d-%H%M%S")
        data, model = self.data.dataset_name or self.task.name, Path(self.backbone.model).name
        return Path("runs") / f"{data}-{model}-{self.method.peft}-{moment}"

    def check_paths(self) -> None:
        """Check that the paths of the recipe can be used (see `path_problems`), and that of its run where it
        names none.

        Raises:
            RecipeError: naming those that cannot.
        """
        problems = path_problems(self.to_dict())
        if self.run.output_dir is None and self.run.resume is None:
            reason = obstacle(self.run_dir())
            problems += [] if reason is None else [cannot_make(self.run_dir(), reason)]
        if problems:
            raise RecipeError(problems)

    def to_dict(self) -> dict[str, Any]:
        """The value of every key, plain; `Recipe.from_values(recipe.to_dict()) == recipe`."""
        values: dict[str, Any] = {TASK.name: self.task.name}
        for component in self._components():
            values |= {name: copy.deepcopy(getattr(component, name)) for name in options_of(type(component))}
        return values

    def to_share(self) -> dict[str, Any]:
        """`to_dict` for a file that is passed on: no folders of this computer, of files their name."""
        values = {name: value for name, value in self.to_dict().items() if name not in _OWN_PATHS}
        places = {name: values.get(name) for name in _NAMED_PATHS}
        names = {name: Path(place).name for name, place in places.items() if place and os.path.isabs(place)}
        return {**values, **names}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML, atomically, with the options of its method that it does not state: where
        the file is read by a version that has other defaults, the recipe is the same.

        Raises:
            ValueError: `path` is no path of a file.
        """
        path = given_file(path)
        unstated = json.loads(json.dumps(self.method.unstated_options))
        values = {**self.to_dict(), **({METHOD_DEFAULTS: unstated} if unstated else {})}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        atomic_write_text(path, text)


def _keep_defaults(parsed: dict[str, Any], defaults: Any) -> list[str]:
    """Let the method of a recipe that was read from a file have the defaults of the version that wrote the
    file.

    Args:
        parsed: the values of all keys, changed in place.
        defaults: the options of methods that the file did not state, method -> option -> value.

    Returns:
        What is wrong with them.
    """
    try:
        saved = check(dict[str, dict[str, Any]], defaults, METHOD_DEFAULTS)
        method = MethodSettings(**{name: parsed[name] for name in options_of(MethodSettings)})
        kept, problems = parse_handed_on(
            {**parsed, "peft_kwargs": keeping(changed_options(saved, method), method)}
        )
    except ValueError as error:
        return [str(error)]
    parsed.update(kept)
    return problems


def _unknown_key(key: Any, value: Any, task: str, known: Mapping[str, Option]) -> str:
    """What to say about a key that recipes of `task` do not have."""
    owners = [name for name in TASKS if key in keys_of(name)]
    if owners:
        return f"{key} = {quote(value)} is an option of task {' and '.join(owners)}, and task is {task}"
    return f"unknown key {quote(key)}.{suggest(key, known) if isinstance(key, str) else ''}"
