"""One pass through a model with rows of several adapters: what its linear layers compute.

The rows of a pass are sorted by adapter and cut into parts of so many rows each that none has two adapters;
adapters with as many rows as each other have a part each. A layer then multiplies all parts at once:

    y = W x + U_a (D_a x)        where all rules at hand are low-rank: one product for all rows with W, two
                                 small ones with stacks
    y = W'_a x                   otherwise: one product with a stack

What is stacked are the tensors of all adapters, of low-rank rules for all layers at once (`factors.py`), of
others for all layers or for one (`batched.py`). It is done anew in each pass, a few operations for the whole
model: kept from one to the next, stacks would have to notice every change of a tensor, and those made
through `Tensor.data` go unnoticed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import groupby
from math import gcd
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.batched import shared_effective_weights
from vimtune.adapters.factors import Factored, LayerRules, factored
from vimtune.adapters.rule import WeightRule, product_dtype
from vimtune.adapters.slots import Choice, Slot, WeightSlot, base_value, find_ahead, slots_of

Name = str | None
"""Name of an adapter; None for the plain model."""


class MixedLayer(NamedTuple):
    """A linear layer whose weight has rules."""

    path: str
    """That of the weight."""
    layer: nn.Module
    slot: WeightSlot
    """Where the rules of the weight are."""


class Mixture(Choice):
    """Several adapters in one pass, for rows that are sorted by adapter."""

    def __init__(
        self,
        model: nn.Module,
        slots: Collection[Slot],
        layers: Sequence[MixedLayer],
        low_rank: Collection[WeightRule],
        names: Sequence[Name],
    ) -> None:
        """Choose adapters for rows.

        Args:
            model: the model, no wrapper.
            slots: its slots.
            layers: its linear layers with rules.
            low_rank: those of its rules that add a product of two factors.
            names: the adapter of each row; rows of one adapter are neighbours.
        """
        super().__init__(model, slots, None, False)
        self.layers = layers
        self.low_rank = low_rank
        sizes = {name: len(list(rows)) for name, rows in groupby(names)}
        self.adapters = list(sizes)
        self.num_rows = len(names)
        each = gcd(*sizes.values())
        self.parts_of_adapters = [size // each for size in sizes.values()]
        self.num_parts = self.num_rows // each
        self._index: dict[torch.device, Tensor] = {}

    def rules(self, slot: Slot) -> list[Any]:
        rules = self._rules_of(slot)
        return [] if slot in self._factored else [rule for rule in rules if rule is not None]

    def _rules_of(self, slot: Slot) -> list[WeightRule | None]:
        """The rule for each adapter."""
        rules = cast("dict[Name, WeightRule]", slot._modules)
        return [rules.get(name) for name in self.adapters]

    def product(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """What a linear layer gives for x (B, ..., in) with a rule for each adapter."""
        if len(x) != self.num_rows:
            raise ValueError(
                f"a layer is given {len(x)} rows for a batch of {self.num_rows}: the class of the model is "
                "declared to keep the examples first (batch_first), and does not"
            )
        slot, weight = cast(WeightSlot, slots_of(layer)["weight"]), base_value(layer, "weight")
        parts = x if x.dim() == 3 and len(x) == self.num_parts else x.reshape(self.num_parts, -1, x.shape[-1])
        if slot in self._factored:
            result = self._shared_product(layer, parts, weight, self._factored[slot])
        else:
            # Whoever has computed the values ahead has done so for all layers.
            rule = next(rule for rule in self._rules_of(slot) if rule is not None)
            ready = find_ahead(rule, weight) is not None
            with nullcontext() if ready else shared_effective_weights(layer):
                result = self._own_products(parts, self._values(layer, "weight"), self._bias(layer))
        return result.reshape(*x.shape[:-1], result.shape[-1])

    def _shared_product(self, layer: nn.Linear, parts: Tensor, weight: Tensor, factored: Factored) -> Tensor:
        """The product with the weight itself, and what the factors of each adapter add."""
        rounded, factors = factored
        bias = self._bias(layer)
        shared = bias is None or bias.dim() == 1
        if rounded.dtype == (dtype := product_dtype(weight)):
            weight = rounded
        parts = parts.to(dtype)
        result = F.linear(parts, weight, bias if shared else None)
        if bias is not None and not shared:
            result = result + self._for_parts(bias).to(result.dtype)
        if factors is None:
            return result
        inner = torch.bmm(parts, self._for_parts(factors.downs).to(result.dtype))
        return torch.baddbmm(result, inner, self._for_parts(factors.ups).to(result.dtype))

    def _own_products(self, parts: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The product of each adapter's rows with its own weight, one of `values` (n, out, in)."""
        if bias is not None and bias.dim() == 3:
            bias = self._for_parts(bias)
        # A copy of its weight for each part pays where it is no more than what a product reads and writes.
        _, rows, columns = values.shape
        if self.num_parts > len(values) and rows * columns > parts.shape[1] * (rows + columns):
            groups = zip(parts.split(self.parts_of_adapters), values.unbind(), strict=True)
            result = torch.cat([F.linear(own, value) for own, value in groups])
            return result if bias is None else result + bias.to(result.dtype)
        matrices = self._for_parts(values).transpose(1, 2)
        return torch.bmm(parts, matrices) if bias is None else torch.baddbmm(bias, parts, matrices)

    def _for_parts(self, stack: Tensor) -> Tensor:
        """For each part what a stack (n, ...) has for its adapter."""
        if self.num_parts == len(self.adapters):
            return stack
        if stack.device not in self._index:
            index = [place for place, parts in enumerate(self.parts_of_adapters) for _ in range(parts)]
            self._index[stack.device] = torch.tensor(index, device=stack.device)
        return stack.index_select(0, self._index[stack.device])

    @cached_property
    def _factored(self) -> dict[WeightSlot, Factored]:
        """What the layers multiply by whose rules are all low-rank, by the slots of their weights."""
        slots, layers = [], []
        for path, layer, slot in self.layers:
            rules = self._rules_of(slot)
            if all([rule is None or rule in self.low_rank for rule in rules]):
                slots.append(slot)
                layers.append(LayerRules(path, base_value(layer, "weight"), rules))
        return dict(zip(slots, factored(layers), strict=True))

    def _bias(self, layer: nn.Linear) -> Tensor | None:
        """That of the layer (out,), of each adapter (n, 1, out) where it has rules, or None."""
        return self._values(layer, "bias")[:, None] if "bias" in slots_of(layer) else layer.bias

    def _values(self, layer: nn.Module, name: str) -> Tensor:
        """The effective values of a parameter, one for each adapter (n, ...).

        Where they have different numbers of rows, as heads do, further rows are zeros.
        """
        slot, base = cast(WeightSlot, slots_of(layer)[name]), base_value(layer, name)
        rules = self._rules_of(slot)
        ahead = _ahead(rules, base)
        if ahead is not None:
            return ahead
        values = [slot.effective_under(rule, base) for rule in rules]
        most = max(len(value) for value in values)
        return torch.stack([_with_rows(value, most) for value in values])


def _ahead(rules: Sequence[WeightRule | None], weight: Tensor) -> Tensor | None:
    """The values for rules that were computed ahead and lie one behind the other; None if they do not."""
    first = None if rules[0] is None else find_ahead(rules[0], weight)
    if first is None:
        return None
    for place, rule in enumerate(rules[1:], first.place + 1):
        ahead = None if rule is None else find_ahead(rule, weight)
        if ahead is None or ahead.stack is not first.stack or ahead.place != place:
            return None
    values, rounded = first.stack
    stack = rounded if rounded is not None and rounded.dtype == product_dtype(weight) else values
    return stack[first.place : first.place + len(rules)]


def _with_rows(value: Tensor, number: int) -> Tensor:
    """A value with so many rows, the further ones of zeros."""
    missing = number - len(value)
    return F.pad(value, (0, 0) * (value.dim() - 1) + (0, missing)) if missing else value
