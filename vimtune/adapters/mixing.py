"""Batches in which every row has an adapter of its own, from one backbone.

    logits = forward_mixed(model, images, ["flowers", "pets", "flowers", None])

What each row gives is defined by the obvious way: the rows of an adapter go through the model under that
adapter, one adapter after the other. Adapters that change the weights of called linear layers and the head
alone, as most methods do by default, go through the model together instead. Everything but those layers is
then computed once for the whole batch, and in them rows of all adapters share the product with W where their
rules are low-rank (S-LoRA, Sheng et al. 2023, arXiv 2311.03285); `mixture.py` has the formulas.

Which adapter acts is said to the present thread alone (`slots.Choice`): threads may serve different adapters
of one model at the same time, and the active adapter stays what it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from vimtune.adapters.declarations import declaration_of
from vimtune.adapters.manage import AdapterRecord, AdapterState, adapter_state, demand_adapter
from vimtune.adapters.mixture import MixedLayer, Mixture, Name
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
    is_factor,
    iter_slots,
    own_modules,
    point_path,
    slots_of,
)
from vimtune.adapters.wrappers import unwrap
from vimtune.text import quote

_PLAN = "_vimtune_mixing"
"""Attribute of an adapted model under which it is kept how its adapters mix."""


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
        for row, result in zip(rows, plan.rows(found, taken), strict=True):
            results[row] = result
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

    for path, module in own_modules(model):
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{quote(path or type(model).__name__)} has gone through torch.compile, which fixes the "
                "active adapter: use the model without it, or set_adapter and a copy for each thread"
            )


class _Plan:
    """How the adapters of a model mix; it holds until one is added or removed."""

    def __init__(self, model: nn.Module, state: AdapterState) -> None:
        self.model = model
        self.state = state
        self.records: Mapping[str, AdapterRecord] = dict(state.records)
        self.slots: set[Slot] = set()
        self.layers: list[MixedLayer] = []
        self.low_rank: set[WeightRule] = set()
        apart = set() if declaration_of(model).batch_first else {None, *self.records}
        points = Points(model)
        for place, owner, name, slot in iter_slots(model):
            self.slots.add(slot)
            if is_factor(owner, name):
                self.layers.append(MixedLayer(point_path(place, name), owner, cast(WeightSlot, slot)))
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
        return Mixture(self.model, self.slots, self.layers, self.low_rank, names)

    def rows(self, result: Any, names: Sequence[Name]) -> list[Any]:
        """The rows of a result of a pass, of a head as many outputs as the adapter of the row has."""
        unbind = cache(Tensor.unbind)

        def take(place: int) -> Any:
            return each_tensor(result, lambda tensor: unbind(tensor)[place])

        rows = [take(place) for place in range(len(names))]
        if not isinstance(result, Tensor) or not any(record.head for record in self.records.values()):
            return rows
        return [self._answer(row, name) for row, name in zip(rows, names, strict=True)]

    def _answer(self, row: Tensor, name: Name) -> Tensor:
        """As many outputs as an adapter has of a row that may have further ones."""
        classes = self.state.num_classes if name is None else self.records[name].num_classes
        return row[..., :classes] if classes and classes < row.shape[-1] else row


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
