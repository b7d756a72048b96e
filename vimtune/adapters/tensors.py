"""The tensors of an adapter: what is trained, saved, loaded and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from vimtune.adapters.composition import part_of
from vimtune.adapters.declarations import is_undecayed
from vimtune.adapters.manage import AdapterRecord, active_adapter, demand_adapter
from vimtune.adapters.points import Points
from vimtune.adapters.rule import Rule
from vimtune.adapters.slots import (
    CALL,
    SLOTS,
    base_parameters,
    base_value,
    iter_slots,
    iter_weight_slots,
    join,
    point_path,
)
from vimtune.adapters.targets import points_in_order, short_name
from vimtune.adapters.wrappers import unwrap
from vimtune.text import quote

_CONVERTIBLE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
"""Dtypes among which a loaded tensor may change; from any other one it is refused."""


class DeadAdapterError(ValueError):
    """A trainable tensor of the active adapter got no gradient: it would never train."""


@dataclass(frozen=True)
class AdaptedParameter:
    """One trained tensor of an adapter."""

    name: str
    """Its name in `model.named_parameters()`; under a wrapper, in that of the model inside."""
    key: str
    """Its name in `adapter_state_dict`, which does not depend on the adapter's name."""
    parameter: nn.Parameter
    """The tensor itself."""
    base_name: str
    """Path of the base parameter or call that its rule acts on."""
    group: str
    """"head" or "adapter"."""
    weight_decay: float
    """How strongly weight decay pulls it to zero, as a multiple of the run's; its rule decides
    (`Rule.decay`), and the option `decay_scale` of its method."""
    learning_rate: float
    """How fast it learns, as a multiple of the run's rate for its group; its rule decides
    (`Rule.learning_rate`), and the option `lr_scale` of its method."""


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[AdaptedParameter]:
    """Trained tensors of the active adapter, or of the one named.

    Raises:
        ValueError: there is no such adapter.
    """
    model = unwrap(model)
    _, record = demand_adapter(model, name)
    exempt: set[str] = getattr(model, "no_weight_decay", set)()  # This is how models of timm say it.
    seen: set[nn.Parameter] = set()
    for path, declared, prefix, rule in _rules(model, record):
        exempted = declared or path in exempt
        for own, parameter in rule.named_parameters():
            if parameter not in seen:  # Rules may share tensors.
                seen.add(parameter)
                single, inside = part_of(rule, own)
                yield AdaptedParameter(
                    name=f"{prefix}.{own}",
                    key=join(path, own),
                    parameter=parameter,
                    base_name=path,
                    group="head" if path in record.head else "adapter",
                    weight_decay=single.decay_scale * float(single.decay(inside, exempted)),
                    learning_rate=single.lr_scale * float(single.learning_rate(inside)),
                )


def _rules(model: nn.Module, record: AdapterRecord) -> Iterator[tuple[str, bool, str, Rule]]:
    """(path of the parameter or call, whether its module exempts it from decay, path of the rule, rule) of
    one adapter."""
    for place, owner, name, slot in iter_slots(model):
        if record.name in slot:
            prefix = join(join(place, SLOTS), f"{name}.{record.name}")
            yield point_path(place, name), _is_exempt(owner, name), prefix, cast(Rule, slot[record.name])


def _is_exempt(owner: nn.Module, name: str) -> bool:
    """Whether the class of the owner declares that a parameter does not decay, or the parameter is marked as
    mamba-ssm marks them."""
    if name.endswith(CALL):
        return False
    return is_undecayed(owner, name) or bool(getattr(base_value(owner, name), "_no_weight_decay", False))


def _tensors(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """Parameters and persistent buffers of an adapter's rules, by their key in a file; one that several rules
    share is there once."""
    model = unwrap(model)
    _, record = demand_adapter(model, name)
    found: dict[str, Tensor] = {}
    seen: set[Tensor] = set()
    for path, _, _, rule in _rules(model, record):
        persistent = rule.state_dict()
        tensors = [*rule.named_parameters(), *rule.named_buffers()]
        for own, tensor in tensors:
            if own in persistent and tensor not in seen:
                seen.add(tensor)
                found[join(path, own)] = tensor
    return found


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Every trained tensor and every persistent buffer of an adapter: "<base parameter>.<tensor of its rule>"
    -> tensor (detached)."""
    return {key: tensor.detach() for key, tensor in _tensors(model, name).items()}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Copy tensors saved by `adapter_state_dict` into an adapter.

    Keys and shapes have to be the adapter's own. Tensors in double, single or half precision (float16,
    bfloat16) are converted to the one of these that the adapter has on this model; any other dtype has to be
    the same.

    Raises:
        ValueError: keys, shapes or dtypes differ, or a value is not finite; nothing is loaded then.
    """
    own = _tensors(model, name)
    check_tensors(state, own)
    check_values(model, state, name)
    for key, tensor in own.items():
        tensor.copy_(state[key])


def check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare tensors with those that they are to be copied to.

    Raises:
        ValueError: naming the first differences.
    """
    problems = [f"missing {key}" for key in expected.keys() - given.keys()]
    problems += [f"unexpected {quote(key)}" for key in given.keys() - expected.keys()]
    for key in expected.keys() & given.keys():
        if problem := _difference(given[key], expected[key]):
            problems.append(f"{key} {problem}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError("the adapter's tensors do not fit: " + "; ".join(sorted(problems)[:4]) + more)


def check_values(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Let the rules of an adapter judge values that they are about to get (`Rule.misfit`).

    Args:
        model: a model with adapters.
        state: tensors of the right shapes, with keys as in `adapter_state_dict`.
        name: which adapter; the active one if None.

    Raises:
        ValueError: naming the first values that do not fit.
    """
    model = unwrap(model)
    _, record = demand_adapter(model, name)
    problems = []
    for path, _, _, rule in _rules(model, record):
        for inside, part in rule.named_modules():
            for own in [*part._parameters, *part._buffers] if isinstance(part, Rule) else ():
                key = join(path, join(inside, own))
                if key in state and (problem := part.misfit(own, state[key])):
                    problems.append(f"{key} {problem}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError("the adapter's tensors do not fit: " + "; ".join(problems[:4]) + more)


def _difference(given: Tensor, expected: Tensor) -> str | None:
    if given.shape != expected.shape:
        return f"has shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
    if given.dtype != expected.dtype and not {given.dtype, expected.dtype} <= _CONVERTIBLE:
        return f"is of {given.dtype}, expected {expected.dtype}"
    if given.is_meta:
        return "has no values (device meta)"
    if not torch.isfinite(given.to(expected.dtype)).all():
        return "holds values that are not finite"
    return None


def check_gradients(model: nn.Module) -> None:
    """After a backward pass, make sure that every trained tensor took part in it.

    Raises:
        DeadAdapterError: tensors without a gradient, all of them named.
    """
    dead = [item.name for item in adapter_parameters(model) if item.parameter.grad is None]
    if dead:
        names = ", ".join(dead[:6]) + (f" and {len(dead) - 6} more" if len(dead) > 6 else "")
        raise DeadAdapterError(
            f"{len(dead)} trainable tensor(s) got no gradient and would never train: {names}. "
            "The model does not read these parameters, or make these calls, through their modules."
        )


@dataclass(frozen=True)
class AdapterSummary:
    """Sizes of a model under its active adapter, and what the adapter changes."""

    method: str
    """The method, or several joined by "+"; "no adapter" for a plain model."""
    trainable: int
    """Trained numbers, head included."""
    head: int
    """Trained numbers of the head."""
    total: int
    """Numbers of the plain model, as after `merge`; parameters that folded calls leave there do not count."""
    adapted: dict[str, dict[str, int]] = field(default_factory=dict)
    """The targets on which each method acts ("in_proj", "x_proj[B]", "scan()") and in how many places."""
    places: dict[str, int] = field(default_factory=dict)
    """In how many places the model has each of these targets."""
    untouched: list[str] = field(default_factory=list)
    """Targets that stay as they are in every layer, the head aside; of a parameter some of whose rows are
    adapted, the other rows."""

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        lines = [
            f"{self.method}: {self.trainable:,} of {self.total:,} parameters train ({share:.2f} %): "
            f"{self.trainable - self.head:,} of the adapter, {self.head:,} of the head"
        ]
        for method, places in self.adapted.items():
            listed = ", ".join(f"{target} ({self._share(target, count)})" for target, count in places.items())
            lines.append(f"  {method} acts on: {listed or 'nothing'}")
        if self.untouched:
            lines.append(f"  unchanged: {', '.join(self.untouched)}")
        return "\n".join(lines)

    def _share(self, target: str, count: int) -> str:
        """How many of the places of a target are adapted: "24" for all of them, "12 of 24"."""
        total = self.places.get(target, count)
        return f"{count}" if count == total else f"{count} of {total}"


def summary(model: nn.Module) -> AdapterSummary:
    """Count trained and total parameters, and list what is adapted and what is not.

    Without an adapter everything that requires a gradient counts as trained.
    """
    model = unwrap(model)
    record = active_adapter(model)
    if record is None:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return AdapterSummary("no adapter", trainable, 0, sum(p.numel() for _, p in base_parameters(model)))
    sizes = [(item.group, item.parameter.numel()) for item in adapter_parameters(model)]
    head = sum(size for group, size in sizes if group == "head")
    grown = {  # A rule may let its parameter grow.
        path: slot.evaluated(base_value(owner, name)).numel()
        for path, owner, name, slot in iter_weight_slots(model)
        if path not in record.head
    }
    counts = {
        path: grown.get(path, p.numel()) for path, p in base_parameters(model) if path not in record.head
    }
    adapted = {name: dict(Counter(map(short_name, paths))) for name, paths in record.sites.items()}
    changed = set().union(*adapted.values())
    points = Points(model)
    places = Counter(short_name(path) for path in points_in_order(points) if path not in record.head)
    return AdapterSummary(
        record.method,
        sum(size for _, size in sizes),
        head,
        sum(counts.values()) + head,
        adapted,
        {target: count for target, count in places.items() if target in changed},
        list(dict.fromkeys(name for path in counts for name in _unchanged(points, path, changed))),
    )


def _unchanged(points: Points, path: str, changed: set[str]) -> list[str]:
    """The targets for a parameter, or for those of its rows, that are not among the changed ones."""
    short = short_name(path)
    if short in changed:
        return []
    rows = [f"{short}[{row}]" for row in points.rows.get(path, ())]
    return [short] if changed.isdisjoint(rows) else [row for row in rows if row not in changed]
