"""Adapters on a model: inject, switch, delete, disable, merge.

An adapter is a name and a set of rules (`rule.py`), one per adapted parameter; the classification
head always is one of them. At most one adapter is active. Who owns what is recorded on injection.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vimtune import parsers
from vimtune.adapters.base import Method, build_methods, resolve_options
from vimtune.adapters.rule import (
    Tuned,
    WeightRule,
    acts_on_input_when,
    attach,
    base_parameters,
    base_value,
    detach,
    has_rules,
    iter_slots,
    rule_prefixes,
)
from vimtune.adapters.sites import (
    Layers,
    Sites,
    Targets,
    build_rules,
    check_sites,
    find_backbone,
    find_owner,
    parse_layers,
    parse_targets,
    select_sites,
)
from vimtune.adapters.wrappers import RECORD, unwrap
from vimtune.text import quote
from vimtune.utils import suggest

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class AdapterRecord:
    """What was injected under one name."""

    name: str
    method: str
    options: dict[str, dict[str, Any]]
    """Every field of each method, defaults included."""
    targets: Targets
    """The targets as they were given."""
    layers: Layers
    """The layers as they were given."""
    sites: Sites
    """What targets and layers meant on this model."""
    num_classes: int
    head: list[str]
    """Paths of the head's parameters."""


@dataclass
class _State:
    """Bookkeeping of all adapters of one model, kept on the model itself."""

    requires_grad: dict[str, bool]
    """Flags of the base parameters before the first injection."""
    num_classes: int
    loading: RemovableHandle
    """Handle of the hook that lets plain checkpoints load."""
    active: str | None = None
    records: dict[str, AdapterRecord] = field(default_factory=dict)


def _state(model: nn.Module) -> _State | None:
    return model.__dict__.get(RECORD)


def demand_adapter(model: nn.Module, name: str | None = None) -> tuple[_State, AdapterRecord]:
    """Bookkeeping of the model (no wrapper) and record of the adapter `name` (the active one if None).

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
        raise ValueError(f"no adapter named {quote(name)}.{suggest(str(name), state.records)} Known: {known}")
    return state, state.records[name]


def inject(
    model: Model,
    method: str,
    *,
    name: str = "default",
    targets: Any = None,
    layers: Any = None,
    num_classes: int | None = None,
    **options: Any,
) -> Model:
    """Freeze the model and add an adapter, which becomes the active one.

    Args:
        model: the backbone, changed in place; wrappers by torch.compile, DataParallel and timm's
            features_only are seen through.
        method: a registered method ("prodial"), or several ("lora+bitfit").
        name: the adapter's name on this model.
        targets: where: "both", "in_proj", ["x_proj", "A_log"]; the method's own choice if None. Several
            methods may have targets of their own: {"lora": "both", "ft": "A_log,D"}.
        layers: indices of the blocks to adapt, [0, 1] or "0-1"; all if None. By method as well.
        num_classes: outputs of this adapter's head; a copy of the model's head if None or equal.
        options: fields of the method, e.g. rank=16 (`method_fields` lists them).

    Returns:
        The model, as it was given.

    Raises:
        ValueError: unknown method, option, target or layer, options that do not fit the weights, a rule that
            would have no effect, a model that rules cannot be attached to, or a name already taken. The
            model is then as it was.
    """
    backbone = find_backbone(model)
    methods = build_methods(method, options)
    targets, layers = parse_targets(targets), parse_layers(layers)
    add_adapter(
        backbone,
        AdapterRecord(
            name=name,
            method=method,
            options=resolve_options(method, options),
            targets=targets,
            layers=layers,
            sites=select_sites(backbone, methods, targets, layers, head_parameters(backbone)),
            num_classes=_check_num_classes(backbone, num_classes),
            head=head_parameters(backbone),
        ),
    )
    return model


def _check_num_classes(model: nn.Module, num_classes: int | None) -> int:
    if num_classes is None:
        return base_num_classes(model)
    try:
        return parsers.integer(1)(num_classes)
    except ValueError as error:
        raise ValueError(f"num_classes = {quote(num_classes)}: {error}") from None


def base_num_classes(model: nn.Module) -> int:
    """Outputs of the model's own head, whatever adapter is active; 0 for a model that does not tell."""
    state = _state(model)
    return getattr(model, "num_classes", 0) if state is None else state.num_classes


def check_name(model: nn.Module, name: str) -> str:
    """`name`, if an adapter of that name can be added to a model (no wrapper).

    Raises:
        ValueError: it is no plain identifier, or taken.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter name {quote(name)} must be a plain identifier")
    if name in list_adapters(model):
        raise ValueError(f"the model already has an adapter {name!r}; delete it first or choose another name")
    return name


def add_adapter(model: nn.Module, record: AdapterRecord, accept_idle: bool = False) -> None:
    """Attach the rules that `record` describes to a model and make the adapter the active one.

    Args:
        model: the backbone, no wrapper.
        record: method, sites and head of the adapter.
        accept_idle: let rules pass that are without effect in part.

    Raises:
        ValueError: it does not fit the model, which is then as it was.
    """
    name, state = check_name(model, record.name), _state(model)
    check_sites(model, [*record.head, *(path for paths in record.sites.values() for path in paths)])
    methods: list[Method] = build_methods(record.method, record.options)
    rules = _build_head_rules(model, record) | build_rules(model, methods, record.sites, accept_idle)
    if not rules:
        raise ValueError(
            f"method {record.method!r} would train nothing: the model has no head and no target was chosen"
        )

    # Nothing above has changed the model.
    if state is None:
        state = _State(
            requires_grad={path: parameter.requires_grad for path, parameter in base_parameters(model)},
            num_classes=base_num_classes(model),
            loading=model.register_load_state_dict_pre_hook(_keep_missing_adapters),
        )
        model.__dict__[RECORD] = state
        for _, parameter in base_parameters(model):
            parameter.requires_grad_(False)
    for path, rule in rules.items():
        owner, leaf = find_owner(model, path)
        attach(owner, leaf, name, rule)
    state.records[name] = record
    _activate(model, state, name)
    _forget_compiled()


def _forget_compiled() -> None:
    """Have torch.compile look anew at whatever it has compiled: the compiler of torch 2.11 does not notice
    that a module has got rules or lost them, and would go on with the model as it was."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _keep_missing_adapters(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A plain checkpoint loads strictly into a model with adapters: their tensors stay as they are.

    `prefix` is the path of the model in the module whose `load_state_dict` was called.
    """
    inside = rule_prefixes(module)
    own = module.state_dict(keep_vars=True).items()
    ours = {prefix + name: tensor for name, tensor in own if name.startswith(inside)}
    have_values = not any(tensor.is_meta for tensor in ours.values())
    if have_values and state_dict.keys().isdisjoint(ours):
        state_dict.update(ours)


def head_parameters(model: nn.Module) -> list[str]:
    """Paths of the classification head's parameters; none for models without one."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return []
    inside = {id(parameter) for parameter in get_classifier().parameters()}
    return [path for path, parameter in base_parameters(model) if id(parameter) in inside]


def _build_head_rules(model: nn.Module, record: AdapterRecord) -> dict[str, WeightRule]:
    """A copy of the model's head, or a fresh head if it has another number of outputs."""
    rules: dict[str, WeightRule] = {}
    for path in record.head:
        value = base_value(*find_owner(model, path)).detach()
        if record.num_classes not in (base_num_classes(model), value.shape[0]):
            value = value.new_zeros(record.num_classes, *value.shape[1:])
            if value.dim() > 1:
                nn.init.trunc_normal_(value, std=0.02)
        rules[path] = Tuned(value)
    return rules


def _set_num_classes(model: nn.Module, num_classes: int) -> None:
    model.num_classes = num_classes  # type: ignore[assignment]  # timm's attribute, an int


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make the adapter `name` the active one; None switches to the base model.

    Only the active adapter's tensors require a gradient. Which adapter is active is a state of the model,
    like its training mode, and not of the thread: all threads that use the model see the change, also in
    the middle of a pass. Threads that want different adapters need a copy of the model each
    (`copy.deepcopy`). A backward pass that recomputes activations (gradient checkpointing) has to run under
    the adapter of its forward pass.

    Raises:
        ValueError: there is no such adapter, or the model is under DistributedDataParallel.
    """
    model = unwrap(model, retrains=True)
    if name is not None:
        demand_adapter(model, name)
    state = _state(model)
    if state is not None:
        _activate(model, state, name)


def _activate(model: nn.Module, state: _State, name: str | None) -> None:
    state.active = name
    for _, _, _, slot in iter_slots(model):
        slot.active = name
        for adapter, rule in slot.items():
            rule.requires_grad_(adapter == name)
    _set_num_classes(model, state.num_classes if name is None else state.records[name].num_classes)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """The base model, with its own head, for the duration of a block.

    Afterwards, also after an exception, the adapter that was active before is active again and its tensors
    require a gradient as they did, unless it was deleted meanwhile. As with `set_adapter` all threads that
    use the model see the base model.
    """
    backbone = unwrap(model)
    state = _state(backbone)
    if state is None:
        yield model
        return
    active = state.active
    slots = [slot for _, _, _, slot in iter_slots(backbone)]
    flags = [(parameter, parameter.requires_grad) for slot in slots for parameter in slot.parameters()]
    _activate(backbone, state, None)
    try:
        yield model
    finally:
        if _state(backbone) is state and (active is None or active in state.records):
            _activate(backbone, state, active)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on the model, in order of injection."""
    state = _state(unwrap(model))
    return [] if state is None else list(state.records)


def active_adapter(model: nn.Module) -> AdapterRecord | None:
    """Record of the active adapter."""
    state = _state(unwrap(model))
    return None if state is None or state.active is None else state.records[state.active]


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; after the last one the model is plain again.

    Deleting the active one leaves none active.

    Raises:
        ValueError: there is no such adapter, or the model is under DistributedDataParallel.
    """
    model = unwrap(model, retrains=True)
    state, _ = demand_adapter(model, name)
    if state.active == name:
        _activate(model, state, None)
    for module in {id(owner): owner for _, owner, _, slot in iter_slots(model) if name in slot}.values():
        detach(module, name)
    del state.records[name]
    if not state.records:
        for path, parameter in base_parameters(model):
            parameter.requires_grad_(state.requires_grad[path])
        state.loading.remove()
        del model.__dict__[RECORD]
    _forget_compiled()


@torch.no_grad()
def merge(model: Model) -> Model:
    """Fold the active adapter into the weights and remove all adapters, in place.

    The result is a plain model with plain keys and the same output in evaluation mode. A model without
    adapters is returned as it is; wrappers by torch.compile, DataParallel and timm's features_only are
    seen through and returned.

    Raises:
        ValueError: no adapter is active, a rule acts on the input in evaluation, a merged weight is not
            finite, or the model is under DistributedDataParallel; the model is then as it was.
    """
    backbone = unwrap(model, retrains=True)
    state = _state(backbone)
    if state is None:
        return model
    _, record = demand_adapter(backbone)
    merged: list[tuple[nn.Module, str, Tensor]] = []
    for path, owner, parameter, slot in iter_slots(backbone):
        rule, base = slot.rule, base_value(owner, parameter)
        if rule is not None and acts_on_input_when(rule, training=False):
            raise ValueError(
                f"adapter {record.name!r} ({record.method}) acts on the input of {path} in evaluation, too, "
                "which no weight can express; nothing was merged"
            )
        weight = slot.effective(base).to(base.dtype, copy=True)
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f"adapter {record.name!r} makes {path} non-finite; nothing was merged")
        merged.append((owner, parameter, weight))
    for name in list(state.records):
        delete_adapter(backbone, name)
    for owner, parameter, weight in merged:
        base = base_value(owner, parameter)
        if base.shape == weight.shape:
            base.copy_(weight)
        else:
            owner._parameters[parameter] = nn.Parameter(weight, requires_grad=base.requires_grad)
    head = getattr(backbone, "get_classifier", lambda: None)()
    if isinstance(head, nn.Linear):
        head.out_features = record.num_classes
    _set_num_classes(backbone, record.num_classes)
    return model


def head_has_rules(model: nn.Module) -> bool:
    """Whether an adapter owns a parameter of the classification head of a model (no wrapper)."""
    return any(has_rules(find_owner(model, path)[0]) for path in head_parameters(model))
