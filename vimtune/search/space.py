"""A space: the parts of which a composition of methods is made, and the keys of the recipe that vary.

A search may have two steps. The first one draws which parts there are, at the sizes that their options
state. The second one keeps the parts of the best trial and draws what `refined` says of them; it may leave
one of them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vimtune.search.settings import Chooser, Fixed, Setting

PART = "part"
"""Under this name an alternative is drawn."""
WITHOUT = "without"
"""Under this name the part is drawn that the second step leaves out."""
NONE = "none"
"""What is drawn there if none is left out."""


@dataclass(frozen=True)
class Part:
    """A method at its places: what is switched on or off."""

    name: str
    method: str
    targets: tuple[str, ...] = ()
    """Where the method acts; its own choice if there are none."""
    optional: bool = True
    """Whether a trial may go without it."""
    options: Mapping[str, Setting] = field(default_factory=dict)
    """Options of the method by name."""
    refined: Mapping[str, Setting] = field(default_factory=dict)
    """Those that the second step draws."""

    def draw(self, chooser: Chooser) -> dict[str, Any]:
        """Values of the options."""
        return _draw(self.options, chooser, f"{self.name}.", {})


@dataclass(frozen=True)
class Drawn:
    """What one trial trains."""

    parts: dict[str, dict[str, Any]]
    """The parts that there are, with the values of their options."""
    keys: dict[str, Any]
    """Keys of the recipe."""


@dataclass(frozen=True)
class Space:
    """All that a search may try."""

    parts: Mapping[str, Part]
    keys: Mapping[str, Setting] = field(default_factory=dict)
    """Keys of the recipe beside its method."""
    refined_keys: Mapping[str, Setting] = field(default_factory=dict)
    """Those that the second step draws."""
    alternatives: bool = False
    """Whether a trial has exactly one of the parts."""
    remove_one: bool = False
    """Whether the second step may leave one part out."""
    removes: bool = False
    """Whether this one may: it is a second step."""

    @property
    def has_refinement(self) -> bool:
        """Whether a second step would draw anything."""
        refined = any(part.refined for part in self.parts.values())
        return refined or bool(self.refined_keys) or self.remove_one

    def draw(self, chooser: Chooser, base: Mapping[str, Any]) -> Drawn:
        """What a trial trains.

        Args:
            chooser: draws the values, always in the same order.
            base: the recipe's keys, by which those that are drawn may be multiplied.
        """
        chosen = {name: self.parts[name].draw(chooser) for name in self._draw_parts(chooser)}
        return Drawn(chosen, _draw(self.keys, chooser, "", base))

    def _draw_parts(self, chooser: Chooser) -> list[str]:
        if self.alternatives:
            return [chooser.suggest_categorical(PART, tuple(self.parts))]
        without = chooser.suggest_categorical(WITHOUT, (NONE, *self.parts)) if self.removes else NONE
        return [
            name
            for name, part in self.parts.items()
            if name != without and (not part.optional or chooser.suggest_categorical(name, (True, False)))
        ]

    def refine(self, best: Drawn) -> Space:
        """The space of the second step, around the best trial of the first one."""
        parts = {}
        for name, values in best.parts.items():
            part = self.parts[name]
            options = {key: Fixed(None, value) for key, value in values.items()}
            parts[name] = replace(part, optional=False, options={**options, **part.refined}, refined={})
        return Space(
            parts=parts,
            keys={**{key: Fixed(None, value) for key, value in best.keys.items()}, **self.refined_keys},
            removes=self.remove_one and len(parts) > 1,
        )


def _draw(
    settings: Mapping[str, Setting], chooser: Chooser, prefix: str, base: Mapping[str, Any]
) -> dict[str, Any]:
    """Values of settings; one that is multiplied by another is so whichever of them comes first."""
    drawn = {name: setting.draw(prefix + name, chooser) for name, setting in settings.items()}

    def value(name: str) -> Any:
        factor = settings[name].times
        if factor is None:
            return drawn[name]
        return drawn[name] * (value(factor) if factor in drawn and factor != name else base[factor])

    return {name: value(name) for name in settings}
