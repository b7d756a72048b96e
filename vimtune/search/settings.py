"""What may be drawn for one number or word of a recipe: a value that is fixed, a range, or a choice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Plain = bool | int | float | str | None
"""What a choice may offer."""


class Chooser(Protocol):
    """Draws values by name; a trial of optuna is one."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number from `low` to `high`."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from `low` to `high`."""

    def suggest_categorical(self, name: str, choices: tuple[Plain, ...]) -> Any:
        """One of `choices`."""


@dataclass(frozen=True)
class Setting(ABC):
    """What may be drawn for one value."""

    times: str | None
    """Name of another value by which the one that is drawn is multiplied; None for the value itself."""

    @abstractmethod
    def draw(self, name: str, chooser: Chooser) -> Any:
        """A value, before it is multiplied; `name` is that under which it is drawn."""

    @abstractmethod
    def ends(self) -> Iterator[Any]:
        """The values from which it can be told whether all are right."""


@dataclass(frozen=True)
class Fixed(Setting):
    """The same value in every trial."""

    constant: Any

    def draw(self, name: str, chooser: Chooser) -> Any:
        """The value."""
        return self.constant

    def ends(self) -> Iterator[Any]:
        """The value."""
        yield self.constant


@dataclass(frozen=True)
class Range(Setting):
    """A number from `low` to `high`, both included; a whole one where both are."""

    low: float
    high: float
    step: int | None = None
    """Distance of whole numbers; 1 if None."""
    log: bool = False
    """Whether factors are equally likely, not differences."""

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, name: str, chooser: Chooser) -> Any:
        """A number of the range."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return chooser.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return chooser.suggest_float(name, float(self.low), float(self.high), log=self.log)

    def ends(self) -> Iterator[Any]:
        """The smallest and the largest number."""
        yield from (self.low, self.high)


@dataclass(frozen=True)
class Choice(Setting):
    """One of several values."""

    choices: tuple[Plain, ...]

    def draw(self, name: str, chooser: Chooser) -> Any:
        """One of them."""
        return chooser.suggest_categorical(name, self.choices)

    def ends(self) -> Iterator[Any]:
        """All of them."""
        yield from self.choices
