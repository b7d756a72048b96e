"""Folding an adapter into the weights of its model, and taking it out again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from vimtune.adapters.composition import single_rules
from vimtune.adapters.identity import tensor_digest
from vimtune.adapters.manage import (
    AdapterRecord,
    AdapterState,
    adapter_state,
    demand_adapter,
    lay_down,
    set_num_classes,
    take_up,
)
from vimtune.adapters.rule import CallRule, Rule, WeightRule, exact
from vimtune.adapters.slots import (
    adapted_modules,
    base_parameters,
    base_value,
    in_evaluation,
    iter_slots,
    iter_weight_slots,
    join,
    point_path,
    put_on,
    take_off,
)
from vimtune.adapters.wrappers import unwrap
from vimtune.methods import build_methods

Model = TypeVar("Model", bound=nn.Module)
"""A model of any class, for functions that give back the model they got."""


class UnmergeableError(ValueError):
    """No weight can express what an adapter does; the model is as it was."""


_KEPT = "_vimtune_merged"
"""Attribute of a reversibly merged model under which its adapters wait."""


@dataclass
class _Merged:
    """A parameter that merging changes, and its merged value."""

    path: str
    owner: nn.Module
    name: str
    value: Tensor


@dataclass
class _Weight:
    """A parameter that merging changed."""

    path: str
    owner: nn.Module
    name: str
    base: nn.Parameter
    """The frozen value before: a copy, or the parameter itself where merging put another one in its place."""
    digest: str
    """Digest of the merged value."""


@dataclass
class _Kept:
    """What brings a reversibly merged model back."""

    state: AdapterState
    slots: list[tuple[nn.Module, nn.Module]]
    """(module, its rules)."""
    weights: list[_Weight]
    options: dict[str, Any] | None


@torch.no_grad()
def merge(model: Model, *, reversible: bool = False) -> Model:
    """Fold the active adapter into the weights and remove all adapters, in place.

    The result is a plain model with plain keys and the same output in evaluation mode. Its `options` say how
    it can be created: some methods change its sizes, or give it parameters that it can have. A model without
    adapters is returned as it is; wrappers by torch.compile, DataParallel and timm's features_only are
    seen through and returned.

    Args:
        model: the adapted model.
        reversible: keep the adapters and the base weights beside the model, so that `unmerge` can bring them
            back bit by bit. This takes the memory of the changed weights once more.

    Raises:
        UnmergeableError: a rule cannot be expressed by weights, or two rules fold into the same parameter;
            the model is then as it was.
        ValueError: no adapter is active, a merged weight is not finite, or the model is under
            DistributedDataParallel; the model is then as it was.
    """
    backbone = unwrap(model, retrains=True)
    state = adapter_state(backbone)
    if state is None:
        return model
    _, record = demand_adapter(backbone)
    folded = _folded_calls(backbone, record)
    merged = [item for item in _merged_weights(backbone, record) if item.path not in folded]
    for item in (*merged, *folded.values()):
        if not item.value.is_meta and not torch.isfinite(item.value).all():
            raise ValueError(f"adapter {record.name!r} makes {item.path} non-finite; nothing was merged")
    options = _options_of(backbone)
    merged_options = None if options is None else _merged_options(options, record)

    # Nothing above has changed the model.
    kept = _Kept(state, [], [], options)
    lay_down(backbone, state)
    for _, module in adapted_modules(backbone):
        kept.slots.append((module, take_off(module)))

    def put(item: _Merged) -> None:
        base = _replace(backbone, base_value(item.owner, item.name), item.value, keep=reversible)
        if reversible:
            kept.weights.append(_Weight(item.path, item.owner, item.name, base, tensor_digest(item.value)))

    for item in merged:
        put(item)
    set_num_classes(backbone, record.num_classes)
    _set_options(backbone, merged_options)
    for item in folded.values():  # Only with the options are there all parameters that calls fold into.
        put(item)
    backbone.__dict__.pop(_KEPT, None)
    if reversible:
        backbone.__dict__[_KEPT] = kept
    return model


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Undo `merge(model, reversible=True)`, in place: the base weights are what they were, bit by bit, and
    the adapters are back, the same one active.

    Raises:
        ValueError: the model was not merged so, it has other adapters now, or its merged weights have changed
            since, in value or dtype; the model is then as it was.
    """
    backbone = unwrap(model, retrains=True)
    kept = cast("_Kept | None", backbone.__dict__.get(_KEPT))
    if kept is None:
        raise ValueError(
            "the model was not merged with reversible=True, so nothing is kept to take out again"
        )
    if adapter_state(backbone) is not None:
        raise ValueError(
            "the model has been given other adapters since it was merged: delete or merge those first"
        )
    for weight in kept.weights:
        present = base_value(weight.owner, weight.name)
        if present.dtype != weight.base.dtype:
            raise ValueError(
                f"{weight.path} is of {present.dtype} now and was of {weight.base.dtype} when the model was "
                f"merged: convert the model back with model.to({weight.base.dtype}), then unmerge it"
            )
        if tensor_digest(present) != weight.digest:
            raise ValueError(
                f"{weight.path} has changed since the model was merged, and taking the adapter out would "
                "lose that: load the base weights anew instead"
            )
    for weight in kept.weights:
        present = base_value(weight.owner, weight.name)
        if present.shape == weight.base.shape:
            present.copy_(weight.base)
        else:
            weight.base.data = weight.base.data.to(present.device)
            _exchange(backbone, present, weight.base)
    for module, slots in kept.slots:
        device = next((parameter.device for parameter in module.parameters()), None)
        put_on(module, slots.to(device=device))
    del backbone.__dict__[_KEPT]
    _set_options(backbone, kept.options)
    take_up(backbone, kept.state)
    return model


def _merged_weights(model: nn.Module, record: AdapterRecord) -> list[_Merged]:
    """The values of all parameters with rules.

    Raises:
        UnmergeableError: no weight can express a rule.
    """
    merged = []
    for path, owner, name, slot in iter_weight_slots(model):
        for rule in () if slot.rule is None else single_rules(slot.rule):
            if not cast(WeightRule, rule).mergeable:
                _refuse(rule, path, record)
        base = base_value(owner, name)
        merged.append(_Merged(path, owner, name, slot.evaluated(base).to(base.dtype, copy=True)))
    return merged


def _folded_calls(model: nn.Module, record: AdapterRecord) -> dict[str, _Merged]:
    """What the rules for calls leave behind, by the paths of parameters.

    Raises:
        UnmergeableError: no parameter can express a rule, or two rules fold into the same one.
    """
    folded: dict[str, _Merged] = {}
    for path, owner, name, slot in iter_slots(model):
        for rule in () if slot.rule is None else single_rules(slot.rule):
            if not isinstance(rule, CallRule):
                continue
            like = next((parameter for _, parameter in base_parameters(owner)), torch.empty(0))
            with in_evaluation(owner), exact(like):
                values = rule.fold(owner)
            if values is None:
                _refuse(rule, point_path(path, name), record)
            for parameter, value in values.items():
                place = join(path, parameter)
                if place in folded:
                    raise UnmergeableError(
                        f"two rules of adapter {record.name!r} ({record.method}) fold into {place}; nothing "
                        "was merged. Keep the adapter beside the model"
                    )
                folded[place] = _Merged(place, owner, parameter, value.detach().clone())
    return folded


def _refuse(rule: Rule, where: str, record: AdapterRecord) -> NoReturn:
    """Raise UnmergeableError for a rule that cannot be merged."""
    raise UnmergeableError(
        f"adapter {record.name!r} ({record.method}) has a {type(rule).__name__} at {where}, "
        "which no weight can express; nothing was merged. Keep the adapter beside the model"
    )


def _replace(model: nn.Module, base: nn.Parameter, weight: Tensor, keep: bool) -> nn.Parameter:
    """Put a merged value in the place of a parameter; returns the one before, a copy if `keep`."""
    if base.shape == weight.shape:
        before = nn.Parameter(base.detach().clone(), requires_grad=base.requires_grad) if keep else base
        base.copy_(weight)
        return before
    _exchange(model, base, nn.Parameter(weight, requires_grad=base.requires_grad))
    return base


def _exchange(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put another parameter in the place of one, wherever modules share it, and have linear layers state the
    sizes that their weight has."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
                if isinstance(module, nn.Linear):
                    module.out_features, module.in_features = module.weight.shape


def _merged_options(options: dict[str, Any], record: AdapterRecord) -> dict[str, Any]:
    """The options with which the merged model would be created, from those of the model as it is."""
    for chosen in build_methods(record.method, record.options):
        options = chosen.method.merged_options(options, record.sites[chosen.method.name])
    return options


def _options_of(model: nn.Module) -> dict[str, Any] | None:
    """A copy of the options with which a model is created: those that it has, or the fields of transformers'
    configuration; None for models that have neither."""
    options = getattr(model, "options", None)
    if options is not None:
        return dict(options)
    config = _configuration(model)
    return None if config is None else dict(config.to_dict())


def _set_options(model: nn.Module, options: dict[str, Any] | None) -> None:
    """Change the options in place: `model.creation` refers to the same mapping, parts of a model of
    transformers to the same configuration.

    A model some parameters of which are there with some options alone has a method `follow_options`.
    """
    if options is None:
        return
    present: Any = getattr(model, "options", None)
    if isinstance(present, dict):
        if present == options:
            return
        present.clear()
        present.update(options)
        if hasattr(model, "follow_options"):
            cast(Any, model).follow_options()
    elif (config := _configuration(model)) is not None:
        before = config.to_dict()
        for name, value in options.items():
            if name not in before or before[name] != value:
                setattr(config, name, value)


def _configuration(model: nn.Module) -> Any:
    """The configuration of a model of transformers, or of the one in a module; None if there is none."""
    found = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in found if hasattr(config, "to_dict")), None)
