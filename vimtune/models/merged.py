"""A merged file: plain weights, and in the metadata what it takes to build their model and to feed it.

The tensors are those of the model's `state_dict`, so that every reader of safetensors can use them.
The metadata are "model" (a name of the registry), "task" and, as JSON, "options" (of its creation), "classes"
and "preprocessing". Files written before there were "options" or "task" have none; their task is
classification.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vimtune.models import VisionMamba, create_listed_model
from vimtune.models.checkpoint import unusable
from vimtune.schema import STRICT, Name, check, parse_json
from vimtune.tensor_file import read_metadata, read_tensors
from vimtune.text import quote

_PARTS = ("classes", "preprocessing")
"""What every merged file states in its metadata besides its model; this tells it from other files."""


class MergedFileError(ValueError):
    """A merged file that is damaged, or whose parts contradict each other."""


@dataclass(frozen=True, kw_only=True)
class MergedInfo:
    """What a merged file says besides the weights."""

    __pydantic_config__ = STRICT

    model: Name
    """Name of the model in the registry."""
    options: dict[str, Any]
    """Arguments of the model's creation, the number of classes and the image size among them."""
    classes: list[Annotated[str, Len(0, 1000)]]
    """Names of the classes, one for each output of the head, or none."""
    preprocessing: dict[str, Any]
    """How images become inputs; see `vimtune.data.read_transform`."""
    task: Name = "classification"
    """What the model was trained for."""


def is_merged_file(path: Path) -> bool:
    """Whether `path` is a safetensors file with the metadata of a merged one."""
    if not path.is_file():
        return False
    try:
        return {"model", *_PARTS} <= read_metadata(path).keys()
    except SafetensorError:  # Whoever takes it for another kind of file says what is wrong with it.
        return False


def write_merged(path: Path, tensors: dict[str, Tensor], info: MergedInfo) -> None:
    """Write `tensors` (a `state_dict`) and `info` to `path`."""
    parts = {"options": info.options, "classes": info.classes, "preprocessing": info.preprocessing}
    metadata = {name: json.dumps(value) for name, value in parts.items()}
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    names = {"format": "pt", "model": info.model, "task": info.task}
    save_file(values, path, metadata={**names, **metadata})


def read_merged_info(path: Path) -> MergedInfo:
    """Read what a merged file says besides the weights.

    Raises:
        MergedFileError: truncated, or not of the form that this module describes.
    """
    shown = quote(str(path))
    try:
        metadata = read_metadata(path)
    except SafetensorError as error:
        raise MergedFileError(f"{shown} is truncated or not a safetensors file ({error})") from error
    parts: dict[str, Any] = {
        name: parse_json(metadata.get(name), f"{name} of {shown}", MergedFileError)
        for name in (*_PARTS, *(["options"] if "options" in metadata else []))
    }
    if "options" not in parts:  # An older file has none, and its other parts show the usual ones.
        sizes = {"num_classes": len(parts["classes"])} if isinstance(parts["classes"], list) else {}
        known = parts["preprocessing"] if isinstance(parts["preprocessing"], dict) else {}
        parts["options"] = sizes | {name: known[name] for name in ("img_size",) if name in known}
    names = {name: metadata[name] for name in ("model", "task") if name in metadata}
    return check(MergedInfo, {**names, **parts}, f"metadata of {shown}", MergedFileError)


def read_merged(path: Path) -> tuple[VisionMamba, MergedInfo]:
    """Build the model that a merged file holds, on the CPU and in training mode, and read the rest.

    Raises:
        MergedFileError: as `read_merged_info`, or weights that are not those of its model.
    """
    info, shown = read_merged_info(path), quote(str(path))
    tensors = read_tensors(path)
    model = create_listed_model(info.model, info.options, what=shown, error=MergedFileError)
    wanted = model.state_dict()
    if problems := unusable({name: value for name, value in tensors.items() if name in wanted}, wanted):
        raise MergedFileError(f"{shown}: {problems[0]}")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MergedFileError(f"{shown} does not hold the weights of its model: {quote(reason)}") from error
    return model, info
