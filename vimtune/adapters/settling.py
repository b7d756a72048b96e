"""Methods that choose what to train, or where to start, from data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn

from vimtune.adapters.composition import single_rules
from vimtune.adapters.manage import AdapterRecord, demand_adapter
from vimtune.adapters.rule import Rule
from vimtune.adapters.slots import iter_slots, point_path
from vimtune.adapters.tensors import adapter_parameters
from vimtune.adapters.wrappers import unwrap
from vimtune.methods import ChosenMethod, build_methods


def settles(model: nn.Module) -> bool:
    """Whether a method of the active adapter wants to see data before training (`Method.settle`)."""
    _, record = demand_adapter(unwrap(model))
    return any(_settles_anywhere(chosen) for chosen in build_methods(record.method, record.options))


def settle(model: nn.Module, batches: Iterable[Callable[[], float]]) -> None:
    """Let the methods of the active adapter choose from data, once, before the first step of training.

    Args:
        model: the adapted model.
        batches: functions, each of which runs forward and backward of one training batch, adds to the
            gradients and gives the loss. The methods, in their order, draw as many as they want.
    """
    backbone = unwrap(model)
    _, record = demand_adapter(backbone)
    rules = _rules_by_method(backbone, record)
    drawn = iter(batches)
    for chosen in build_methods(record.method, record.options):
        if _settles_anywhere(chosen):
            for item in adapter_parameters(backbone):
                item.parameter.grad = None
            chosen.method.settle(rules[chosen.method.name], drawn)


def _settles_anywhere(chosen: ChosenMethod) -> bool:
    """Whether a method wants to see data with the options that it has at any of its targets."""
    variants = [
        dataclasses.replace(chosen.method, **{field: value})
        for field, values in chosen.by_target.items()
        for value in values.values()
    ]
    return any(method.settles for method in (chosen.method, *variants))


def _rules_by_method(model: nn.Module, record: AdapterRecord) -> dict[str, dict[str, Rule]]:
    """The rules of each method of an adapter, by the path of their site."""
    at_place = {
        point_path(place, name): list(single_rules(slot[record.name]))  # type: ignore[arg-type]
        for place, _, name, slot in iter_slots(model)
        if record.name in slot
    }
    taken: Counter[str] = Counter()
    rules: dict[str, dict[str, Rule]] = {}
    for method, paths in record.sites.items():
        rules[method] = {}
        for path in paths:
            place = path.partition("[")[0]
            rules[method][path] = at_place[place][taken[place]]
            taken[place] += 1
    return rules
