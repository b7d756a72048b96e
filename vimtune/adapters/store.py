"""One adapter, one file: tensors, head, class names, preprocessing, method, and the base it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vimtune.adapters.identity import (
    BaseIdentity,
    architecture_differences,
    base_identity,
    has_base,
    replaced_identity,
)
from vimtune.adapters.info import (
    BOTH_DIRECTIONS,
    FORMAT,
    AdapterFileError,
    AdapterInfo,
    OtherBaseError,
    read_info,
    write_info,
)
from vimtune.adapters.manage import (
    AdapterRecord,
    active_adapter,
    add_adapter,
    base_num_classes,
    check_name,
    delete_adapter,
    demand_adapter,
    head_parameters,
    list_adapters,
    set_adapter,
)
from vimtune.adapters.points import Point, Points
from vimtune.adapters.sites import Sites, find_backbone, options_by_site, selected
from vimtune.adapters.tensors import adapter_state_dict, check_tensors, load_adapter_state_dict
from vimtune.adapters.wrappers import unwrap
from vimtune.files import atomic_write
from vimtune.methods import build_methods
from vimtune.parsers import given_file, given_path
from vimtune.run_folder import ADAPTER_FILE, PEFT_CONFIG, PEFT_TENSORS, what_a_folder_is
from vimtune.tensor_file import read_metadata, read_tensors
from vimtune.text import counted, printable, quote, suggest
from vimtune.weight_files import PLAIN_WEIGHTS, SAFETENSORS

FOR_PLAIN_WEIGHTS = (
    "plain weights, which name no classes, are for --model NAME --checkpoint FILE of train, evaluate and "
    "embed, for export, and in Python for load_checkpoint"
)
"""What to do with a file that is no adapter, for messages."""


def save_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    classes: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    base: BaseIdentity | None = None,
    replaced: BaseIdentity | None = None,
) -> AdapterInfo:
    """Write the active adapter, or the one named, to one safetensors file; atomically.

    Args:
        model: a model with adapters.
        path: the file.
        name: which adapter.
        classes: class names, one per output of the head.
        preprocessing: how images become inputs; arguments of `vimtune.data.build_transform`.
        extra: anything else worth keeping (recipe, scores); plain JSON values.
        tensors: values to write instead of the present ones, e.g. an average over training; keys as
            in `adapter_state_dict`.
        base: identity of the base weights (`base_identity`), for those who know it; found out if None.
        replaced: likewise, of the weights that the adapter replaces (`replaced_identity`).

    Raises:
        ValueError: no such adapter, class names that do not match the head, or anything else that could not
            be read back; no file is written then.
    """
    path = given_file(path)
    model = unwrap(model)
    _, record = demand_adapter(model, name)
    own = adapter_state_dict(model, record.name)
    values = own if tensors is None else tensors
    check_tensors(values, own)
    base = base_identity(model, record.name) if base is None else base
    replaced = replaced_identity(model, record.name) if replaced is None else replaced
    info = AdapterInfo(
        method=record.method,
        options=record.options,
        targets=record.targets,
        layers=record.layers,
        num_classes=record.num_classes,
        base_hash=base.bits,
        base_origin=base.origin,
        replaced_hash=replaced.bits,
        replaced_origin=replaced.origin,
        model=getattr(model, "creation", {}),
        classes=classes or [],
        preprocessing=preprocessing or {},
        extra=extra or {},
        sites=record.sites,
    )
    values = {key: value.detach().cpu().contiguous() for key, value in values.items()}
    metadata = {"format": FORMAT, "info": write_info(info, f"what adapter file {printable(str(path))} says")}
    atomic_write(path, lambda temporary: save_file(values, temporary, metadata=metadata))
    return info


def read_adapter_info(path: str | Path) -> AdapterInfo:
    """Read what an adapter file says about itself, without a model and without its tensors.

    Raises:
        AdapterFileError: missing, truncated, not an adapter file, or one that does not fit the schema.
    """
    return _read(path, with_tensors=False)[0]


def read_adapter(path: str | Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Read an adapter file without a model: what it says about itself, and its tensors, on the CPU.

    Raises:
        AdapterFileError: as `read_adapter_info`.
    """
    return _read(path, with_tensors=True)


def _read(path: str | Path, with_tensors: bool) -> tuple[AdapterInfo, dict[str, Tensor]]:
    path = given_path("path", path, "an adapter file, or of the folder of a run")
    if path.is_dir():
        path /= ADAPTER_FILE
    shown = f"adapter file {printable(str(path))}"
    if not path.is_file():  # This keeps us from waiting for a pipe, among others.
        if path.name == ADAPTER_FILE and path.parent.is_dir():
            raise AdapterFileError(what_a_folder_is(path.parent))
        kind = "is no regular file" if path.exists() else "does not exist"
        raise AdapterFileError(f"{shown} {kind}; expected the folder of a run, or its {ADAPTER_FILE}")
    try:
        metadata, tensors = read_metadata(path), read_tensors(path) if with_tensors else {}
    except SafetensorError as error:
        if path.suffix.lower() not in PLAIN_WEIGHTS:
            expected = f"expected the folder of a run, or its {ADAPTER_FILE}"
            raise AdapterFileError(f"{printable(str(path))} is no adapter file; {expected}") from error
        other = "" if path.suffix.lower() == SAFETENSORS else f"; {FOR_PLAIN_WEIGHTS}"
        raise AdapterFileError(f"{shown} is truncated or not a safetensors file ({error}){other}") from error
    except OSError as error:
        raise AdapterFileError(f"{shown} cannot be read: {error.strerror or error}") from error
    if metadata.get("format") != FORMAT:
        if path.name == PEFT_TENSORS and (path.parent / PEFT_CONFIG).is_file():
            raise AdapterFileError(what_a_folder_is(path.parent))
        raise AdapterFileError(f"{shown} is not one of vimtune; {FOR_PLAIN_WEIGHTS}")
    return read_info(metadata.get("info"), shown), tensors


def load_adapter(
    model: nn.Module, path: str | Path, *, name: str | None = None, force: bool = False
) -> AdapterInfo:
    """Inject the adapter of a file, with its head, and make it the active one.

    Args:
        model: the base model that the adapter was trained on; its number of classes does not matter. Wrappers
            are seen through as in `inject`.
        path: a file written by `save_adapter`, or the folder of a run.
        name: the adapter's name on this model; the first free of "default", "default_2", ... if None.
        force: load it although the base weights differ.

    Raises:
        AdapterFileError: not an adapter file, one that does not fit the model's structure, or one trained on
            other base weights (unless forced).
        ValueError: the model cannot take an adapter, or the name is taken. In any case it is as it was.
    """
    model = find_backbone(model)
    info, tensors = read_adapter(path)
    demand_architecture(model, path, info, force)
    name = free_name(model) if name is None else check_name(model, name)
    with refusing(path):
        record = _record(model, info, tensors, name)
    with added(model, record, partial(refusing, path)):
        if not force and not has_base(model, info.base_hash, info.base_origin, name):
            raise other_base(path, info)
        with refusing(path):
            load_adapter_state_dict(model, tensors, name)
    return info


@contextmanager
def added(
    model: nn.Module,
    record: AdapterRecord,
    blaming: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[None]:
    """Within the block the model has the adapter that a file describes, for whoever gives it its values;
    where the block fails, the model is as it was.

    Args:
        model: the backbone, no wrapper.
        record: the adapter.
        blaming: surrounds what may find that the file does not fit the model.
    """
    before = active_adapter(model)
    with blaming():
        # Files may have dropout where it has no effect; the outputs of such an adapter are right without.
        add_adapter(model, record, accept_idle=True)
    try:
        yield
    except BaseException:  # Whatever it is, it goes on, but the model is as it was.
        delete_adapter(model, record.name)
        set_adapter(model, None if before is None else before.name)
        raise


def demand_architecture(model: nn.Module, path: str | Path, info: AdapterInfo, force: bool) -> None:
    """Make sure that a model is built like the one of an adapter file, unless that is forced.

    Raises:
        OtherBaseError: it is not; the message says in what it differs.
    """
    differences = architecture_differences(info.model, model)
    if differences and not force:
        raise OtherBaseError(
            f"{printable(str(path))} was trained on {info.model['name']}, and this model is another: "
            f"{'; '.join(differences)}. Create that model, or pass force=True (on the command line: --force)"
        )


def other_base(path: str | Path, info: AdapterInfo) -> OtherBaseError:
    """The refusal of an adapter file for the base weights of a model."""
    of = f" of {info.model['name']}" if info.model else ""
    return OtherBaseError(
        f"{printable(str(path))} was trained on other base weights{of} than this model has. Load the "
        "same pretrained weights first, or pass force=True (on the command line: --checkpoint, or --force)"
    )


def check_head(info: AdapterInfo, tensors: Mapping[str, Tensor], head: Sequence[str]) -> None:
    """Compare a file with a model in whether they have a classification head; its size does not matter.

    Args:
        info, tensors: what the file holds.
        head: paths of the parameters of the model's head; none for a model without one.

    Raises:
        ValueError: one of the two has a head alone.
    """
    if info.num_classes and not head:
        raise ValueError(
            f"it has a head of {counted(info.num_classes, 'outputs')}, and the model has none: create the "
            "model with a head (language tasks: head = 'classifier')"
        )
    if head and not any(f"{path}.value" in tensors for path in head):
        raise ValueError(
            "it has no head, and the model has one: create the model without (language tasks: head = "
            "'likelihood')"
        )


@contextmanager
def refusing(path: str | Path) -> Iterator[None]:
    """Errors within the block are those of the file at `path`."""
    try:
        yield
    except ValueError as error:
        raise AdapterFileError(f"{printable(str(path))} does not fit the model: {error}") from error


def free_name(model: nn.Module) -> str:
    """The first of "default", "default_2", ... that no adapter of a model (no wrapper) has."""
    taken = list_adapters(model)
    candidates = ["default", *(f"default_{index}" for index in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _record(model: nn.Module, info: AdapterInfo, tensors: dict[str, Tensor], name: str) -> AdapterRecord:
    """What a file describes, as a record of this model.

    Raises:
        ValueError: parameters that the model does not have, or a head of another size than the file says.
    """
    head = head_parameters(model)
    check_head(info, tensors, head)
    num_classes = info.num_classes or base_num_classes(model)
    # This is checked before a head of that size is made.
    for path in head if num_classes != base_num_classes(model) else ():
        tensor = tensors.get(f"{path}.value")
        if tensor is None or tensor.shape[:1] != (num_classes,):
            raise ValueError(f"it says {num_classes} classes, but has no such tensor for {path}")
    sites = _sites(model, info, tensors, head)
    return AdapterRecord(
        name=name,
        method=info.method,
        options=info.options if info.version >= BOTH_DIRECTIONS else _options_by_path(info, sites),
        targets=info.targets,
        layers=info.layers,
        sites=sites,
        num_classes=num_classes,
        head=head,
    )


def _options_by_path(info: AdapterInfo, sites: Sites) -> dict[str, dict[str, Any]]:
    """The options of a file whose targets meant one direction of a scan, with paths for the targets of single
    options: those mean the same in all versions."""
    options: dict[str, dict[str, Any]] = {name: {**own} for name, own in info.options.items()}
    for chosen in build_methods(info.method, info.options):
        own = options[chosen.method.name]
        own |= {field: {} for field in chosen.by_target}
        by_site = options_by_site(chosen.method, chosen.by_target, sites[chosen.method.name], {})
        for path, values in by_site.items():
            for field, value in values.items():
                own[field][path] = value
    return options


def _sites(model: nn.Module, info: AdapterInfo, tensors: dict[str, Tensor], head: list[str]) -> Sites:
    """The adapted parameters by method; those of version 1 are found again as they had been chosen."""
    points = Points(model)
    if info.sites is None:
        paths = [path for path in points.parameters if path not in head]
        adapted = {path for path in paths if any(key.startswith(f"{path}.") for key in tensors)}
        return {
            chosen.method.name: [
                path for path in selected(chosen.method, points, info.targets, info.layers) if path in adapted
            ]
            for chosen in build_methods(info.method, info.options)
        }
    for own in info.sites.values():
        for path in own:
            _check_point(points, path, head)
            if own.count(path) > 1:
                raise ValueError(f"it adapts {quote(path)} twice by one method")
    return info.sites


def _check_point(points: Points, path: str, head: list[str]) -> None:
    """Raise ValueError unless the model has such a point and it may be adapted."""
    point = Point.parse(path)
    known = [*points.calls] if point.is_call else [name for name in points.parameters if name not in head]
    place = path if point.is_call else point.place
    if place not in known:
        kind = "call" if point.is_call else "parameter"
        raise ValueError(f"it adapts {quote(path)}, which is no {kind} to adapt.{suggest(path, known)}")
    if point.rows is not None and point.rows not in points.rows.get(place, ()):
        rows = ", ".join(points.rows.get(place, ())) or "none"
        raise ValueError(f"it adapts {quote(path)}, but the named rows of that parameter are: {rows}")
