"""Adapters on a model: inject, switch, delete, disable. `folding.py` folds them into the weights.

An adapter is a name and a set of rules (`rule.py`), one per adapted point; the classification
head always is among these. At most one adapter is active. Who owns what is recorded on injection.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vimtune import parsers
from vimtune.adapters.budget import fit_to_budget
from vimtune.adapters.growth import check_growth
from vimtune.adapters.points import Points
from vimtune.adapters.rule import Tuned
from vimtune.adapters.sites import (
    Layers,
    Sites,
    Targets,
    attach_rules,
    check_sites,
    find_backbone,
    find_owner,
    parse_layers,
    parse_targets,
    select_sites,
)
from vimtune.adapters.slots import (
    CALL,
    adapted_modules,
    attach,
    base_parameters,
    base_value,
    choice_to_follow,
    detach,
    has_rules,
    iter_slots,
    refuse_within_choice,
    rule_prefixes,
    slots_of,
)
from vimtune.adapters.wrappers import RECORD, unwrap
from vimtune.methods import build_methods, resolve_options
from vimtune.text import quote, suggest

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
"""A model of any class, for functions that give back the model they got."""


@dataclass
class AdapterRecord:
    """What was injected under one name."""

    name: str
    """The adapter's name on this model."""
    method: str
    """The method, or several joined by "+", as `inject` takes it."""
    options: dict[str, dict[str, Any]]
    """Every field of each method, defaults included; a field may have values by target."""
    targets: Targets
    """The targets as they were given."""
    layers: Layers
    """The layers as they were given."""
    sites: Sites
    """What targets and layers meant on this model: the points that have a rule, in the order of the rules."""
    num_classes: int
    """Outputs of the adapter's head."""
    head: list[str]
    """Paths of the head's parameters."""

    @property
    def surrounds_calls(self) -> bool:
        """Whether it has rules for calls."""
        return any(path.endswith(CALL) for paths in self.sites.values() for path in paths)


@dataclass
class AdapterState:
    """Bookkeeping of all adapters of one model, kept on the model itself."""

    requires_grad: dict[str, bool]
    """Flags of the base parameters before the first injection."""
    num_classes: int
    """Outputs of the model's own head."""
    surrounds_calls: bool = False
    """Whether the active adapter has rules for calls."""
    loading: RemovableHandle | None = None
    """Handle of the hook that lets plain checkpoints load."""
    active: str | None = None
    """Name of the active adapter; None if the base model is in force."""
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    """All adapters by name, in the order of injection."""


def adapter_state(model: nn.Module) -> AdapterState | None:
    """The bookkeeping of a model (no wrapper); None if it has no adapter."""
    return model.__dict__.get(RECORD)


def demand_adapter(model: nn.Module, name: str | None = None) -> tuple[AdapterState, AdapterRecord]:
    """Bookkeeping of the model (no wrapper) and record of the adapter `name` (the active one if None).

    Raises:
        ValueError: there is no such adapter.
    """
    state = adapter_state(model)
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
    budget: int | str | None = None,
    **options: Any,
) -> Model:
    """Freeze the model and add an adapter, which becomes the active one.

    Args:
        model: the backbone, changed in place; wrappers by torch.compile, DataParallel and timm's
            features_only are seen through.
        method: a registered method ("prodial"), or several ("lora+bitfit").
        name: the adapter's name on this model.
        targets: where: "both", "in_proj[x]", ["x_proj[dt|B]", "A_log", "!layers.0."]; the method's own choice
            if None. `vimtune.adapters.targets` has all forms. Several methods may have targets of their own:
            {"lora": "both", "ft": "A_log,D"}.
        layers: indices of the blocks to adapt, [0, 1] or "0-1"; all if None. By method as well.
        num_classes: outputs of this adapter's head; a copy of the model's head if None or equal.
        budget: how many numbers the method may train beside the head, 300_000, "300k", or "0.5%" of the
            backbone. It chooses rank, block size or whatever else sizes the method
            (`vimtune.adapters.budget` has the rule); what was chosen is logged.
        options: fields of the method, e.g. rank=16 (`vimtune train --list` shows them). A field may have
            values by target, rank={"in_proj": 8, "x_proj[B]": 4}; elsewhere its default holds.

    Returns:
        The model, as it was given.

    Raises:
        ValueError: unknown method, option, target or layer, options that do not fit the weights, a budget
            that cannot be kept or has nothing to choose, a rule that would have no effect, a model that
            rules cannot be attached to, or a name already taken. The model is then as it was.
    """
    backbone = find_backbone(model)
    targets, layers = parse_targets(targets), parse_layers(layers)
    head = head_parameters(backbone)
    if budget is not None:
        fitted = fit_to_budget(backbone, method, options, targets, layers, head, budget)
        logger.info("%s", fitted)
        options = dict(fitted.options)
    methods = [chosen.method for chosen in build_methods(method, options)]
    add_adapter(
        backbone,
        AdapterRecord(
            name=name,
            method=method,
            options=resolve_options(method, options),
            targets=targets,
            layers=layers,
            sites=select_sites(Points(backbone), methods, targets, layers, head),
            num_classes=_check_num_classes(backbone, num_classes),
            head=head,
        ),
    )
    return model


def _check_num_classes(model: nn.Module, num_classes: int | None) -> int:
    if num_classes is None:
        return base_num_classes(model)
    try:
        return int(parsers.integer(1)(num_classes))
    except ValueError as error:
        raise ValueError(f"num_classes = {quote(num_classes)}: {error}") from None


def base_num_classes(model: nn.Module) -> int:
    """Outputs of the model's own head, whatever adapter is active; 0 for a model that does not tell."""
    state = adapter_state(model)
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
    name, state = check_name(model, record.name), adapter_state(model)
    paths = [path for paths in record.sites.values() for path in paths]
    check_sites(model, paths, record.head)
    if not record.head and not paths:
        raise ValueError(
            f"method {record.method!r} would train nothing: the model has no head and no target was chosen"
        )
    active = {slot: slot.active for _, _, _, slot in iter_slots(model)}
    try:
        for slot in active:  # Methods see the plain model, and what the methods before them have made of it.
            slot.active = None
        _attach_head(model, record)
        for chosen in build_methods(record.method, record.options):
            method = chosen.method
            sites = record.sites[method.name]
            record.sites[method.name] = attach_rules(
                model, name, method, chosen.by_target, sites, accept_idle
            )
        check_growth(model)
    except BaseException:  # Whatever it is, it goes on, but the model is as it was.
        _detach_all(model, name)
        for slot, before in active.items():
            slot.active = before
        raise
    if state is None:
        state = AdapterState(
            requires_grad={path: parameter.requires_grad for path, parameter in base_parameters(model)},
            num_classes=base_num_classes(model),
        )
    state.records[name] = record
    state.active = name
    take_up(model, state)


def take_up(model: nn.Module, state: AdapterState) -> None:
    """Let the model have the adapters of `state`, whose rules are attached: freeze its own parameters and put
    the active adapter in force."""
    if RECORD not in model.__dict__:
        state.loading = model.register_load_state_dict_pre_hook(_keep_missing_adapters)
        model.__dict__[RECORD] = state
        for _, parameter in base_parameters(model):
            parameter.requires_grad_(False)
    activate(model, state, state.active)
    _forget_compiled()


def lay_down(model: nn.Module, state: AdapterState) -> None:
    """The reverse of `take_up`, for a model that is about to be plain: its own parameters require a gradient
    as they did before the first adapter."""
    for path, parameter in base_parameters(model):
        parameter.requires_grad_(state.requires_grad[path])
    if state.loading is not None:
        state.loading.remove()
        state.loading = None
    del model.__dict__[RECORD]
    _forget_compiled()


def _detach_all(model: nn.Module, name: str) -> None:
    """Remove the rules of an adapter wherever it has any."""
    owners = [
        owner for _, owner in adapted_modules(model) if any(name in slot for slot in slots_of(owner).values())
    ]
    for owner in owners:
        detach(owner, name)


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


def _attach_head(model: nn.Module, record: AdapterRecord) -> None:
    """Give the adapter a copy of the model's head, or a fresh head if it has another number of outputs."""
    for path in record.head:
        owner, leaf = find_owner(model, path)
        value = base_value(owner, leaf).detach()
        if record.num_classes not in (base_num_classes(model), value.shape[0]):
            value = value.new_zeros(record.num_classes, *value.shape[1:])
            if value.dim() > 1:
                nn.init.trunc_normal_(value, std=0.02)
        attach(owner, leaf, record.name, Tuned(value))


def set_num_classes(model: nn.Module, num_classes: int) -> None:
    """Tell timm, and whoever asks, how many outputs the head in force has."""
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
    state = adapter_state(model)
    if state is not None:
        activate(model, state, name)


def activate(model: nn.Module, state: AdapterState, name: str | None) -> None:
    """Put the rules of one adapter in force, or none, and have its tensors alone require a gradient."""
    state.active = name
    for _, _, _, slot in iter_slots(model):
        slot.active = name
        for adapter, rule in slot.items():
            rule.requires_grad_(adapter == name)
    state.surrounds_calls = name is not None and state.records[name].surrounds_calls
    set_num_classes(model, state.num_classes if name is None else state.records[name].num_classes)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """The base model, with its own head, for the duration of a block.

    Afterwards, also after an exception, the adapter that was active before is active again and its tensors
    require a gradient as they did, unless it was deleted meanwhile. As with `set_adapter` all threads that
    use the model see the base model.

    Raises:
        ValueError: the present thread is within `using`.
    """
    backbone = unwrap(model)
    refuse_within_choice(backbone)
    state = adapter_state(backbone)
    if state is None:
        yield model
        return
    active = state.active
    slots = [slot for _, _, _, slot in iter_slots(backbone)]
    flags = [(parameter, parameter.requires_grad) for slot in slots for parameter in slot.parameters()]
    activate(backbone, state, None)
    try:
        yield model
    finally:
        if adapter_state(backbone) is state and (active is None or active in state.records):
            activate(backbone, state, active)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on the model, in order of injection."""
    state = adapter_state(unwrap(model))
    return [] if state is None else list(state.records)


def active_adapter(model: nn.Module) -> AdapterRecord | None:
    """Record of the active adapter."""
    state = adapter_state(unwrap(model))
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
        activate(model, state, None)
    _detach_all(model, name)
    del state.records[name]
    if state.records:
        _forget_compiled()
    else:
        lay_down(model, state)


def has_call_rules(model: nn.Module) -> bool:
    """Whether rules of the active adapter of a model (no wrapper) surround calls."""
    state = adapter_state(model)
    chosen = choice_to_follow()
    if chosen is not None and chosen.model is model:
        return chosen.surrounds_calls
    return state is not None and state.surrounds_calls


def head_has_rules(model: nn.Module) -> bool:
    """Whether an adapter owns a parameter of the classification head of a model (no wrapper)."""
    owners = (find_owner(model, path) for path in head_parameters(model))
    return any(has_rules(owner) and name in slots_of(owner) for owner, name in owners)
