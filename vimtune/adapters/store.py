"""One adapter, one file: tensors, head, class names, preprocessing, method, and the base it belongs to."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vimtune.adapters.identity import architecture_differences, base_identity, has_base
from vimtune.adapters.manage import (
    active_adapter,
    adapter_state_dict,
    delete_adapter,
    demand_adapter,
    inject,
    list_adapters,
    load_adapter_state_dict,
    set_adapter,
)
from vimtune.model_options import check_creation
from vimtune.utils import atomic_write

FORMAT = "vimtune-adapter"
VERSION = 1


class AdapterFileError(ValueError):
    """A file that is no adapter, is damaged, or belongs to another base model."""


@dataclass
class AdapterInfo:
    """Everything in an adapter file besides the tensors."""

    method: str
    options: dict[str, Any]
    targets: str | list[str] | None
    layers: list[int] | None
    num_classes: int
    base_hash: str
    """`BaseIdentity.bits`; in a file without `base_origin` the hash of the first format."""
    model: dict[str, Any]
    """{"name": registered model, "kwargs": its creation arguments}; empty if not created by name."""
    classes: list[str] = field(default_factory=list)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION
    base_origin: str = ""
    """`BaseIdentity.origin`."""


def save_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    classes: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> AdapterInfo:
    """Write the active adapter, or the one named, to one safetensors file; atomically.

    Args:
        model: a model with adapters.
        path: the file.
        name: which adapter.
        classes: class names, one per output of the head.
        preprocessing: how images become inputs; plain JSON values.
        extra: anything else worth keeping (recipe, scores); plain JSON values.
        tensors: values to write instead of the present ones, e.g. an average over training; keys as
            in `adapter_state_dict`.

    Raises:
        ValueError: no such adapter, or class names that do not match the head.
    """
    _, record = demand_adapter(model, name)
    classes = classes or []
    if classes and record.head and len(classes) != record.num_classes:
        raise ValueError(f"{len(classes)} class names for a head of {record.num_classes} outputs")
    base = base_identity(model, record.name)
    info = AdapterInfo(
        method=record.method,
        options=record.options,
        targets=record.targets,
        layers=record.layers,
        num_classes=record.num_classes,
        base_hash=base.bits,
        base_origin=base.origin,
        model=getattr(model, "creation", {}),
        classes=classes,
        preprocessing=preprocessing or {},
        extra=extra or {},
    )
    values = adapter_state_dict(model, record.name) if tensors is None else tensors
    values = {key: value.detach().cpu().contiguous() for key, value in values.items()}
    metadata = {"format": FORMAT, "info": json.dumps(dataclasses.asdict(info))}
    atomic_write(path, lambda temporary: save_file(values, temporary, metadata=metadata))
    return info


def read_adapter_info(path: str | Path) -> AdapterInfo:
    """Read what an adapter file says about itself, without a model and without its tensors.

    Raises:
        AdapterFileError: missing, truncated, or not an adapter file.
    """
    return _read(path, with_tensors=False)[0]


def _read(path: str | Path, with_tensors: bool) -> tuple[AdapterInfo, dict[str, Tensor]]:
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise AdapterFileError(f"adapter file {path} {kind}; expected the adapter.safetensors of a run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()} if with_tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterFileError(f"{path} is truncated or not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path} is not an adapter file of vimtune; load_checkpoint (--checkpoint) reads plain weights"
        )
    info = AdapterInfo(**json.loads(metadata["info"]))
    if info.version > VERSION:
        raise AdapterFileError(
            f"{path} has format version {info.version}; this vimtune reads up to {VERSION}"
        )
    info.model = check_creation(info.model, str(path), AdapterFileError)  # becomes arguments of a function
    return info, tensors


def load_adapter(
    model: nn.Module, path: str | Path, *, name: str | None = None, force: bool = False
) -> AdapterInfo:
    """Inject the adapter of a file, with its head, and make it the active one.

    Args:
        model: the base model that the adapter was trained on; its number of classes does not matter.
        path: a file written by `save_adapter`.
        name: the adapter's name on this model; the first free of "default", "default_2", ... if None.
        force: load it although the base weights differ.

    Raises:
        AdapterFileError: not an adapter file, or trained on other base weights (unless forced).
        ValueError: it does not fit the model's structure. The model is then as it was.
    """
    info, tensors = _read(path, with_tensors=True)
    differences = architecture_differences(info.model, model)
    if differences and not force:
        raise AdapterFileError(
            f"{path} was trained on {info.model['name']}, and this model is another: "
            f"{'; '.join(differences)}. Create that model, or pass force=True"
        )
    before = active_adapter(model)
    taken = list_adapters(model)
    if name is None:
        candidates = ["default", *(f"default_{index}" for index in range(2, len(taken) + 3))]
        name = next(candidate for candidate in candidates if candidate not in taken)
    inject(
        model,
        info.method,
        name=name,
        targets=info.targets,
        layers=info.layers,
        num_classes=info.num_classes or None,
        **info.options,
    )
    try:
        if not force and not has_base(model, info.base_hash, info.base_origin, name):
            of = f" of {info.model['name']}" if info.model else ""
            raise AdapterFileError(
                f"{path} was trained on other base weights{of} than this model has. Load the same "
                "pretrained weights first, or pass force=True"
            )
        load_adapter_state_dict(model, tensors, name)
    except ValueError:
        delete_adapter(model, name)
        set_adapter(model, None if before is None else before.name)
        raise
    return info
