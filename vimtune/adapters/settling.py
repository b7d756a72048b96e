"""Methods that choose what to train, or where to start, from data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vimtune.adapters.composition import single_rules
from vimtune.adapters.manage import AdapterRecord, demand_adapter
from vimtune.adapters.rule import Rule
from vimtune.adapters.slots import iter_slots, point_path
from vimtune.adapters.tensors import adapter_parameters, adapter_state_dict
from vimtune.adapters.wrappers import unwrap
from vimtune.methods import build_methods


class TrainingBatches(Iterator[Callable[[], float]]):
    """Training batches as methods draw them before the first step: an iterator over functions.

    Each of them runs the forward and backward pass of one batch, adds to the gradients of all tensors that
    the adapter trains at that time, and gives the loss. A rule may have further parameters until the method
    has made its choice.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Callable[[], float]]) -> None:
        self._model, self._batches = model, iter(batches)

    def __next__(self) -> Callable[[], float]:
        return next(self._batches)

    def take(self, count: int) -> Iterator[Callable[[], float]]:
        """The next batches.

        Raises:
            ValueError: there are fewer.
        """
        for number in range(count):
            run = next(self, None)
            if run is None:
                raise ValueError(
                    f"the method asks for {count} training batches before the first step, and there are "
                    f"only {number}"
                )
            yield run

    @contextmanager
    def warmed_up(self, steps: int, lr: float) -> Iterator[None]:
        """The adapter as some updates by Adam leave it, for the length of a block; then it is as it was.

        Every tensor of the adapter takes part that requires a gradient, whatever method it belongs to, and so
        does the head: a method that is not to train meanwhile lets its tensors require none.

        Args:
            steps: number of updates, each by one batch.
            lr: their learning rate.

        Raises:
            ValueError: there are fewer batches, or the loss of one is not finite.
        """
        before = {key: tensor.clone() for key, tensor in adapter_state_dict(self._model).items()}
        trained = [item.parameter for item in adapter_parameters(self._model) if item.parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=lr)
        try:
            for number, run in enumerate(self.take(steps)):
                optimizer.zero_grad()
                loss = run()
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the loss is {loss} in update {number + 1} of {steps} before the first step, with "
                        f"learning rate {lr}: give the method a lower one for these updates"
                    )
                optimizer.step()
            yield
        finally:
            optimizer.zero_grad()
            for key, tensor in adapter_state_dict(self._model).items():
                tensor.copy_(before[key])


def settles(model: nn.Module) -> bool:
    """Whether a method of the active adapter wants to see data before training (`Method.settle`)."""
    _, record = demand_adapter(unwrap(model))
    return any(chosen.method.settles for chosen in build_methods(record.method, record.options))


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
    drawn = TrainingBatches(backbone, batches)
    for chosen in build_methods(record.method, record.options):
        if chosen.method.settles:
            chosen.method.settle(rules[chosen.method.name], drawn)


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
