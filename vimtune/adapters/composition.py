"""Several rules at one point, and rules for some rows of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.adapters.parts import TextPart
from vimtune.adapters.rule import Call, CallRule, Rule, WeightRule

Rows = tuple[int, int] | None
"""First row and the row after the last one; None for all rows."""


class Composition(WeightRule):
    """Rules for one parameter, or for rows of it, one after the other: each is given what those before it
    made.

    The row numbers of a rule are those of the value that it is given, so a rule that adds rows may be
    followed by one for rows of the grown value. What a rule adds by a perturbation does not pass through
    those after it, so none of them may be for the same rows (`sites.py` refuses that).
    """

    def __init__(self, rules: Sequence[WeightRule], rows: Sequence[Rows]) -> None:
        super().__init__()
        self.rules = nn.ModuleList(rules)
        self.rows = tuple(rows)
        self.perturbs = any(rule.perturbs for rule in rules)

    def effective_weight(self, weight: Tensor) -> Tensor:
        for rule, rows in self.steps():
            weight = _apply_rule(rule, rows, weight)
        return weight

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        ups, downs = [], []
        for rule, rows in self.steps():
            first, end = (0, weight.shape[0]) if rows is None else rows
            if (found := rule.low_rank(weight[first:end])) is None:
                return None
            ups.append(F.pad(found[0], (0, 0, first, weight.shape[0] - end)))
            downs.append(found[1])
        return torch.cat(ups, 1), torch.cat(downs)

    def perturbation(self, x: Tensor, weight: Tensor) -> Tensor:
        total = None
        for rule, rows in self.steps():
            if rule.perturbs:
                first, end = (0, weight.shape[0]) if rows is None else rows
                own = rule.perturbation(x, weight[first:end])
                own = F.pad(own, (first, weight.shape[0] - end))
                total = own if total is None else total + own
            weight = _apply_rule(rule, rows, weight)
        assert total is not None, "it is asked of compositions alone in which a rule perturbs"
        return total

    def steps(self) -> list[tuple[WeightRule, Rows]]:
        """(rule, its rows), in the order in which they are applied."""
        return list(zip(cast(Sequence[WeightRule], self.rules), self.rows, strict=True))


def _apply_rule(rule: WeightRule, rows: Rows, weight: Tensor) -> Tensor:
    """`weight` under a rule for all or some of its rows."""
    if rows is None:
        return rule.effective_weight(weight)
    first, end = rows
    return torch.cat([weight[:first], rule.effective_weight(weight[first:end]), weight[end:]])


def overlap(some: Rows, others: Rows) -> bool:
    """Whether two choices of rows have a row in common."""
    return some is None or others is None or (some[0] < others[1] and others[0] < some[1])


class Nesting(CallRule):
    """Rules around one call: the first is the innermost, so that each surrounds what those before it made."""

    def __init__(self, rules: Sequence[CallRule]) -> None:
        super().__init__()
        self.rules = nn.ModuleList(rules)
        self.mixes_tokens = any(rule.mixes_tokens for rule in rules)

    def around(self, call: Call, x: Any, *flow: dict[str, Tensor]) -> Any:
        for rule in self.rules:
            call = _surrounded(cast(CallRule, rule).around, call, flow)
        return call(x)

    def around_part(self, call: Call, x: Any, part: TextPart, *flow: dict[str, Tensor]) -> Any:
        mixing = 0
        for rule in cast(Sequence[CallRule], self.rules):
            call = _surrounded(rule.around_part, call, (part.numbered(mixing), *flow))
            mixing += rule.mixes_tokens
        return call(x)


def _surrounded(around: Callable[..., Any], call: Call, rest: tuple[Any, ...]) -> Call:
    return lambda x: around(call, x, *rest)


def part_of(rule: Rule, tensor: str) -> tuple[Rule, str]:
    """The single rule that a tensor of `rule` belongs to, and the tensor's name within it: of the composition
    or nesting that has it as "rules.<index>.<name>", or `rule` itself."""
    if isinstance(rule, Composition | Nesting):
        _, index, own = tensor.split(".", 2)
        return cast(Rule, rule.rules[int(index)]), own
    return rule, tensor


def single_rules(rule: Rule) -> Iterator[Rule]:
    """The rules that a composition or nesting is made of, in order; any other rule itself."""
    if isinstance(rule, Composition | Nesting):
        yield from cast("Iterator[Rule]", iter(rule.rules))
    else:
        yield rule
