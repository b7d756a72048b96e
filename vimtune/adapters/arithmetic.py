"""Adapters made of adapters: averages, weighted sums, differences.

    combine(model, {"seed_0": 0.5, "seed_1": 0.5}, name="soup", how="exact")
    combine(model, {"polite": 1.0, "rude": -0.5}, name="arithmetic", head="polite")

`exact` sums what adapters do to weights, with coefficients c_i for the effective weights W_i (task
arithmetic, Ilharco et al. 2023, arXiv 2212.04089):

    W' = W + sum_i c_i (W_i - W)

Where all of them are low-rank differences, W_i = W + U_i D_i, the result is LoRA whose rank is the sum of
their ranks, U = [c_1 U_1, c_2 U_2, ...] and D the D_i below each other. Anywhere else, and where a weight has
fewer numbers than such factors, the result has the weight itself (method `ft`).

`tensors` averages the trained tensors of adapters of one method, place and size, and has the size of one of
them. Of a method whose weights are no linear function of its tensors, such as LoRA with its factors B and A,
that is not the average of the weights: it is meant for runs that started at the same values.

The head is another thing: its rows are classes. It is averaged where the coefficients sum to 1 and all heads
have as many classes; otherwise somebody has to say whose head it is to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from vimtune.adapters.manage import AdapterRecord, check_name, demand_adapter
from vimtune.adapters.rule import CallRule, Rule, WeightRule
from vimtune.adapters.sites import one_or_by_site
from vimtune.adapters.slots import (
    Slot,
    WeightSlot,
    base_value,
    iter_slots,
    point_path,
)
from vimtune.adapters.store import added
from vimtune.adapters.tensors import adapter_parameters, adapter_state_dict, load_adapter_state_dict
from vimtune.adapters.wrappers import unwrap
from vimtune.methods import resolve_options
from vimtune.text import name_some, quote, suggest

Model = TypeVar("Model", bound=nn.Module)
"""A model of any class, for functions that give back the model they got."""

How = Literal["exact", "tensors"]
"""What is summed: what adapters do to weights, or their tensors."""


@torch.no_grad()
def combine(
    model: Model,
    coefficients: Mapping[str, float],
    *,
    name: str,
    how: How = "exact",
    head: str | None = None,
    called: Mapping[str, str] | None = None,
) -> Model:
    """Add an adapter that is a weighted sum of others, and make it the active one.

    Args:
        model: a model with the adapters.
        coefficients: the factor of each by name; negative ones subtract.
        name: the name of the result.
        how: "exact" sums the changes of weights, "tensors" averages the trained tensors; the text of this
            module says what either means.
        head: the adapter whose head the result has; None for the average of the heads.
        called: what messages call each adapter, where a user knows it by another name, such as that of its
            file; its name if None.

    Returns:
        The model, as it was given.

    Raises:
        ValueError: an unknown adapter, a coefficient that is no finite number, adapters that cannot be summed
            so, or heads that do not average. The model is then as it was.
    """
    backbone = unwrap(model, retrains=True)
    check_name(backbone, name)
    called = {own: own for own in coefficients} if called is None else called
    _check_coefficients(coefficients, called)
    records = {own: demand_adapter(backbone, own)[1] for own in coefficients}
    if how not in get_args(How):
        raise ValueError(
            f"how = {quote(how)}: expected {' or '.join(get_args(How))}.{suggest(how, get_args(How))}"
        )
    if head is not None and head not in records:
        raise ValueError(f"head = {quote(head)}: expected one of the adapters {', '.join(records)}")
    if how == "tensors":
        record, values = _average(backbone, coefficients, records, name, called)
    else:
        record, values = _sum(backbone, coefficients, records, name, called)
    heads = _heads(backbone, coefficients, records, head, called)
    record.num_classes = records[head or next(iter(records))].num_classes
    with added(backbone, record):
        load_adapter_state_dict(backbone, {**values, **heads}, name)
    return model


_EXACT = "how='exact' (on the command line: --how exact) sums what they do to weights"
"""The way out where tensors do not average."""

_TENSORS = "how='tensors' (on the command line: --how tensors) averages adapters of one method"
"""The way out where what adapters do to weights does not sum."""


def _check_coefficients(coefficients: Mapping[str, float], called: Mapping[str, str]) -> None:
    if not coefficients:
        raise ValueError("no adapter is named: expected coefficients such as {'a': 0.5, 'b': 0.5}")
    for name, value in coefficients.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"the coefficient of {quote(called[name])} is {quote(value)}: expected a finite number"
            )


def _sums_to_one(coefficients: Mapping[str, float]) -> bool:
    return math.isclose(math.fsum(coefficients.values()), 1.0, abs_tol=1e-6)


# --- heads


def _heads(
    model: nn.Module,
    coefficients: Mapping[str, float],
    records: Mapping[str, AdapterRecord],
    head: str | None,
    called: Mapping[str, str],
) -> dict[str, Tensor]:
    """The tensors of the head by their keys."""
    first_name, first = next(iter(records.items()))
    if head is None and first.head:
        classes = {record.num_classes for record in records.values()}
        total = math.fsum(coefficients.values())
        if len(classes) > 1 or not _sums_to_one(coefficients):
            reason = (
                f"they have {' and '.join(map(str, sorted(classes)))} classes"
                if len(classes) > 1
                else f"the coefficients sum to {total:g} and not to 1"
            )
            raise ValueError(
                f"the heads of {name_some(map(called.__getitem__, records))} do not average: {reason}. Say "
                f"whose head the result has, such as head={quote(called[first_name])} (on the command line: "
                "--head)"
            )
    chosen = coefficients if head is None else {head: 1.0}
    keys = [f"{path}.value" for path in first.head]
    states = {name: adapter_state_dict(model, name) for name in chosen}
    return {key: _weighted([states[name][key] for name in chosen], [*chosen.values()]) for key in keys}


def _weighted(tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """The sum of tensors with factors, in single precision at least."""
    precise = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=precise)
    for tensor, factor in zip(tensors, factors, strict=True):
        total += factor * tensor.to(precise)
    return total


# --- tensors


def _average(
    model: nn.Module,
    coefficients: Mapping[str, float],
    records: Mapping[str, AdapterRecord],
    name: str,
    called: Mapping[str, str],
) -> tuple[AdapterRecord, dict[str, Tensor]]:
    """A record like those of the adapters, and the averages of their tensors but for the head."""
    if not _sums_to_one(coefficients):
        raise ValueError(
            f"the coefficients sum to {math.fsum(coefficients.values()):g}, and an average of tensors needs "
            f"1: give such ones; {_EXACT}"
        )
    first_name, first = next(iter(records.items()))
    for other_name, other in records.items():
        same = other.method == first.method and other.sites == first.sites
        if not same or other.options != first.options:
            raise ValueError(
                f"adapters {quote(called[first_name])} ({first.method}) and {quote(called[other_name])} "
                f"({other.method}) do not have the same method, options and places, so that their tensors do "
                f"not average: {_EXACT}"
            )
    trained = {item.key for item in adapter_parameters(model, first_name)}
    states = [adapter_state_dict(model, own) for own in records]
    head = {f"{path}.value" for path in first.head}
    values = {}
    for key, value in states[0].items():
        if key in head:
            continue
        others = [state[key] for state in states]
        if key in trained:
            values[key] = _weighted(others, [*coefficients.values()])
        elif all(torch.equal(value, other) for other in others):
            values[key] = value
        else:
            raise ValueError(
                f"{key} is chosen and not trained, and the adapters have chosen differently: their tensors "
                f"do not average; {_EXACT}"
            )
    return _record_like(first, name, first.method, first.options, first.sites), values


# --- weights


def _sum(
    model: nn.Module,
    coefficients: Mapping[str, float],
    records: Mapping[str, AdapterRecord],
    name: str,
    called: Mapping[str, str],
) -> tuple[AdapterRecord, dict[str, Tensor]]:
    """A record of LoRA and of tuned weights, and its tensors but for the head."""
    first = next(iter(records.values()))
    ranks: dict[str, int] = {}
    tuned: list[str] = []
    values: dict[str, Tensor] = {}
    for place, owner, own, slot in iter_slots(model):
        path, rules = point_path(place, own), _rules(slot, coefficients)
        if path in first.head or not rules:
            continue
        _refuse_calls(path, rules, called)
        weight = base_value(owner, own)
        factors = _factors(weight, rules, coefficients)
        if factors is not None:
            ranks[path] = factors[1].shape[0]
            values |= {f"{path}.branch.lora_B": factors[0], f"{path}.branch.lora_A": factors[1]}
        else:
            tuned.append(path)
            changed = _changed(path, weight, cast(WeightSlot, slot), rules, coefficients, called)
            values[f"{path}.value"] = changed
    sites = {"lora": [*ranks], "ft": tuned}
    method = "+".join(part for part, paths in sites.items() if paths) or "linear"
    options: dict[str, Any] = {}
    if ranks:  # With an alpha of the rank the factors are the whole change.
        alphas = {path: float(rank) for path, rank in ranks.items()}
        options = {"lora": {"rank": one_or_by_site(ranks), "alpha": one_or_by_site(alphas)}}
    chosen = {part: sites.get(part, []) for part in method.split("+")}
    return _record_like(first, name, method, resolve_options(method, options), chosen), values


def _rules(slot: Slot, coefficients: Mapping[str, float]) -> dict[str, Rule]:
    """The rules at a point by adapter."""
    return {name: cast(Rule, slot[name]) for name in coefficients if name in slot}


def _refuse_calls(path: str, rules: Mapping[str, Rule], called: Mapping[str, str]) -> None:
    for name, rule in rules.items():
        if isinstance(rule, CallRule) or not cast(WeightRule, rule).mergeable:
            raise ValueError(
                f"adapter {quote(called[name])} has a {type(rule).__name__} at {path}, which is no change of "
                f"a weight that could be summed: {_TENSORS}"
            )


def _factors(
    weight: Tensor, rules: Mapping[str, Rule], coefficients: Mapping[str, float]
) -> tuple[Tensor, Tensor] | None:
    """Factors of the sum of low-rank differences; None where a rule is something else, or the factors have
    more numbers than the weight."""
    ups, downs = [], []
    for name, rule in rules.items():
        found = cast(WeightRule, rule).low_rank(weight)
        if found is None:
            return None
        ups.append(coefficients[name] * found[0])
        downs.append(found[1])
    up, down = torch.cat(ups, 1), torch.cat(downs)
    return (up, down) if up.numel() + down.numel() < weight.numel() else None


def _changed(
    path: str,
    weight: Tensor,
    slot: WeightSlot,
    rules: Mapping[str, Rule],
    coefficients: Mapping[str, float],
    called: Mapping[str, str],
) -> Tensor:
    """The weight with the sum of the changes."""
    changes = []
    for name in rules:
        value = slot.evaluated(weight, name)
        if value.shape != weight.shape:
            raise ValueError(
                f"adapter {quote(called[name])} changes the size of {path}: such changes do not sum; "
                f"{_TENSORS}"
            )
        changes.append(value - weight)
    return weight + _weighted(changes, [coefficients[name] for name in rules])


def _record_like(
    first: AdapterRecord, name: str, method: str, options: Any, sites: Mapping[str, list[str]]
) -> AdapterRecord:
    """A record of an adapter on the same model."""
    return AdapterRecord(
        name=name,
        method=method,
        options=options,
        targets={part: [*paths] for part, paths in sites.items() if paths} or None,
        layers=None,
        sites={part: [*paths] for part, paths in sites.items()},
        num_classes=first.num_classes,
        head=[*first.head],
    )
