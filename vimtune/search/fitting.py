"""Whether the model can have the parts of a space, told before the first trial.

Names and values are compared with the methods' options when a space is read. Whether the model has the
places, whether sizes fit its weights and whether parts go together, only the model can say. So the parts are
added to it, once for each end of what may be drawn, on the meta device, where nothing is computed: all at
once, and where that fails each by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vimtune.adapters import delete_adapter, inject
from vimtune.adapters.budget import without_values
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.search.plan import Plan
from vimtune.search.reading import SpaceError
from vimtune.search.results import describe
from vimtune.search.settings import Choice, Fixed, Plain
from vimtune.search.space import Drawn, Part, Space


def check_parts(plan: Plan) -> list[str]:
    """Compare the parts of a plan's space with the model of its recipe.

    Args:
        plan: a plan whose space is right by itself. Where its task does not give a model without data and
            training (`Task.open_base`), nothing is compared.

    Returns:
        A line for each pair of parts that do not go together, though trials may have one without the other.

    Raises:
        SpaceError: a part that the model cannot have, or two that cannot be together and that every trial
            has. The message names all of them, their values and what was expected.
        ValueError: data or weights of the recipe that cannot be opened.
    """
    opened = plan.recipe.task.open_base(plan.recipe, Processes())
    if opened is None:
        return []
    model, space = without_values(opened), plan.space
    draws = {
        name: [*_drawn(part), *_drawn(_refined(space, name, part))] for name, part in space.parts.items()
    }
    if not space.alternatives and _all_fit_together(plan, model, space, draws):
        return []
    problems = []
    for name, values in draws.items():
        found = (_problem(plan, model, space, {name: own}) for own in values)
        if problem := next(filter(None, found), None):
            problems.append(problem)
    if problems:
        raise SpaceError(problems)
    if space.alternatives:
        return []
    needed: list[str] = []
    may_be: list[str] = []
    for pair in itertools.combinations(draws, 2):
        if problem := _problem(plan, model, space, {name: draws[name][0] for name in pair}):
            both = not any(space.parts[name].optional for name in pair)
            (needed if both else may_be).append(problem)
    if needed:
        raise SpaceError(needed)
    return may_be


def _all_fit_together(
    plan: Plan, model: nn.Module, space: Space, draws: Mapping[str, Sequence[Mapping[str, Any]]]
) -> bool:
    """Whether the model can have all parts at once, whatever values of `draws` they have. If so, which is
    usual, no single one has to be tried."""
    together = (
        {name: values[min(number, len(values) - 1)] for name, values in draws.items()}
        for number in range(max(map(len, draws.values())))
    )
    return all(_problem(plan, model, space, parts) is None for parts in together)


def _problem(
    plan: Plan, model: nn.Module, space: Space, parts: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Why a trial with these parts and values cannot be; None if it can."""
    drawn = Drawn({name: dict(values) for name, values in parts.items()}, {})
    method = Recipe.from_values(plan.trial_values(space, drawn, Path("trial"))).method
    try:
        inject(model, method.peft, targets=method.targets, layers=method.layers, **method.method_kwargs)
    except ValueError as error:
        what = "part" if len(parts) == 1 else "parts"
        return f"{what} {describe(drawn)}: {' '.join(str(error).split())}"
    delete_adapter(model, "default")
    return None


def _refined(space: Space, name: str, part: Part) -> Part:
    """A part as the second step has it."""
    return space.refine(Drawn({name: _drawn(part)[0]}, {})).parts[name]


def _drawn(part: Part) -> list[dict[str, Any]]:
    """Values of a part's options that have every end of a range and every value of a choice among them."""
    variety = [
        len(setting.choices) if isinstance(setting, Choice) else 1 if isinstance(setting, Fixed) else 2
        for setting in part.options.values()
    ]
    return [part.draw(_Nth(number)) for number in range(max(variety, default=1))]


class _Nth:
    """A chooser that takes the value number so and so of each choice, and the ends of ranges in turn."""

    def __init__(self, number: int) -> None:
        self._number = number

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """An end of a range."""
        return high if self._number % 2 else low

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """An end of a range."""
        return high if self._number % 2 else low

    def suggest_categorical(self, name: str, choices: Sequence[Plain]) -> Any:
        """A value of a choice; the last one if there are not so many."""
        return choices[min(self._number, len(choices) - 1)]
