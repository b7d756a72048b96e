"""A budget of trained parameters: the size of a method follows from how much it may train.

Each method says which of its options decide its size (`Method.sized_by`): a rank, a block size, a number of
tokens or states. Of each method the first one that the user has not given is chosen such that the method
trains as much as possible without exceeding the budget. The head is trained by every method alike and does
not count.

Several methods share a budget. First comes off what those train that have nothing to choose. The rest is
divided equally among the others, in their order, and what one of them leaves goes to those after it.

Parameters are counted by building the rules on the meta device, so no weights are copied or made.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from vimtune import parsers
from vimtune.adapters.points import Points
from vimtune.adapters.rule import Rule
from vimtune.adapters.sites import Layers, Site, Targets, build_sites, select_sites
from vimtune.adapters.slots import base_parameters, iter_slots
from vimtune.fields import Option, options_of
from vimtune.methods import Method, build_methods, sizing_options, split_options
from vimtune.schema import check
from vimtune.text import quote

STEPS = 1000
"""An option that is a number between two bounds is chosen among so many equal steps."""
MOST = 2**16
"""The largest whole number that is tried where no side of a weight bounds it, such as a number of tokens."""

Count = Callable[[int], int | None]
"""How many numbers a method trains with the value of this number; None where it does not fit the model."""


@dataclass(frozen=True)
class Fitted:
    """What a budget has chosen."""

    budget: int
    """How many numbers may be trained beside the head."""
    options: Mapping[str, Mapping[str, Any]]
    """The options of each method as given, and those that were chosen, as `inject` takes them."""
    chosen: Mapping[str, tuple[str, Any]]
    """The option that was chosen for a method, and its value."""
    limited: Collection[str]
    """The methods whose option has the largest value that a budget gives it (`Method.size_limit`)."""
    trained: int
    """How many numbers are trained beside the head."""

    def __str__(self) -> str:
        choices = [
            f"{method} with {name} = {value:g}"
            + (" (the most that a budget gives it)" * (method in self.limited))
            for method, (name, value) in self.chosen.items()
        ]
        missed = self.budget - self.trained
        return (
            f"budget of {self.budget:,} parameters beside the head: chose {', '.join(choices)}, which trains "
            f"{self.trained:,}: {missed:,} ({100 * missed / self.budget:.1f} %) below the budget"
        )


def fit_to_budget(
    model: nn.Module,
    spec: str,
    options: Mapping[str, Any],
    targets: Targets,
    layers: Layers,
    head: Sequence[str],
    budget: int | str,
) -> Fitted:
    """Choose the options by which the methods of a spec fit a budget, as this module says.

    Args:
        model: the backbone, which stays as it is.
        spec: the methods, as `inject` takes them.
        options: theirs, as far as they are given.
        targets, layers: where they act.
        head: paths of the head's parameters.
        budget: a number of parameters, 300_000 or "300k", or a share of the backbone without head, "0.5%".

    Raises:
        ValueError: no budget, nothing to choose, a budget below the smallest size of a method, or methods
            that do not fit the model.
    """
    allowed = _allowance(model, head, budget)
    to_choose = sizing_options(spec, options)
    draft = without_values(model)
    points, chosen = Points(draft), build_methods(spec, options)
    paths = select_sites(points, [item.method for item in chosen], targets, layers, head)
    sites = {
        item.method.name: build_sites(points, draft, item.method, item.by_target, paths[item.method.name])
        for item in chosen
    }
    fixed = sum(
        _count(item.method, sites[item.method.name]) for item in chosen if item.method.name not in to_choose
    )
    given, values, trained = split_options(spec, options), {}, fixed
    waiting = [item.method for item in chosen if item.method.name in to_choose]
    for number, method in enumerate(waiting):
        share = (allowed - trained) // (len(waiting) - number)
        name = to_choose[method.name]
        taken = f", of which the other methods take {trained:,}," if trained else ""
        value, count = _fit(method, name, sites[method.name], share, f"budget = {quote(budget)}{taken}")
        values[method.name] = (name, value)
        given[method.name] = {**given[method.name], name: value}
        trained += count
    limited = [
        method.name
        for method in waiting
        if values[method.name][1] == method.size_limit(to_choose[method.name], sites[method.name])
    ]
    return Fitted(allowed, given, values, limited, trained)


def _allowance(model: nn.Module, head: Sequence[str], budget: int | str) -> int:
    """The number of parameters that a budget stands for."""
    try:
        budget = parsers.parameter_budget(budget)
    except ValueError as error:
        raise ValueError(f"budget = {quote(budget)}: {error}") from None
    if isinstance(budget, int):
        return budget
    backbone = sum(parameter.numel() for path, parameter in base_parameters(model) if path not in head)
    return int(backbone * float(budget.rstrip("%")) / 100)


def without_values(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, on which no adapter is in force."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    memo: dict[int, Any] = {}
    for _, tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    draft = copy.deepcopy(model, memo)
    for _, _, _, slot in iter_slots(draft):
        slot.active = None
    return draft


def _count(method: Method, sites: Sequence[Site]) -> int:
    """How many numbers the rules of a method train, each shared tensor once.

    Raises:
        ValueError: its options do not fit the sites.
    """
    with torch.device("meta"):
        rules: Mapping[str, Rule] = method.build(sites)
    sizes = {id(tensor): tensor.numel() for rule in rules.values() for tensor in rule.parameters()}
    return sum(sizes.values())


def _fit(method: Method, name: str, sites: Sequence[Site], share: int, what: str) -> tuple[Any, int]:
    """The value of an option with which a method trains as much as possible of its share, and how much that
    is.

    Raises:
        ValueError: the smallest size is too large, or no value fits the sites.
    """
    option = options_of(type(method))[name]
    value_of, last = _values(method, option, sites)
    refusals: list[ValueError] = []

    @cache
    def count(number: int) -> int | None:
        try:
            value = check(option.annotation, value_of(number), f"option {name}")
            return _count(dataclasses.replace(method, **{name: value}), sites)
        except ValueError as error:
            refusals.append(error)
            return None

    found = choose(count, reach(count) if last is None else last, share)
    if found is None:
        raise refusals[0]
    number, trained = found
    if trained > share:
        raise ValueError(
            f"{what} is too small: method {method.name!r} has {max(share, 0):,} parameters of it and trains "
            f"at least {trained:,}, with {name} = {value_of(number):g}. Raise the budget, or choose fewer "
            "targets or layers"
        )
    return value_of(number), trained


def _values(method: Method, option: Option, sites: Sequence[Site]) -> tuple[Callable[[int], Any], int | None]:
    """The values that an option may have, by number from 0 on, and the last number; None where neither the
    method nor a weight bounds it."""
    bounds: Sequence[Any] = getattr(option.annotation, "__metadata__", ())
    low = next(
        (getattr(bound, "ge", getattr(bound, "gt", None)) for bound in bounds if _is_lower(bound)), None
    )
    high = next(
        (getattr(bound, "le", getattr(bound, "lt", None)) for bound in bounds if _is_upper(bound)), None
    )
    if isinstance(option.default, float):
        start, end = float(low or 0), float(1 if high is None else high)
        return lambda number: start + (end - start) * number / STEPS, STEPS
    first = max(1, int(low or 1))  # Where 0 is allowed, it stands for "none" or "all" and is no size.
    # A side of a convolution's weight is all that one output reads, as in `check_matrix`.
    sides = [
        max(site.value.shape[0], site.value.numel() // max(1, site.value.shape[0]))
        for site in sites
        if site.value is not None and site.value.dim() > 0
    ]
    limits = [max(sides, default=None), method.size_limit(option.name, sites), high]
    largest = min((int(limit) for limit in limits if limit is not None), default=None)
    return lambda number: first + number, None if largest is None else largest - first


def reach(count: Count) -> int:
    """The first power of two that has no count, or `MOST`: the last number worth a try where all numbers from
    some one on have none, and nothing says from which."""
    number = 1
    while number < MOST and count(number) is not None:
        number *= 2
    return number


def choose(count: Count, last: int, share: int) -> tuple[int, int] | None:
    """Of the numbers from 0 to `last` the one with the largest count up to `share`, and that count; if all of
    them count more, the one with the smallest; None if none of them has a count.

    The counts of the numbers that have one must rise with the number, or fall with it.
    """
    numbers = range(last + 1)
    first = next((number for number in numbers if count(number) is not None), None)
    if first is None:
        return None
    final = next(number for number in reversed(numbers) if count(number) is not None)
    rises = counted(count, final) >= counted(count, first)
    lowest, highest = (first, final) if rises else (final, first)
    if counted(count, lowest) > share or counted(count, highest) <= share:
        best = lowest if counted(count, lowest) > share else highest
    else:
        before, behind = _turn(count, first, final, lambda number: (counted(count, number) > share) == rises)
        best = before if rises else behind
    return best, counted(count, best)


def counted(count: Count, number: int) -> int:
    """The count of a number that has one."""
    value = count(number)
    assert value is not None
    return value


def _turn(count: Count, before: int, behind: int, is_behind: Callable[[int], bool]) -> tuple[int, int]:
    """Two neighbours among the numbers that have a count: the last one that is not behind a turn, and the
    first one that is.

    Args:
        count: the counts.
        before, behind: numbers that have a count; the turn lies between them.
        is_behind: false up to the turn, and true from there on.
    """
    end = behind  # Between it and `behind` no number has a count.
    while end - before > 1:
        middle = (before + end) // 2
        found = next((number for number in range(middle, end) if count(number) is not None), None)
        if found is not None and not is_behind(found):
            before = found
        else:
            end, behind = middle, behind if found is None else found
    return before, behind


def _is_lower(bound: Any) -> bool:
    return isinstance(bound, Ge | Gt)


def _is_upper(bound: Any) -> bool:
    return isinstance(bound, Le | Lt)
