"""What the parts of a space, and what may be drawn in it, demand of each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vimtune.fields import Option
from vimtune.search.settings import Setting
from vimtune.search.space import Part, Space
from vimtune.text import quote


def contradictions(space: Space) -> Iterable[str]:
    """What is wrong with a space whose parts are right by themselves."""
    for name in space.parts:
        if name in space.keys or name in space.refined_keys:
            yield f"part {name} has the name of a key that is drawn: choose another name"
    if space.alternatives and space.remove_one:
        yield "refine: remove_one does not go with combine = one, where a trial has a single part"
    if space.alternatives:
        return
    places: dict[tuple[str, tuple[str, ...]], str] = {}
    by_method: dict[str, list[Part]] = {}
    for part in space.parts.values():
        by_method.setdefault(part.method, []).append(part)
        first = places.setdefault((part.method, part.targets), part.name)
        if first != part.name:
            yield f"part {part.name}: {first} is the same method with the same targets"
    for method, parts in by_method.items():
        nameless = [part.name for part in parts if not part.targets]
        if len(parts) > 1 and nameless:
            yield f"part {nameless[0]}: several parts are of method {method}, so each of them needs targets"


def wrong_factors(
    what: str, settings: Mapping[str, Setting], known: Mapping[str, Option], given: Iterable[str]
) -> Iterable[str]:
    """One line for each setting that is to be multiplied by what is no number, or what has no value.

    Args:
        what: where they are stated.
        settings: by name.
        known: the options by name.
        given: names of those that have a value of their own, drawn or not.
    """
    for name, setting in settings.items():
        if setting.times is None:
            continue
        shown = f"{what}: {name}: times = {quote(setting.times)}"
        default = known[setting.times].default if setting.times in known else None
        if isinstance(default, bool) or not isinstance(default, int | float):
            yield f"{shown}: expected the name of a number"
        elif setting.times not in given and (setting.times == name or setting.times not in settings):
            yield f"{shown}: expected one that is stated beside it"
        elif _is_circle(name, settings):
            yield f"{shown}: expected one that is not itself multiplied by {name}"


def _is_circle(name: str, settings: Mapping[str, Setting]) -> bool:
    """Whether a setting is multiplied by others that are multiplied by it. One that is multiplied by its own
    name takes the value that the recipe has."""
    seen, factor = [name], settings[name].times
    while factor is not None and factor in settings and factor != seen[-1]:
        if factor in seen:
            return True
        seen.append(factor)
        factor = settings[factor].times
    return False
