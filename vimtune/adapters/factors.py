"""The factors of low-rank rules of several adapters, for all layers at once.

A batch with several adapters multiplies, in each layer, by the factors of all of them (`mixture.py`). Taken
rule by rule they are hundreds of small tensors; here they become two for each kind of layers, by a handful of
operations.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.adapters.rule import WeightRule, exact, product_dtype
from vimtune.adapters.stacking import Groups, apply_together, can_stack


class Factors(NamedTuple):
    """Factors of several rules, one behind the other: they add (x downs) ups to a product."""

    downs: Tensor
    """(n, in, r)"""
    ups: Tensor
    """(n, r, out)"""


class Factored(NamedTuple):
    """What a layer multiplies by."""

    weight: Tensor
    """The frozen weight (out, in), where it can be in the dtype of the product."""
    factors: Factors | None
    """Those of each adapter; None where none of them has a rule."""


class LayerRules(NamedTuple):
    """A linear layer, and its low-rank rule for each adapter of a batch."""

    path: str
    """That of the weight."""
    weight: Tensor
    """The frozen weight (out, in)."""
    rules: Sequence[WeightRule | None]
    """None for an adapter that leaves the layer alone."""


_Place = tuple[int, int]
"""Where the factors of a rule are: in which pool, and at which place there."""


def factored(layers: Sequence[LayerRules]) -> list[Factored]:
    """What each layer multiplies by, with the factors of all adapters in their order.

    Adapters with a smaller rank than others, or without a rule, have further columns of zeros.

    Args:
        layers: any layers, with a rule or None for each of the same adapters.
    """
    pools, places = _compute(layers)
    kinds: dict[Hashable, list[int]] = {}
    for number, (_, weight, rules) in enumerate(layers):
        has_rules = any(rule is not None for rule in rules)
        kinds.setdefault((has_rules, weight.shape, weight.dtype, weight.device), []).append(number)
    results: dict[int, Factored] = {}
    for numbers in kinds.values():
        alike = [layers[number] for number in numbers]
        weights = _weights(alike)
        wanted = [
            None if rule is None else places[rule, id(weight)] for _, weight, rules in alike for rule in rules
        ]
        factors = _factors(pools, wanted, len(alike), product_dtype(weights[0]))
        results.update(zip(numbers, map(Factored, weights, factors), strict=True))
    return [results[number] for number in range(len(layers))]


def _weights(layers: Sequence[LayerRules]) -> Sequence[Tensor]:
    """The weights of layers of one kind in the dtype of their products, to which autocast would round them
    one by one."""
    weights = [layer.weight for layer in layers]
    dtype = product_dtype(weights[0])
    if weights[0].dtype == dtype or not all(map(can_stack, weights)):
        return weights
    return torch.stack(weights).to(dtype).unbind()


def _compute(layers: Sequence[LayerRules]) -> tuple[list[Factors], dict[tuple[WeightRule, int], _Place]]:
    """The factors of all rules in pools, one for each group of rules that agree, and where each has its own.

    A rule is found beside the weight: it may be that of several layers.
    """
    groups = Groups()
    for path, weight, rules in layers:
        groups.add(path, weight, True, [rule for rule in rules if rule is not None])
    pools: list[Factors] = []
    places: dict[tuple[WeightRule, int], _Place] = {}
    for members in groups:
        ups, downs = apply_together(members, _low_rank, reads_weight=False)
        for place, member in enumerate(members):
            places[member.rule, id(member.weight)] = len(pools), place
        pools.append(Factors(downs.transpose(1, 2), ups.transpose(1, 2)))
    for _, weight, rules in layers:
        for rule in rules:
            if rule is not None and (rule, id(weight)) not in places:
                with exact(weight):
                    up, down = _low_rank(rule, weight)
                places[rule, id(weight)] = len(pools), 0
                pools.append(Factors(down.T[None], up.T[None]))
    return pools, places


def _low_rank(rule: WeightRule, weight: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", rule.low_rank(weight))


def _factors(
    pools: Sequence[Factors], wanted: Sequence[_Place | None], num_layers: int, dtype: torch.dtype
) -> Sequence[Factors | None]:
    """The wanted factors, as many for each layer, zeros for None, with the largest rank among them; or
    nothing for any layer."""
    used = list(dict.fromkeys(place[0] for place in wanted if place is not None))
    if not used:
        return [None] * num_layers
    rank = max(pools[pool].ups.shape[1] for pool in used)
    padded = [_padded(pools[pool], rank) for pool in used]
    if None in wanted:
        padded.append(Factors(*(stack.new_zeros(1, *stack.shape[1:]) for stack in padded[0])))
    ends = list(accumulate(len(factors.ups) for factors in padded))
    starts = dict(zip(used, [0, *ends], strict=False))
    order = [ends[-1] - 1 if place is None else starts[place[0]] + place[1] for place in wanted]
    stacks = [each[0] if len(each) == 1 else torch.cat(each) for each in zip(*padded, strict=True)]
    if order != list(range(ends[-1])):
        index = torch.tensor(order, device=stacks[0].device)
        stacks = [stack.index_select(0, index) for stack in stacks]
    parts = (stack.to(dtype).unflatten(0, (num_layers, -1)).unbind() for stack in stacks)
    return list(map(Factors, *parts))


def _padded(factors: Factors, rank: int) -> Factors:
    """The same with a larger rank, by zeros."""
    missing = rank - factors.ups.shape[1]
    if not missing:
        return factors
    return Factors(F.pad(factors.downs, (0, missing)), F.pad(factors.ups, (0, 0, 0, missing)))
