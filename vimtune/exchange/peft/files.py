"""The folder of an adapter in HF peft's format: writing one from a model, and reading one into a model."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vimtune.adapters.info import AdapterFileError
from vimtune.adapters.manage import (
    AdapterRecord,
    base_num_classes,
    check_name,
    demand_adapter,
    head_parameters,
)
from vimtune.adapters.points import Points
from vimtune.adapters.rule import CallRule, Tuned, WeightRule
from vimtune.adapters.sites import find_backbone, one_or_by_site
from vimtune.adapters.slots import iter_slots, join, point_path
from vimtune.adapters.store import added, free_name
from vimtune.adapters.tensors import adapter_state_dict, load_adapter_state_dict
from vimtune.adapters.wrappers import unwrap
from vimtune.exchange.peft import FORMS
from vimtune.exchange.peft.form import AdaptedModule, GivenModule, PeftForm, Translated
from vimtune.exchange.peft.targets import compare_targets, state_targets
from vimtune.files import read_regular_file
from vimtune.methods import get_method, method_names, resolve_options
from vimtune.output import write_folder
from vimtune.parsers import given_path
from vimtune.run_folder import PEFT_CONFIG, PEFT_TENSORS
from vimtune.schema import check, parse_json
from vimtune.tensor_file import read_tensors
from vimtune.text import quote

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
"""What HF peft writes before the path of every module."""
MAX_CONFIG = 2**24
"""Bytes of a file of settings that are read."""
_ON_THE_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""The name of a model on the hub, which is no path of this computer."""
_OFF: tuple[Any, ...] = (None, False, [], {})
"""Values of a setting that is off."""


# --- writing


def save_peft(
    model: nn.Module, folder: str | Path, *, name: str | None = None, base_model: str | None = None
) -> None:
    """Write the active adapter, or the one named, as HF peft does: `adapter_config.json` and
    `adapter_model.safetensors`, in a new folder.

    The head of a classifier is among the tensors (`modules_to_save`). What HF peft has no place for, such as
    class names and preprocessing, is only in vimtune's own files.

    Args:
        model: a model with adapters.
        folder: a folder that is empty or not there yet.
        name: which adapter.
        base_model: name of the base model on the hub; that of a model of transformers if None.

    Raises:
        ValueError: no such adapter, or one that HF peft cannot express; nothing is written then.
    """
    folder = given_path("folder", folder, "a new folder")
    backbone = unwrap(model)
    _, record = demand_adapter(backbone, name)
    form, peft_type = _form_of(record)
    adapted = _adapted_modules(backbone, record)
    written = form.write(adapted)
    head = {path: rule.value for path, rule in _head_rules(backbone, record)}
    modules_to_save = list(dict.fromkeys(path.rpartition(".")[0] for path in head))
    settings = {
        "peft_type": peft_type,
        "task_type": None,
        "base_model_name_or_path": base_model if base_model is not None else _name_on_hub(backbone),
        "inference_mode": True,
        "target_modules": state_targets(backbone, [module.path for module in adapted]),
        "modules_to_save": modules_to_save or None,
        **written.settings,
    }
    check(form.config, settings, "the settings for HF peft")
    _warn_of_read(backbone, [module.path for module in adapted])
    tensors = {
        PREFIX + path: value.detach().cpu().clone().contiguous()
        for path, value in {**written.tensors, **head}.items()
    }

    def write(temporary: Path) -> None:
        (temporary / PEFT_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
        save_file(tensors, temporary / PEFT_TENSORS, metadata={"format": "pt"})

    write_folder(Path(folder), write)


def _form_of(record: AdapterRecord) -> tuple[PeftForm, str]:
    """The type under which HF peft has the methods of an adapter, and its name.

    Raises:
        ValueError: it does not have them, or several types would be needed.
    """
    names = method_names(record.method)
    types = {name: get_method(name).peft_type for name in names}
    known = set(types.values()) - {None}
    for name, peft_type in types.items():
        if peft_type is None:
            raise ValueError(
                f"method {name!r} does not exist in HF peft, so that adapter {record.name!r} cannot be "
                "written for it: write vimtune's own file (save_adapter), or merge the adapter"
            )
    if len(known) > 1:
        raise ValueError(
            f"adapter {record.name!r} ({record.method}) needs the types {', '.join(sorted(map(str, known)))} "
            "of HF peft, which has one for an adapter: write vimtune's own file, or merge the adapter"
        )
    (peft_type,) = known
    return FORMS.get(str(peft_type)), str(peft_type)


def _adapted_modules(model: nn.Module, record: AdapterRecord) -> list[AdaptedModule]:
    """The modules whose weights the adapter changes, without the head.

    Raises:
        ValueError: it changes something else.
    """
    tied = Points(model).tied
    found = []
    for place, owner, name, slot in iter_slots(model):
        path = point_path(place, name)
        if record.name not in slot or path in record.head:
            continue
        rule = slot[record.name]
        if isinstance(rule, CallRule) or name != "weight":
            raise ValueError(
                f"adapter {record.name!r} acts on {path}, and HF peft adapts the weights of modules alone: "
                "choose other targets, write vimtune's own file, or merge the adapter"
            )
        _refuse_tied(path, tied)
        found.append(AdaptedModule(place, owner, owner._parameters[name], cast(WeightRule, rule)))  # type: ignore[arg-type]
    if not found:
        raise ValueError(f"adapter {record.name!r} changes no weight, so that there is nothing for HF peft")
    return found


def _refuse_tied(path: str, tied: Mapping[str, str]) -> None:
    """Raise ValueError for a weight that modules share: HF peft would change it in one of them."""
    others = [other for other, first in tied.items() if path in (first, other)]
    if others:
        raise ValueError(
            f"{path} and {others[0]} are one weight, which an adapter here changes for all who read it and "
            "HF peft for one module: leave it out, or untie the weights"
        )


def _head_rules(model: nn.Module, record: AdapterRecord) -> Iterator[tuple[str, Tuned]]:
    for place, _, name, slot in iter_slots(model):
        path = join(place, name)
        if path in record.head:
            yield path, cast(Tuned, slot[record.name])


def _name_on_hub(model: nn.Module) -> str | None:
    """Name of a model of transformers on the hub; None for any other, and for one that came from a folder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    is_name = isinstance(name, str) and _ON_THE_HUB.fullmatch(name) and not Path(name).exists()
    return name if is_name else None


def _warn_of_read(model: nn.Module, paths: Sequence[str]) -> None:
    """Say where HF peft itself would not act, because the model reads a weight instead of calling its
    module."""
    points = Points(model)
    read = [path for path in paths if path in points.read]
    if read:
        logger.warning(
            "the model reads the weight of %s and %d more: HF peft acts where a module is called, and would "
            "refuse these or have no effect there; vimtune reads them back",
            read[0],
            len(read) - 1,
        )


# --- reading


def load_peft(model: nn.Module, folder: str | Path, *, name: str | None = None) -> AdapterRecord:
    """Inject the adapter of a folder in HF peft's format, and make it the active one.

    The tensors of the file say which modules are adapted. HF peft's files do not say which base weights they
    belong to, so that nobody can check it.

    Args:
        model: the base model that the adapter was trained on. Wrappers are seen through as in `inject`.
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: the adapter's name on this model; the first free of "default", "default_2", ... if None.

    Returns:
        What was injected.

    Raises:
        AdapterFileError: no such folder, settings or tensors that have no counterpart here, or a model that
            they do not fit. The model is then as it was.
        ValueError: the model cannot take an adapter, or the name is taken.
    """
    backbone = find_backbone(model)
    folder = given_path("folder", folder, "a folder that HF peft has written", AdapterFileError)
    settings, tensors = _read(folder)
    name = free_name(backbone) if name is None else check_name(backbone, name)
    form = FORMS.get(settings["peft_type"])
    config = check(form.config, settings, f"{PEFT_CONFIG} in {quote(str(folder))}", AdapterFileError)
    with _refusing(folder):
        given, head = _sort_out(backbone, form, tensors)
        compare_targets(backbone, config, [module.path for module in given])
        translated = form.read(config, given)
        record = _record(backbone, translated, head, name)
    with added(backbone, record, lambda: _refusing(folder)), _refusing(folder):
        values = {
            f"{path}.weight.{own}": value
            for path, named in translated.tensors.items()
            for own, value in named.items()
        }
        values |= {f"{path}.value": value for path, value in head.items()}
        if not head:  # The file leaves the head as it is.
            own = adapter_state_dict(backbone, name)
            values |= {f"{path}.value": own[f"{path}.value"] for path in record.head}
        load_adapter_state_dict(backbone, values, name)
    return record


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Errors within the block are those of a folder."""
    try:
        yield
    except ValueError as error:
        raise AdapterFileError(f"the adapter of HF peft in {quote(str(folder))}: {error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings, as `read_settings` returns them, and tensors of a folder.

    Raises:
        AdapterFileError: they are not there, or not what they should be.
    """
    settings, shown = read_settings(folder), quote(str(folder))
    try:
        return settings, read_tensors(folder / PEFT_TENSORS)
    except SafetensorError as error:
        raise AdapterFileError(
            f"{PEFT_TENSORS} in {shown} is truncated or of another kind ({error})"
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{shown} cannot be read: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder whose type is one of `FORMS`, without those that are off and unknown here.

    Raises:
        AdapterFileError: they or the tensors are not there, or the settings are not what they should be.
    """
    shown = quote(str(folder))
    if not (folder / PEFT_CONFIG).is_file():
        raise AdapterFileError(f"{shown} has no {PEFT_CONFIG}: expected a folder that HF peft has written")
    if not (folder / PEFT_TENSORS).is_file():
        raise AdapterFileError(
            f"{shown} has no {PEFT_TENSORS}: expected that file (of an adapter_model.bin, which can run "
            "code, HF peft makes one: load it there and save it again)"
        )
    try:
        text = read_regular_file(folder / PEFT_CONFIG, MAX_CONFIG).decode("utf-8")
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{shown} cannot be read: {error}") from error
    what = f"{PEFT_CONFIG} in {shown}"
    settings: Any = parse_json(text, what, AdapterFileError)
    peft_type = settings.get("peft_type") if isinstance(settings, dict) else None
    if peft_type not in FORMS:
        # A name that is alike is not suggested: by it the tensors would mean something else.
        known_types = ", ".join(FORMS)
        raise AdapterFileError(
            f"{what}: peft_type is {quote(peft_type)}: expected one of {known_types}, which can be read here"
        )
    known = {field.name for field in dataclasses.fields(FORMS.get(settings["peft_type"]).config)}
    return {key: value for key, value in settings.items() if key in known or value not in _OFF}


def _sort_out(
    model: nn.Module, form: PeftForm, tensors: Mapping[str, Tensor]
) -> tuple[list[GivenModule], dict[str, Tensor]]:
    """The tensors of a file by module, and those of the head by path.

    Raises:
        ValueError: a tensor of neither, or a module that the model does not have.
    """
    head, tied = head_parameters(model), Points(model).tied
    modules = dict(model.named_modules())
    by_module: dict[str, dict[str, Tensor]] = {}
    of_head: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        name = next((name for name in form.names if path.endswith(f".{name}")), None)
        place = path.removesuffix(f".{name}")
        if path in head:
            of_head[path] = tensor
        elif path == key or name is None:
            raise ValueError(
                f"unexpected tensor {quote(key)}: expected {PREFIX}, a module, and "
                f"{' or '.join(form.names)}, or the classification head of this model"
            )
        elif place not in modules or join(place, "weight") in head:
            raise ValueError(f"it adapts {quote(place)}, which is no module to adapt of this model")
        else:
            _refuse_tied(join(place, "weight"), tied)
            by_module.setdefault(place, {})[name] = tensor
    if not by_module:
        raise ValueError("it adapts no module")
    order = [path for path in modules if path in by_module]
    return [GivenModule(path, modules[path], by_module[path]) for path in order], of_head


def _record(model: nn.Module, translated: Translated, head: Mapping[str, Tensor], name: str) -> AdapterRecord:
    """What a file describes, as a record of this model."""
    sites = [join(path, "weight") for path in translated.options]
    options: dict[str, Any] = {}
    for field in next(iter(translated.options.values())):
        values = {join(path, "weight"): own[field] for path, own in translated.options.items()}
        options[field] = one_or_by_site(values)
    outputs = {len(tensor) for tensor in head.values() if tensor.dim()}
    if len(outputs) > 1:
        raise ValueError(f"its head has tensors of {' and '.join(map(str, sorted(outputs)))} outputs")
    return AdapterRecord(
        name=name,
        method=translated.method,
        options=resolve_options(translated.method, options),
        targets=sites,
        layers=None,
        sites={translated.method: sites},
        num_classes=outputs.pop() if outputs else base_num_classes(model),
        head=head_parameters(model),
    )
