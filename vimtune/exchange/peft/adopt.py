"""An adapter file of vimtune from a folder in HF peft's format, which says less than the file has to.

HF peft's files hold tensors and settings. Which model they are for, on which task, and what the classes are
called is said by whoever has the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimtune.adapters import AdapterFileError, save_adapter
from vimtune.data.files.checks import read_table
from vimtune.exchange.peft.files import load_peft, read_settings
from vimtune.fields import options_of
from vimtune.recipe import TASK, Recipe, load_recipe
from vimtune.run_folder import PEFT_CONFIG, RunFolder
from vimtune.schema import MAX_TEXT_BYTES
from vimtune.text import printable, quote

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Unsaid:
    """What a folder of HF peft does not say of its adapter."""

    base: Mapping[str, Any]
    """Keys of a recipe that say which model it is for and where its weights are ("model", which has to be
    given, "checkpoint", "tokenizer")."""
    task: str | None = None
    """What it was trained for; None for the default of recipes."""
    classes: Sequence[str] | None = None
    """Names of the classes, one for each output of the head; None for numbers."""

    def __post_init__(self) -> None:
        names = self.classes or ()
        _check_once(names, [f"classes[{index}]" for index in range(len(names))], "names of classes")

    def recipe(self) -> Recipe:
        """The recipe that these values are part of.

        Raises:
            RecipeError: a value that is wrong, such as an unknown model.
        """
        values = {name: str(value) for name, value in self.base.items()}
        return load_recipe(None, values if self.task is None else {**values, TASK.name: self.task})


def is_peft_folder(path: Path) -> bool:
    """Whether `path` is a folder of HF peft, in which there is no adapter file of vimtune."""
    return (path / PEFT_CONFIG).is_file() and not RunFolder(path).adapter.exists()


def adopt_peft(folder: Path, target: Path, unsaid: Unsaid) -> Path:
    """Write an adapter file from a folder of HF peft, with the part of a recipe that is known beside it.

    Args:
        folder: a folder that HF peft has written.
        target: an empty folder.
        unsaid: what the folder does not say.

    Returns:
        The adapter file, from which the commands find the model as from that of a run.

    Raises:
        AdapterFileError: the folder cannot be read, or its adapter has no counterpart here.
        ValueError: no model is given, or what is given does not fit the folder.
    """
    shown, settings = printable(str(folder)), read_settings(folder)
    if "model" not in unsaid.base:
        named = settings.get("base_model_name_or_path")
        hint = f" (its settings name {quote(named)})" if named else ""
        raise ValueError(
            f"{shown} is an adapter in HF peft's format, which does not say of which model{hint}: give it "
            "with --model, and --task text for a language model (see vimtune train --list)"
        )
    recipe = unsaid.recipe()
    brings_head = bool(settings.get("modules_to_save"))
    model = recipe.task.create_base(recipe, head=not brings_head)
    record = load_peft(model, folder)
    if unsaid.classes is not None and record.num_classes and len(unsaid.classes) != record.num_classes:
        raise AdapterFileError(
            f"{len(unsaid.classes)} names of classes are given, and the model of {shown} has "
            f"{record.num_classes} outputs: expected a name for each, in their order"
        )
    logger.warning(
        "%s does not say on which base weights it was trained: it is taken for one of %s, and nothing can "
        "check that",
        shown,
        recipe.backbone.checkpoint or recipe.backbone.model,
    )
    if unsaid.classes is None and record.num_classes:
        logger.warning("its %d classes get numbers: give their names with --classes", record.num_classes)
    known = {TASK.name, "seed", *options_of(recipe.task.backbone_options)}
    part = {name: value for name, value in recipe.to_share().items() if name in known}
    run = RunFolder(target)
    save_adapter(model, run.adapter, classes=list(unsaid.classes or ()), extra={"recipe": part})
    recipe.save(run.recipe)
    return run.adapter


def read_names(path: Path) -> list[str]:
    """The names of classes in a text file, one a line.

    Raises:
        ValueError: it is no text file, has no names, or one of them twice.
    """
    lines = [line.strip() for line in read_table(path, MAX_TEXT_BYTES).splitlines()]
    numbers, shown = [number for number, line in enumerate(lines, 1) if line], quote(str(path))
    if not numbers:
        raise ValueError(f"{shown} is empty: expected the names of the classes, one a line")
    names = [lines[number - 1] for number in numbers]
    _check_once(names, [f"line {number}" for number in numbers], shown)
    return names


def _check_once(names: Sequence[str], places: Sequence[str], what: str) -> None:
    """Raise ValueError where two classes have one name, by which answers tell them apart; `places` says where
    in `what` each name stands."""
    seen: dict[str, str] = {}
    for name, place in zip(names, places, strict=True):
        if name in seen:
            raise ValueError(
                f"{what}: {seen[name]} and {place} are both {quote(name)}, and answers tell classes apart by "
                "their names: expected another one for each"
            )
        seen[name] = place
