"""Batches in which every row has an adapter of its own, from one backbone.

    logits = forward_mixed(model, images, ["flowers", "pets", "flowers", None])

What each row gives is defined by the obvious way: the rows of an adapter go through the model under that
adapter, one adapter after the other. Adapters that change the weights of called linear layers and the head
alone, as most methods do by default, go through the model together instead. Everything but those layers is
then computed once for the whole batch. In such a layer with weight W (out, in), for a row x with adapter a,

    y = W x + U_a (D_a x)        where all rules at hand are low-rank (`WeightRule.low_rank`)
    y = W'_a x                   otherwise, with rows of one adapter next to each other

The first form shares the product with W, which is what makes mixed batches of low-rank adapters cheap
(S-LoRA, Sheng et al. 2023, arXiv 2311.03285). The second multiplies every row once, too, but in smaller
products.

Which adapter acts is said to the present thread alone (`slots.Choice`): threads may serve different adapters
of one model at the same time, and the active adapter stays what it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.declarations import declaration_of
from vimtune.adapters.manage import AdapterRecord, AdapterState, adapter_state, demand_adapter
from vimtune.adapters.points import Points
from vimtune.adapters.rule import WeightRule, each_tensor
from vimtune.adapters.slots import (
    CALL,
    Choice,
    Slot,
    WeightSlot,
    base_value,
    choice,
    has_rules,
    iter_slots,
    point_path,
    slots_of,
)
from vimtune.adapters.wrappers import unwrap
from vimtune.text import quote

_PLAN = "_vimtune_mixing"
"""Attribute of an adapted model under which it is kept how its adapters mix."""

Name = str | None
"""Name of an adapter; None for the plain model."""


@torch.no_grad()
def forward_mixed(model: nn.Module, inputs: Tensor, adapters: Sequence[Name], **arguments: Any) -> list[Any]:
    """What the model gives for each row of a batch under the adapter that is named for it, with its head.

    Args:
        model: a model with adapters, in evaluation mode. Wrappers are seen through, and what torch.compile
            has made of the model is not used.
        inputs: the first argument of the model, (B, ...).
        adapters: B names; None stands for the model without an adapter.
        arguments: others that the model takes, by name; tensors among them have B rows, too.

    Returns:
        A list of B results: of a classifier the logits (classes of the row's adapter,), of a model that gives
        several tensors, or an output of transformers, the same with the row of each.

    Raises:
        ValueError: another number of names, an unknown adapter, a model in training mode, or one that
            torch.compile has changed in place.
    """
    backbone = unwrap(model)
    names = list(adapters)
    if len(names) != len(inputs):
        raise ValueError(f"{len(names)} adapters for a batch of {len(inputs)}: expected one for each row")
    if backbone.training:
        raise ValueError(
            "the model is in training mode, and mixed batches are for answers: call model.eval() first"
        )
    _refuse_compiled(backbone)
    plan = _plan_of(backbone)
    for name in dict.fromkeys(names):
        plan.demand(name)
    results: list[Any] = [None] * len(names)
    for rows in _passes(names, plan):
        taken = [names[row] for row in rows]
        chosen = {name: _take(value, rows, len(names)) for name, value in arguments.items()}
        with _choosing(plan.choice(taken)):
            found = backbone(_take(inputs, rows, len(names)), **chosen)
        for place, row in enumerate(rows):
            results[row] = plan.row(found, place, names[row])
    return results


@contextmanager
def using(model: nn.Module, name: Name) -> Iterator[None]:
    """Within the block the present thread runs a model under one adapter, or without, whatever adapter is
    active. Other threads, and what requires a gradient, do not change; nor can adapters be
    injected, switched or merged within the block.

    Args:
        model: a model with adapters, which has not gone through torch.compile.
        name: an adapter; None for the plain model.

    Raises:
        ValueError: no such adapter, or a compiled model.
    """
    backbone = unwrap(model)
    _refuse_compiled(backbone)
    plan = _plan_of(backbone)
    plan.demand(name)
    with _choosing(plan.choice([name])):
        yield


@contextmanager
def _choosing(chosen: Choice) -> Iterator[None]:
    token = choice.set(chosen)
    try:
        yield
    finally:
        choice.reset(token)


def _take(value: Any, rows: list[int], total: int) -> Any:
    """Some rows of a tensor that has one for each row of the batch; anything else as it is."""
    if not isinstance(value, Tensor) or not value.dim() or len(value) != total or rows == list(range(total)):
        return value
    return value.index_select(0, torch.tensor(rows, device=value.device))


def _passes(names: Sequence[Name], plan: _Plan) -> Iterator[list[int]]:
    """The rows of each pass through the model, those of one adapter next to each other."""
    by_name: dict[Name, list[int]] = {}
    for row, name in enumerate(names):
        by_name.setdefault(name, []).append(row)
    together = [name for name in by_name if name in plan.together]
    if together:
        yield [row for name in together for row in by_name[name]]
    for name in by_name:
        if name not in together:
            yield by_name[name]


def _refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError for a model of which parts have been compiled in place: they would not ask which
    adapter is meant."""
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo import OptimizedModule

    for path, module in model.named_modules():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{quote(path or type(model).__name__)} has gone through torch.compile, which fixes the "
                "active adapter: use the model without it, or set_adapter and a copy for each thread"
            )


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows of a batch that have one adapter."""

    name: Name
    start: int
    end: int


class _Mixture(Choice):
    """Several adapters in one pass, for rows that are sorted by adapter."""

    def __init__(self, plan: _Plan, names: Sequence[Name]) -> None:
        super().__init__(plan.model, plan.slots, None, False)
        starts = [row for row, name in enumerate(names) if row == 0 or names[row - 1] != name]
        ends = [*starts[1:], len(names)]
        self.groups = [_Group(names[start], start, end) for start, end in zip(starts, ends, strict=True)]
        self.num_rows = len(names)
        self.low_rank = plan.low_rank
        self.places: dict[torch.device, Tensor] = {}

    def rules(self, slot: Slot) -> list[Any]:
        rules = [self._rule(slot, group) for group in self.groups]
        return [rule for rule in rules if rule is not None and rule not in self.low_rank]

    @staticmethod
    def _rule(slot: Slot, group: _Group) -> WeightRule | None:
        found = group.name is not None and group.name in slot
        return cast(WeightRule, slot[cast(str, group.name)]) if found else None

    def product(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """What a linear layer gives for x (B, ..., in) with a rule for each group of rows."""
        if len(x) != self.num_rows:
            raise ValueError(
                f"a layer is given {len(x)} rows for a batch of {self.num_rows}: the class of the model is "
                "declared to keep the examples first (batch_first), and does not"
            )
        slots = slots_of(layer)
        slot, weight = cast(WeightSlot, slots["weight"]), base_value(layer, "weight")
        rules = [self._rule(slot, group) for group in self.groups]
        if "bias" not in slots and all(rule is None or rule in self.low_rank for rule in rules):
            return self._shared_product(x, weight, layer.bias, rules)
        parts = []
        for group, rule in zip(self.groups, rules, strict=True):
            value = slot.effective_under(rule, weight)
            bias = layer.bias
            if "bias" in slots:
                bias_slot = cast(WeightSlot, slots["bias"])
                own = base_value(layer, "bias")
                bias = cast(nn.Parameter, bias_slot.effective_under(self._rule(bias_slot, group), own))
            parts.append(F.linear(x[group.start : group.end], value, bias))
        width = max(part.shape[-1] for part in parts)  # Heads may have different numbers of classes.
        return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts])

    def _shared_product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rules: Sequence[WeightRule | None]
    ) -> Tensor:
        result = F.linear(x, weight, bias)
        factors = [None if rule is None else rule.low_rank(weight) for rule in rules]
        ranks = {found[1].shape[0] for found in factors if found is not None}
        if not ranks:
            return result
        rank, (rows, columns) = max(ranks), weight.flatten(1).shape
        nothing = weight.new_zeros(rows, rank), weight.new_zeros(rank, columns)
        filled = [nothing if found is None else _padded(*found, rank) for found in factors]
        ups, downs = (torch.stack([pair[which].T for pair in filled]) for which in (0, 1))
        if len(self.groups) < self.num_rows:
            places = self._places(x.device)
            ups, downs = ups[places], downs[places]
        tokens = x.reshape(len(x), -1, x.shape[-1])
        added = torch.bmm(torch.bmm(tokens, downs.to(x.dtype)), ups.to(x.dtype))
        return result + added.view(result.shape).to(result.dtype)

    def _places(self, device: torch.device) -> Tensor:
        """The group of each row."""
        if device not in self.places:
            sizes = [group.end - group.start for group in self.groups]
            index = [place for place, size in enumerate(sizes) for _ in range(size)]
            self.places[device] = torch.tensor(index, device=device)
        return self.places[device]


def _padded(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors with so many columns and rows, the further ones of zeros."""
    missing = rank - len(down)
    return (F.pad(up, (0, missing)), F.pad(down, (0, 0, 0, missing))) if missing else (up, down)


class _Plan:
    """How the adapters of a model mix; it holds until one is added or removed."""

    def __init__(self, model: nn.Module, state: AdapterState) -> None:
        self.model = model
        self.state = state
        self.records: Mapping[str, AdapterRecord] = dict(state.records)
        self.slots: set[Slot] = set()
        self.low_rank: set[WeightRule] = set()
        apart = set() if declaration_of(model).batch_first else {None, *self.records}
        points = Points(model)
        for place, owner, name, slot in iter_slots(model):
            self.slots.add(slot)
            path = point_path(place, name)
            one_by_one = name.endswith(CALL) or not (
                points.is_multiplied(path) or (name == "bias" and self._is_called(points, place, owner))
            )
            if one_by_one or path in points.tied.values():
                apart |= set(slot)
            elif name == "weight":
                weight = base_value(owner, name)
                rules = cast("list[WeightRule]", [*slot.values()])
                self.low_rank |= {rule for rule in rules if rule.low_rank(weight) is not None}
        self.together = {None, *self.records} - apart
        """The adapters, and the plain model, whose rows can go through the model together."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model makes a plan of its own."""
        return type(None), ()

    @staticmethod
    def _is_called(points: Points, place: str, owner: nn.Module) -> bool:
        """Whether a bias is that of a linear layer that takes mixed rows: one whose weight has a slot."""
        return place + CALL in points.calls and has_rules(owner) and "weight" in slots_of(owner)

    def demand(self, name: Name) -> None:
        """Raise ValueError unless there is such an adapter."""
        if name is not None:
            demand_adapter(self.model, name)

    def choice(self, names: Sequence[Name]) -> Choice:
        """What a pass chooses whose rows have these adapters, sorted by adapter."""
        name = names[0]
        if all(other == name for other in names):
            record = None if name is None else self.records[name]
            return Choice(self.model, self.slots, name, record is not None and record.surrounds_calls)
        return _Mixture(self, names)

    def row(self, result: Any, place: int, name: Name) -> Any:
        """The row of a result at a place, of a head as many outputs as the adapter has."""
        classes = self.state.num_classes if name is None else self.records[name].num_classes
        has_heads = any(record.head for record in self.records.values())
        if isinstance(result, Tensor) and has_heads and classes:
            return result[place][..., :classes]
        return each_tensor(result, lambda tensor: tensor[place])


def _plan_of(model: nn.Module) -> _Plan:
    """The plan of a model with adapters, made anew where these have changed.

    Raises:
        ValueError: the model has no adapter.
    """
    state = adapter_state(model)
    if state is None:
        raise ValueError("the model has no adapter; inject or load one first")
    plan = cast("_Plan | None", model.__dict__.get(_PLAN))
    if (
        plan is None
        or plan.state is not state
        or [*map(id, plan.records.values())] != [*map(id, state.records.values())]
    ):
        plan = model.__dict__[_PLAN] = _Plan(model, state)
    return plan
