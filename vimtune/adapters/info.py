"""What an adapter file says about itself: the schema, and the versions of the format.

An adapter file is a safetensors file whose metadata hold {"format": FORMAT, "info": JSON of `AdapterInfo`}.
It may come from anybody: all of it is compared with the schema, when it is read and when it is written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le, Len

from vimtune.methods import list_methods, method_names, resolve_options, split_options
from vimtune.models.registry import check_creation
from vimtune.preprocessing import Preprocessing
from vimtune.schema import STRICT, Name, check, dump_json, parse_json
from vimtune.text import quote, suggest

FORMAT = "vimtune-adapter"
"""The format that an adapter file states in its metadata, by which it is recognised."""
VERSION = 5
"""Version of the files that are written.

Version 4 did not know which weights an adapter replaces, and is the same otherwise.

Version 2 knew no rows, calls and options by target, and is the same otherwise. In version 3 the target of an
option meant one direction of a scan ("x_proj"), which now means both; `load_adapter` reads it so.
"""
BOTH_DIRECTIONS = 4
"""The first version in which targets mean both directions of a scan."""


class AdapterFileError(ValueError):
    """A file that is no adapter, is damaged, or belongs to another base model."""


class OtherBaseError(AdapterFileError):
    """A file that belongs to another base model, which whoever insists on it may load."""


SitePath = Annotated[str, Len(1, 1000)]
"""Dotted path of a parameter, or a target."""
ClassCount = Annotated[int, Ge(0), Le(10**7)]
"""Number of outputs of a head."""
ClassName = Annotated[str, Len(0, 1000)]
"""Name of a class, which may be empty."""
Text = Annotated[str, Len(0, 1000)]
"""A text of moderate length, for a file is not trusted to hold a sensible one."""
Scalar = bool | int | float | Text | None
"""A single value of an option."""
OptionValue = Scalar | Annotated[list[Scalar], Len(0, 64)]
"""What an option may be in a file: a value or a short list of values."""
TargetList = SitePath | list[SitePath]
"""Targets of one method: one alone or a list."""
LayerList = list[Annotated[int, Ge(-(10**6)), Le(10**6)]]
"""Indices of blocks, negative ones counted from the end."""


@dataclass
class AdapterInfo:
    """Everything in an adapter file besides the tensors."""

    __pydantic_config__ = STRICT

    method: Name
    """The method, or several joined by "+", as `inject` takes it."""
    options: dict[Name, dict[Name, OptionValue | dict[SitePath, OptionValue]]]
    """Every field of each method, defaults included: {method: {field: value}}; a field may have a value for
    each of several targets instead."""
    targets: TargetList | dict[Name, TargetList] | None
    """The targets as they were given to `inject`."""
    layers: LayerList | dict[Name, LayerList] | None
    """The layers as they were given to `inject`."""
    num_classes: ClassCount
    """Outputs of the adapter's head; 0 for a model that does not tell."""
    base_hash: Name
    """`BaseIdentity.bits`; in a file without `base_origin` the hash of the first format."""
    model: dict[str, Any]
    """{"name": registered model, "kwargs": its creation arguments}; empty if not created by name."""
    classes: list[ClassName] = field(default_factory=list)
    """Name of each class, by label; empty where nobody gave names."""
    preprocessing: dict[Name, OptionValue] = field(default_factory=dict)
    """Fields of `Preprocessing`; empty where nobody said how images become inputs."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else that was worth keeping."""
    sites: dict[Name, list[SitePath]] | None = None
    """Paths of the adapted points by method, without the head's; None in files of version 1."""
    version: Annotated[int, Ge(2), Le(VERSION)] = VERSION
    """Version of the format. Version 1 has a schema of its own, `_Version1`."""
    base_origin: Annotated[str, Len(0, 200)] = ""
    """`BaseIdentity.origin`."""
    replaced_hash: Annotated[str, Len(0, 200)] = ""
    """The same as `base_hash` of the weights that the adapter replaces (`replaced_identity`); empty in files
    before version 5."""
    replaced_origin: Annotated[str, Len(0, 200)] = ""
    """Their origin."""

    def __post_init__(self) -> None:
        names = method_names(self.method)
        for what, methods in (("options", self.options), ("sites", self.sites)):
            if methods is not None and list(methods) != names:
                raise ValueError(f"{what} of {quote(list(methods))}, but the method is {quote(self.method)}")
        if self.num_classes and self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} class names for a head of {self.num_classes} outputs")


@dataclass
class _Version1:
    """`AdapterInfo` as files of version 1 hold it: only the options and targets that were given."""

    __pydantic_config__ = STRICT

    method: Name
    options: dict[Name, OptionValue | dict[Name, OptionValue]]
    targets: TargetList | None
    layers: LayerList | None
    num_classes: ClassCount
    base_hash: Name
    model: dict[str, Any]
    classes: list[ClassName]
    preprocessing: dict[Name, OptionValue]
    extra: dict[str, Any]
    version: int


_LOW_RANK = {"rank": 16, "alpha": 8.0, "dropout": 0.0}
"""The defaults that the methods with low-rank factors shared at the time of version 1."""

VERSION_1_OPTIONS: dict[str, dict[str, Any]] = {
    "prodial": {**_LOW_RANK, "block_size": 4, "variant": "free"},
    "lora": _LOW_RANK,
    "dora": _LOW_RANK,
    "strong": _LOW_RANK,
}
"""Values of options that a file of version 1 leaves out: the defaults of its time."""

VERSION_1_TARGETS: dict[str, TargetList] = {
    "prodial": "both",
    "lora": "both",
    "dora": "both",
    "ft": "both",
    "strong": ["in_proj", "out_proj", "x_proj", "x_proj_b"],
}
"""Targets of a method that a file of version 1 leaves out. Methods that are not here choose by rules of
their own, which `load_adapter` compares with the tensors of the file."""


_AS_BEFORE = {"scaling": "standard", "start": "random", "lr_ratio": 1.0}
"""What the methods with low-rank factors did before they had these options."""

NEUTRAL_OPTIONS: dict[str, dict[str, Any]] = {
    "prodial": {
        "scale_decay": 0.0,
        "diagonal_lr_ratio": 1.0,
        "train_scale": True,
        **_AS_BEFORE,
    },
    "lora": _AS_BEFORE,
    "dora": {"axis": "output", **_AS_BEFORE},
    "strong": _AS_BEFORE,
    "oft": {"series": None},
    "ft": {"start_decay": 0.0},
    "bitfit": {"start_decay": 0.0},
    "full": {"start_decay": 0.0},
}
"""Values of options that came after files of their method had been written: with these it does as before."""

NEUTRAL_OF_ALL: dict[str, Any] = {"lr_scale": 1.0, "decay_scale": 1.0}
"""The same of the options that every method has."""


def write_info(info: AdapterInfo, what: str) -> str:
    """The JSON text of `info`, in the newest version.

    Raises:
        ValueError: a value that does not fit the schema.
    """
    check_creation(info.model, what)
    _check_preprocessing(info, what, ValueError)
    return dump_json(AdapterInfo, dataclasses.asdict(info), what)


def read_info(text: str | None, what: str) -> AdapterInfo:
    """The counterpart of `write_info`, for all versions.

    Raises:
        AdapterFileError: not the JSON text of an adapter file, of a newer version, or of a method that this
            vimtune does not have; `what` names the file in the message.
    """
    values = parse_json(text, what, AdapterFileError)
    if isinstance(values, dict):
        _refuse_unknown(values, what)
        if values.get("version") == 1:
            values = _upgrade(check(_Version1, values, what, AdapterFileError), what)
    info = check(AdapterInfo, values, what, AdapterFileError)
    # Its content becomes arguments of a function.
    info.model = check_creation(info.model, what, AdapterFileError)
    _check_preprocessing(info, what, AdapterFileError)
    info.options = {
        name: NEUTRAL_OF_ALL | NEUTRAL_OPTIONS.get(name, {}) | own for name, own in info.options.items()
    }
    try:
        resolve_options(info.method, info.options)
    except ValueError as error:
        raise AdapterFileError(f"{what}: {error}") from None
    return info


def _check_preprocessing(info: AdapterInfo, what: str, error: type[ValueError]) -> None:
    if info.preprocessing:
        check(Preprocessing, info.preprocessing, f"{what}: the preprocessing", error)


def _refuse_unknown(values: dict[str, Any], what: str) -> None:
    """Say clearly what a newer vimtune may have written."""
    version, method = values.get("version"), values.get("method")
    if isinstance(version, int) and version > VERSION:
        raise AdapterFileError(
            f"{what} has format version {quote(version)}; this vimtune reads up to {VERSION}: update vimtune"
        )
    known = list_methods()
    for name in method.split("+") if isinstance(method, str) else ():
        if name.strip() not in known:
            raise AdapterFileError(
                f"{what} is of an unknown method, {quote(name)}.{suggest(name, known)} "
                f"Known: {', '.join(known)}. "
                "Update vimtune, or import the package that registers the method"
            )


def _upgrade(old: _Version1, what: str) -> dict[str, Any]:
    """Values of the present version that mean what a file of version 1 meant when it was written."""
    try:
        given = split_options(old.method, old.options)
    except ValueError as error:
        raise AdapterFileError(f"{what}: {error}") from None
    # Any preprocessing was accepted; what is no setting of ours moves to where it does no harm.
    known = {item.name for item in dataclasses.fields(Preprocessing)}
    foreign = {key: value for key, value in old.preprocessing.items() if key not in known}
    default_targets = {name: VERSION_1_TARGETS[name] for name in given if name in VERSION_1_TARGETS} or None
    return {
        **dataclasses.asdict(old),
        "options": {name: VERSION_1_OPTIONS.get(name, {}) | own for name, own in given.items()},
        "targets": default_targets if old.targets is None else old.targets,
        "preprocessing": {key: value for key, value in old.preprocessing.items() if key in known},
        "extra": {**old.extra, "preprocessing": foreign} if foreign else old.extra,
        "version": VERSION,
    }
