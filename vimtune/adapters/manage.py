"""Adapters on a model: inject, switch, delete, disable, merge, and what is trained.

An adapter is a name and a set of rules (`rule.py`), one per adapted parameter; the classification
head always is one of them. At most one adapter is active. Who owns what is recorded on injection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vimtune.adapters.base import build_methods
from vimtune.adapters.rule import (
    SLOTS,
    Tuned,
    WeightRule,
    attach,
    base_parameters,
    base_value,
    detach,
    has_rules,
    iter_slots,
    join,
)
from vimtune.utils import suggest

Model = TypeVar("Model", bound=nn.Module)

_STATE = "_vimtune_adapters"


class DeadAdapterError(ValueError):
    """A trainable tensor of the active adapter got no gradient: it would never train."""


@dataclass
class AdapterRecord:
    """What was injected under one name."""

    name: str
    method: str
    options: dict[str, Any]
    targets: str | list[str] | None
    layers: list[int] | None
    num_classes: int
    head: list[str]
    """Paths of the head's parameters."""


@dataclass
class _State:
    """Bookkeeping of all adapters of one model, kept on the model itself."""

    requires_grad: dict[str, bool]
    """Flags of the base parameters before the first injection."""
    num_classes: int
    active: str | None = None
    records: dict[str, AdapterRecord] = field(default_factory=dict)


def _state(model: nn.Module) -> _State | None:
    return model.__dict__.get(_STATE)


def demand_adapter(model: nn.Module, name: str | None = None) -> tuple[_State, AdapterRecord]:
    """Bookkeeping of the model and record of the adapter `name` (the active one if None).

    Raises:
        ValueError: there is no such adapter.
    """
    state = _state(model)
    if state is None:
        raise ValueError("the model has no adapter; inject or load one first")
    name = state.active if name is None else name
    if name is None:
        raise ValueError(f"no adapter is active; known: {', '.join(state.records)}")
    if name not in state.records:
        known = ", ".join(state.records)
        raise ValueError(f"no adapter named {name!r}.{suggest(name, state.records)} Known: {known}")
    return state, state.records[name]


def inject(
    model: Model,
    method: str,
    *,
    name: str = "default",
    targets: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> Model:
    """Freeze the model and add an adapter, which becomes the active one.

    Args:
        model: the backbone, changed in place.
        method: a registered method ("prodial"), or several ("lora+bitfit").
        name: the adapter's name on this model.
        targets: where: "both", "in_proj", ["x_proj", "A_log"]; the method's own choice if None.
        layers: indices of the blocks to adapt; all if None.
        num_classes: outputs of this adapter's head; a copy of the model's head if None or equal.
        options: fields of the method, e.g. rank=16 (`method_fields` lists them).

    Returns:
        The model.

    Raises:
        ValueError: unknown method, option, target or layer, options that do not fit the weights, or a
            name already taken. The model is then as it was.
    """
    state = _state(model)
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter name {name!r} must be a plain identifier")
    if state is not None and name in state.records:
        raise ValueError(f"the model already has an adapter {name!r}; delete it first or choose another name")

    head = _head_parameters(model)
    rules: list[tuple[str, WeightRule]] = _build_head_rules(model, head, num_classes)
    for configured in build_methods(method, options):
        for path in configured.select(model, targets, layers):
            if path not in head:
                rules.append((path, configured.build_rule(path, _base_parameter(model, path))))
    if not rules:
        raise ValueError(
            f"method {method!r} would train nothing: the model has no head and no target was chosen"
        )

    # Nothing above has changed the model.
    if state is None:
        flags = {path: parameter.requires_grad for path, parameter in base_parameters(model)}
        state = _State(requires_grad=flags, num_classes=getattr(model, "num_classes", 0))
        model.__dict__[_STATE] = state
        for _, parameter in base_parameters(model):
            parameter.requires_grad_(False)
        model.register_load_state_dict_post_hook(_forgive_missing_adapters)
    for path, rule in rules:
        owner, leaf = _owner(model, path)
        attach(owner, leaf, name, rule)
    state.records[name] = AdapterRecord(
        name=name,
        method=method,
        options=options,
        targets=targets if targets is None or isinstance(targets, str) else list(targets),
        layers=None if layers is None else list(layers),
        num_classes=state.num_classes if num_classes is None else num_classes,
        head=head,
    )
    set_adapter(model, name)
    return model


def _forgive_missing_adapters(module: nn.Module, incompatible: Any) -> None:
    """A plain checkpoint loads strictly into a model with adapters: their tensors stay as they are."""
    ours = {path for path, _ in module.named_parameters()} - {path for path, _ in base_parameters(module)}
    if ours <= set(incompatible.missing_keys):
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in ours]


def _head_parameters(model: nn.Module) -> list[str]:
    """Paths of the classification head's parameters; none for models without one."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return []
    inside = {id(parameter) for parameter in get_classifier().parameters()}
    return [path for path, parameter in base_parameters(model) if id(parameter) in inside]


def _build_head_rules(
    model: nn.Module, head: list[str], num_classes: int | None
) -> list[tuple[str, WeightRule]]:
    rules: list[tuple[str, WeightRule]] = []
    for path in head:
        value = _base_parameter(model, path).detach()
        if num_classes is not None and num_classes != value.shape[0]:
            if num_classes < 1:
                raise ValueError(f"num_classes must be at least 1, got {num_classes}")
            value = value.new_zeros(num_classes, *value.shape[1:])
            if value.dim() > 1:
                nn.init.trunc_normal_(value, std=0.02)
        rules.append((path, Tuned(value)))
    return rules


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    module_path, _, parameter = path.rpartition(".")
    return model.get_submodule(module_path), parameter


def _base_parameter(model: nn.Module, path: str) -> nn.Parameter:
    return base_value(*_owner(model, path))


def _set_num_classes(model: nn.Module, num_classes: int) -> None:
    model.num_classes = num_classes  # type: ignore[assignment]  # timm's attribute, an int


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make the adapter `name` the active one; None switches to the base model.

    Only the active adapter's tensors require a gradient.
    """
    if name is None:
        state = _state(model)
        if state is None:
            return
    else:
        state, _ = demand_adapter(model, name)
    state.active = name
    for _, _, _, slot in iter_slots(model):
        slot.active = name
        for adapter, rule in slot.items():
            rule.requires_grad_(adapter == name)
    _set_num_classes(model, state.num_classes if name is None else state.records[name].num_classes)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, with its own head, for the duration of a block."""
    state = _state(model)
    active = None if state is None else state.active
    set_adapter(model, None)
    try:
        yield model
    finally:
        set_adapter(model, active)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on the model, in order of injection."""
    state = _state(model)
    return [] if state is None else list(state.records)


def active_adapter(model: nn.Module) -> AdapterRecord | None:
    """Record of the active adapter."""
    state = _state(model)
    return None if state is None or state.active is None else state.records[state.active]


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; after the last one the model is plain again.

    Deleting the active one leaves none active.
    """
    state, _ = demand_adapter(model, name)
    if state.active == name:
        set_adapter(model, None)
    for module in {id(owner): owner for _, owner, _, slot in iter_slots(model) if name in slot}.values():
        detach(module, name)
    del state.records[name]
    if not state.records:
        for path, parameter in base_parameters(model):
            parameter.requires_grad_(state.requires_grad[path])
        del model.__dict__[_STATE]


@torch.no_grad()
def merge(model: Model) -> Model:
    """Fold the active adapter into the weights and remove all adapters, in place.

    The result is a plain model with plain keys and the same output. A model without adapters is
    returned as it is.

    Raises:
        ValueError: no adapter is active, or a merged weight is not finite; the model is then as it was.
    """
    state = _state(model)
    if state is None:
        return model
    _, record = demand_adapter(model)
    merged: list[tuple[nn.Module, str, Tensor]] = []
    for path, owner, parameter, slot in iter_slots(model):
        weight = slot.effective(base_value(owner, parameter)).clone()
        if not torch.isfinite(weight).all():
            raise ValueError(f"adapter {record.name!r} makes {path} non-finite; nothing was merged")
        merged.append((owner, parameter, weight))
    for name in list(state.records):
        delete_adapter(model, name)
    for owner, parameter, weight in merged:
        base = base_value(owner, parameter)
        if base.shape == weight.shape:
            base.copy_(weight)
        else:
            owner._parameters[parameter] = nn.Parameter(weight, requires_grad=base.requires_grad)
    head = getattr(model, "get_classifier", lambda: None)()
    if isinstance(head, nn.Linear):
        head.out_features = record.num_classes
    _set_num_classes(model, record.num_classes)
    return model


@dataclass(frozen=True)
class AdaptedParameter:
    """One trained tensor of the active adapter."""

    name: str
    """Its name in `model.named_parameters()`."""
    parameter: nn.Parameter
    base_name: str
    """The base parameter that its rule acts on."""
    group: str
    """"head" or "adapter"."""
    weight_decay: bool
    """Whether decay makes sense: not for vectors, nor what the model exempts (`no_weight_decay`)."""

    @property
    def key(self) -> str:
        """Name without the adapter's: key in `adapter_state_dict`."""
        _, _, own = self.name.partition(f"{SLOTS}.{self.base_name.rpartition('.')[2]}.")
        return join(self.base_name, own.partition(".")[2])


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[AdaptedParameter]:
    """Trained tensors of the active adapter, or of the one named."""
    _, record = demand_adapter(model, name)
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    for path, _, leaf, slot in iter_slots(model):
        if record.name not in slot:
            continue
        prefix = join(join(path.rpartition(".")[0], SLOTS), f"{leaf}.{record.name}")
        for own, parameter in slot[record.name].named_parameters():
            yield AdaptedParameter(
                name=f"{prefix}.{own}",
                parameter=parameter,
                base_name=path,
                group="head" if path in record.head else "adapter",
                weight_decay=parameter.dim() > 1 and path not in exempt,
            )


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Every trained tensor of an adapter: "<base parameter>.<tensor of its rule>" -> tensor (detached)."""
    return {item.key: item.parameter.detach() for item in adapter_parameters(model, name)}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: dict[str, Tensor], name: str | None = None) -> None:
    """Copy tensors saved by `adapter_state_dict` into an adapter.

    Raises:
        ValueError: keys or shapes differ; nothing is loaded then.
    """
    own = {item.key: item.parameter for item in adapter_parameters(model, name)}
    problems = [f"missing {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - own.keys()]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError("the adapter's tensors do not fit: " + "; ".join(sorted(problems)[:4]) + more)
    for key, parameter in own.items():
        parameter.copy_(state[key])


def check_gradients(model: nn.Module) -> None:
    """After a backward pass, make sure that every trained tensor took part in it.

    Raises:
        DeadAdapterError: tensors without a gradient, all of them named.
    """
    dead = [item.name for item in adapter_parameters(model) if item.parameter.grad is None]
    if dead:
        names = ", ".join(dead[:6]) + (f" and {len(dead) - 6} more" if len(dead) > 6 else "")
        raise DeadAdapterError(
            f"{len(dead)} trainable tensor(s) got no gradient and would never train: {names}. "
            "The model does not read these parameters through their modules."
        )


@dataclass(frozen=True)
class AdapterSummary:
    """Sizes of a model under its active adapter."""

    method: str
    trainable: int
    """Trained numbers, head included."""
    head: int
    """Trained numbers of the head."""
    total: int
    """Numbers of the plain model, as after `merge`."""

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return (
            f"{self.method}: {self.trainable:,} of {self.total:,} parameters train ({share:.2f} %): "
            f"{self.trainable - self.head:,} of the adapter, {self.head:,} of the head"
        )


def summary(model: nn.Module) -> AdapterSummary:
    """Count trained and total parameters; without an adapter, everything that requires a gradient."""
    record = active_adapter(model)
    if record is None:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return AdapterSummary("no adapter", trainable, 0, sum(p.numel() for _, p in base_parameters(model)))
    sizes = [(item.group, item.parameter.numel()) for item in adapter_parameters(model)]
    total = sum(p.numel() for path, p in base_parameters(model) if path not in record.head)
    head = sum(size for group, size in sizes if group == "head")
    return AdapterSummary(record.method, sum(size for _, size in sizes), head, total + head)


def head_has_rules(model: nn.Module) -> bool:
    """Whether an adapter owns a parameter of the classification head."""
    return any(has_rules(_owner(model, path)[0]) for path in _head_parameters(model))
