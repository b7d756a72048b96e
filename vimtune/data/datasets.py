"""The table of data sets: how one is registered, found by its name, checked and opened.

A data set of a user's own package registers itself with the same decorator as those of vimtune, and is then
known wherever theirs are: in recipes, commands, lists and the processes that load images.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar, get_type_hints

from vimtune.data.base import SPLITS, ImageDataset
from vimtune.data.errors import DatasetError
from vimtune.parsers import given_path
from vimtune.registry import Registry, require_complete
from vimtune.text import quote, suggest

DATASETS: Registry[type[ImageDataset]] = Registry("data set", DatasetError)
"""All data sets by name."""

_COMMON = ("self", "split", "data_dir", "seed", "img_size", "download")
"""Parameters that every data set has; the others are its options."""

_OWED: dict[str, tuple[tuple[type[Sequence[Any]], ...], type, str]] = {
    "split": ((str,), str, "the split that was asked for"),
    "classes": ((list, tuple), str, "a list of the names of the classes"),
    "targets": ((list, tuple), Integral, "a list of the label of every image, each an index into classes"),
    "source": ((str,), str, "one line that says which data are used"),
}
"""Attributes that every data set has to set: their types, that of what they hold, and what they are."""

DatasetType = TypeVar("DatasetType", bound=type[ImageDataset])
"""The class that is registered."""


def register_dataset(name: str) -> Callable[[DatasetType], DatasetType]:
    """Class decorator: make an `ImageDataset` known under `name`.

    `ImageDataset` says what the class must offer.

    Raises:
        ValueError: the name is taken; the class has no summary of its own, or lacks a method or a parameter
            that every data set has; or an option is not keyword-only, or has no default or no annotation.
    """

    def register(cls: DatasetType) -> DatasetType:
        require_complete(cls, f"data set {name!r}")
        if missing := [each for each in _COMMON if each not in inspect.signature(cls.__init__).parameters]:
            raise ValueError(
                f"data set {name!r}: __init__ of class {cls.__name__} has to take {', '.join(missing)}: "
                f"expected ({', '.join(_COMMON)}) and the options"
            )
        for option in _options(cls):
            if option.kind is not option.KEYWORD_ONLY or option.empty in (option.default, option.annotation):
                raise ValueError(
                    f"data set {name!r}: option {option.name} must be keyword-only, with an annotation and a "
                    "default, such as `*, count: Annotated[int, Ge(1)] = 4`"
                )
        DATASETS.add(name, cls)
        cls.name = name
        return cls

    return register


def list_datasets() -> dict[str, str]:
    """Names of all data sets, sorted, with a one-line description each."""
    return {name: cls.summary for name, cls in sorted(DATASETS.items())}


def dataset_class(name: str) -> type[ImageDataset]:
    """The class of the data set `name`.

    Raises:
        DatasetError: unknown name.
    """
    return DATASETS.get(name)


def dataset_summary(name: str) -> str:
    """One-line description of the data set `name`."""
    return dataset_class(name).summary


def dataset_options(name: str) -> dict[str, Any]:
    """Options of a data set (`dataset_kwargs`) with their defaults."""
    return {option.name: option.default for option in _options(dataset_class(name))}


def dataset_option_problems(name: str, given: Mapping[str, Any]) -> list[str]:
    """What is wrong with options that a user gives for a data set, without opening it.

    Args:
        name: a registered data set.
        given: its `dataset_kwargs`, as plain values.

    Returns:
        One line for each option that the data set does not have, or whose value is of another type or out of
        its range; empty if all are right.
    """
    return _check_options(dataset_class(name), given)[1]


def reads_files(name: Any) -> bool:
    """Whether a data set reads files; one that is not known here may."""
    return not isinstance(name, str) or name not in DATASETS or DATASETS.get(name).reads_files


def unread_folder(name: str, data_dir: str | os.PathLike[str] | None) -> str | None:
    """What is wrong with a folder that is given for a data set which reads none: whoever gives it most
    probably means the photos that lie there, and would get generated images. None if nothing is."""
    if data_dir is None or reads_files(name):
        return None
    return (
        f"data_dir = {quote(os.fspath(data_dir))} would not be read: the images of dataset = {quote(name)} "
        "are generated. Say what lies there, --dataset folder (a folder for each class) or --dataset csv (a "
        "table of labels), or leave data_dir out"
    )


def create_dataset(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    img_size: tuple[int, int] = (64, 64),
    download: bool = True,
    **dataset_kwargs: Any,
) -> ImageDataset:
    """Open one split of a data set.

    Args:
        name: see `list_datasets()`.
        split: "train", "val", "test" or "train+val".
        data_dir: where the files are or go; default `./data`. One whose images are generated takes none.
        seed: fixes splits that are drawn, and the images of generators.
        img_size: (height, width) of generated images; files keep their own size.
        download: fetch missing data where the owner offers a download.
        dataset_kwargs: options of this data set, see `dataset_options(name)`.

    Raises:
        DatasetError: unknown name, split or option, an option of the wrong type or out of its range, missing
            or unusable data, or a class that does not set the attributes that it has to.
        MissingSplitError: the data set has no such split.
    """
    cls = dataset_class(name)
    if split not in SPLITS:
        raise DatasetError(
            f"unknown split {quote(split)}; choose from {', '.join(SPLITS)}.{suggest(split, SPLITS)}"
        )
    options, problems = _check_options(cls, dataset_kwargs)
    if problems:
        raise DatasetError("; ".join(problems))
    root = None if data_dir is None else given_path("data_dir", data_dir, "a folder of data", DatasetError)
    if (problem := unread_folder(name, root)) is not None:
        raise DatasetError(problem)
    make: Callable[..., ImageDataset] = cls
    dataset = make(split, root, seed=seed, img_size=img_size, download=download, **options)
    _refuse_incomplete(dataset)
    _refuse_degenerate(dataset)
    return dataset


def _options(cls: type[ImageDataset]) -> list[inspect.Parameter]:
    """Those parameters of a data set's class that are its own options."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return [parameter for parameter in parameters if parameter.name not in _COMMON]


def _check_options(cls: type[ImageDataset], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Compare options with the annotations of the class: (the right ones as it takes them, problems)."""
    from vimtune.schema import check  # This comes late, because data sets are listed without it.

    known = [option.name for option in _options(cls)]
    types = get_type_hints(cls.__init__, include_extras=True) if given else {}
    options, problems = {}, []
    for key, value in given.items():
        try:
            if key not in known:
                raise DatasetError(
                    f"data set {cls.name!r} has no option {quote(key)}; its options: "
                    f"{', '.join(known) or 'none'}.{suggest(key, known)}"
                )
            options[key] = check(
                types[key], value, f"data set {cls.name!r}: {key}={quote(value)}", DatasetError
            )
        except DatasetError as error:
            problems.append(str(error))
    return options, problems


def _refuse_incomplete(dataset: ImageDataset) -> None:
    """Raise DatasetError for an attribute that the class of a data set forgot, or set to something else."""
    for name, (kind, held, expected) in _OWED.items():
        value = getattr(dataset, name, None)
        # Labels may be millions, of very few types.
        if not isinstance(value, kind) or not all(issubclass(each, held) for each in set(map(type, value))):
            found = f"has {name} = {quote(value)}" if hasattr(dataset, name) else f"does not set {name}"
            raise DatasetError(
                f"data set {dataset.name!r}: class {type(dataset).__name__} {found}: expected {expected}. "
                f"Set self.{name} in its __init__"
            )


def _refuse_degenerate(dataset: ImageDataset) -> None:
    if not dataset.targets:
        raise DatasetError(f"the data set is empty: {dataset.source}.")
    if len(dataset.classes) < 2:
        raise DatasetError(f"a classifier needs at least 2 classes: {dataset.source}.")
    labels = dataset.targets if dataset.tags is None else [0, *(tag for tags in dataset.tags for tag in tags)]
    lowest, highest = min(labels), max(labels)
    if lowest < 0 or highest >= len(dataset.classes):
        raise DatasetError(
            f"labels {lowest} to {highest} do not fit {len(dataset.classes)} classes: {dataset.source}."
        )
