"""Where an adapter comes from: its file, its task, the recipe of its run and its base weights."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Len
from torch import nn

from vimtune import parsers
from vimtune.adapters import (
    AdapterFileError,
    AdapterInfo,
    has_replaced,
    read_adapter_info,
    replaced_paths,
)
from vimtune.fields import options_of
from vimtune.models.merged import is_merged_file, read_merged_info
from vimtune.recipe import TASK, complete_stored, keys_of
from vimtune.run_folder import RunFolder
from vimtune.run_folder import adapter_path as adapter_path
from vimtune.schema import STRICT, Count, Name, check
from vimtune.strict_yaml import read_yaml
from vimtune.tasks.base import TASKS, Task
from vimtune.tasks.components import DataOptions
from vimtune.text import quote

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=DataOptions)
"""Settings of the data of a task."""

NOT_OF_ADAPTER = ("output_dir", "resume", "force")
"""Keys of a run's recipe that say nothing about what it trained."""

NOT_OF_BASE = ("num_classes", "img_size", "drop_path_rate", "initial_state")
"""Options of a merged model that its base gets otherwise, or that merging has added."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Base weights of a training run: the fields of its recipe that say where they came from."""

    __pydantic_config__ = STRICT

    checkpoint: Annotated[str, Len(1, 4096)] | None = None
    """Name of the file; in older adapter files the path as it was given."""
    pretrained: bool = True
    """Whether the run began with the model's published weights, where it names no checkpoint."""
    seed: Count = 0
    """Seed of random weights, where it began with neither."""

    @classmethod
    def of(cls, info: AdapterInfo) -> Origin:
        """What an adapter file says.

        Raises:
            AdapterFileError: it says so in another form.
        """
        recipe = info.extra.get("recipe", {})
        names = {field.name for field in dataclasses.fields(cls)}
        if isinstance(recipe, dict):
            recipe = {name: value for name, value in recipe.items() if name in names}
        return check(cls, recipe, "the recipe in the adapter file", AdapterFileError)


def task_of(info: AdapterInfo) -> Task:
    """The task that an adapter was trained on, with the options that it had.

    A file that names none is of an earlier version, which knew images alone, or was not written by a run.

    Raises:
        AdapterFileError: the file says so in another form.
        ValueError: no such task here.
    """
    recipe = info.extra.get("recipe", {})
    if not isinstance(recipe, dict):
        return TASKS.get(TASK.default)()  # whoever reads more of the recipe says what is wrong with it
    name = check(Name, recipe.get(TASK.name, TASK.default), "the task in the adapter file", AdapterFileError)
    kind = TASKS.get(name)
    try:
        return kind(**{key: recipe[key] for key in options_of(kind) if key in recipe})
    except ValueError as error:
        raise AdapterFileError(f"the recipe in the adapter file: {error}") from error


def given_base(
    checkpoint: str | os.PathLike[str] | None = None, model: str | None = None, tokenizer: str | None = None
) -> dict[str, Any]:
    """Where a user says that the base weights of an adapter are now, by keys of the recipe; what is None is
    left out."""
    base = {
        "checkpoint": None
        if checkpoint is None
        else parsers.given_path("checkpoint", checkpoint, "the base weights"),
        "model": model,
        "tokenizer": tokenizer,
    }
    return {name: value for name, value in base.items() if value is not None}


def find_base(path: Path, info: AdapterInfo) -> Path | None:
    """The file of base weights that the adapter `path` was trained on; None if they came from no file.

    An adapter file may be passed on, so it has only the name of that file (older ones have the path). The
    recipe of the run, which lies beside the adapter in a run folder, has its place.

    Raises:
        AdapterFileError: the file is not there.
    """
    checkpoint = Origin.of(info).checkpoint
    if checkpoint is None:
        return None
    places = [Path(checkpoint)]
    recipe = RunFolder(path.parent).recipe
    if recipe.is_file():
        place = read_yaml(recipe).get("checkpoint")
        if isinstance(place, str) and Path(place).name == places[0].name:
            places.insert(0, Path(place))
    for place in places:
        if place.exists():
            return place
    raise AdapterFileError(
        f"the adapter was trained on the weights in {quote(places[0].name)}, and they are not at their "
        "former place; give their present place with --checkpoint"
    )


def recipe_of_trained(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter file or a merged file says of the recipe of its run; `given` goes before it.

    Raises:
        ValueError: neither, or base weights of an adapter that are not where they were.
    """
    return recipe_of_merged(path) if is_merged_file(path) else recipe_of_adapter(path, given)


def recipe_of_merged(path: Path) -> dict[str, Any]:
    """The keys of the recipe that a merged file states: its task, and its model with the sizes of its base.
    Of its data it says nothing."""
    info = read_merged_info(path)
    options = {name: value for name, value in info.options.items() if name not in NOT_OF_BASE}
    size = {"img_size": info.options["img_size"]} if "img_size" in info.options else {}
    return {"task": info.task, "model": info.model, "model_kwargs": options, **size}


def refuse_other_model(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that nothing is given of what an adapter file or a merged file decides by itself.

    Args:
        path: the file.
        stored: what it says of the recipe of its run.
        given: values of keys that are to go before those.

    Raises:
        ValueError: a value that would not be used, because the file has another one.
    """
    task = TASKS.get(stored.get(TASK.name, TASK.default))
    keys = keys_of(task.name)
    for name in task.decided_by_file:
        if name not in given:
            continue
        own = stored.get(name, keys[name].default)
        value = keys[name].parse(given[name])
        if value != own:
            known = "" if own is None else f", {quote(own)}"
            raise ValueError(
                f"{name} = {quote(value)} would have no effect: {quote(str(path))} says by itself what it "
                f"is{known}. Leave it out"
            )


def recipe_of_adapter(adapter: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with which an adapter was trained, and where its base weights are now.

    The recipe beside it in a run folder is preferred to the one in the file, which names no folder of the
    computer it comes from.

    Args:
        adapter: the file.
        given: values that go before those of the recipe.

    Raises:
        ValueError: no adapter file, or its base weights are not where they were.
    """
    info = read_adapter_info(adapter)
    beside = RunFolder(adapter.parent).recipe
    stored = read_yaml(beside) if beside.is_file() else info.extra.get("recipe", {})
    values = complete_stored(stored) if isinstance(stored, dict) else {}
    values = {name: value for name, value in values.items() if name not in NOT_OF_ADAPTER}
    values = _for_task(values, given.get(TASK.name))
    if "checkpoint" not in given:
        base = find_base(adapter, info)
        values["checkpoint"] = None if base is None else str(base)
    return values


def _for_task(stored: dict[str, Any], task: Any) -> dict[str, Any]:
    """A stored recipe for another task, without the options that its own task alone has.

    Args:
        stored: values by key.
        task: name of the other task; a name that is none is refused by whoever builds the recipe.
    """
    own = stored.get(TASK.name, TASK.default)
    if not all(isinstance(name, str) and name in TASKS for name in (own, task)):
        return stored
    lacking = options_of(TASKS.get(own)).keys() - keys_of(task).keys()
    return {name: value for name, value in stored.items() if name not in lacking}


def data_of_run(adapter: Path, kind: type[Settings]) -> Settings | None:
    """On which data an adapter was trained, as settings of a kind; None where its recipe does not say it."""
    try:
        stored = recipe_of_adapter(adapter, {"checkpoint": None})  # Where the weights are does not matter.
        return kind(**{name: stored[name] for name in options_of(kind) if name in stored})
    except ValueError:
        return None


def trained_note(count: int, whole: int, plural: str) -> list[str]:
    """What has to be said where an adapter was trained on examples that are scored; nothing where on none.

    Args:
        count: how many of them it was trained on.
        whole: how many are scored.
        plural: what they are called, such as "images".
    """
    if not count:
        return []
    share = f"All {whole:,}" if count == whole else f"{count:,} of the {whole:,}"
    return [f"{share} {plural} were trained on by this run: their scores say little about new {plural}."]


def check_replaced(model: nn.Module, adapter: Path, force: bool) -> None:
    """Check that the base weights which an adapter replaces are those that its training began with.

    Its answers do not depend on them, so `load_adapter` accepts any. What training has changed does.

    Args:
        model: a model with the adapter on its base weights.
        adapter: the file of the adapter.
        force: accept others.

    Raises:
        AdapterFileError: they are others.
    """
    info, replaced = read_adapter_info(adapter), replaced_paths(model)
    if not replaced or force:
        return
    shown = f"{quote(replaced[0])} and {len(replaced) - 1} more" if replaced[1:] else quote(replaced[0])
    if not info.replaced_origin:
        logger.warning(
            "%s was written by an earlier version, which did not note the weights that an adapter replaces: "
            "whether %s are here what training began with cannot be told",
            quote(str(adapter)),
            shown,
        )
    elif not has_replaced(model, info.replaced_hash, info.replaced_origin):
        raise AdapterFileError(
            f"{quote(str(adapter))} was trained on other base weights: what it replaces ({shown}) is not as "
            "it was at the start of training. Give those weights with --checkpoint, or insist with --force"
        )
