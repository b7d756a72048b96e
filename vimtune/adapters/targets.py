"""From what the user calls a target to the points it stands for.

| target | stands for |
|---|---|
| `both` | in_proj and out_proj |
| `in_proj`, `mixer.in_proj`, `layers.0.mixer.in_proj` | the weight of the modules whose path ends so |
| `A_log`, `conv1d.bias`, `layers.0.mixer.A_log` | the parameters whose path ends so |
| `x_proj[B]`, `x_proj[dt|B]` | named rows of such a weight, each row name a point of its own |
| `x_proj`, `A_log`, `conv1d.bias`, `x_proj[B]` | both directions where the model has two: `x_proj_b`, too |
| `x_proj_b`, `mixer.x_proj`, `layers.0.mixer.x_proj` | this direction alone |
| `scan()`, `out_proj()`, `encode()` | calls whose path ends so |
| `layers.0.` | every parameter below the modules whose path ends so |
| `re:mixer\\.(A_log|D)$` | parameters in whose path the expression is found |
| `re:x_proj(_b)?\\.weight\\[B\\]$` | also rows, if the expression, with `\\[`, is found in their path alone |
| `re:(in|out)_proj\\(\\)$` | also calls, if the expression has `\\(\\)` |
| `!layers.0.`, `!x_proj[B]`, `!re:_b` | not these, whatever the others stand for |

Where a scan has two directions, its model says which parameters are copies for the reverse one
(`Declaration.reverse_copies`). The name of such a parameter or of its module means both directions. A name
that begins above it, the name of the copy, a whole path and a regular expression mean what they say.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.text import quote, split_outside, suggest

if TYPE_CHECKING:
    from vimtune.adapters.points import Points

ALIASES = {"both": ("in_proj", "out_proj")}
"""Names for several targets together."""

_INDEX = re.compile(r"\.(\d+)\.")
"""The first number in a path, which is the index of the block that a point belongs to."""
_TARGET = re.compile(r"(?P<name>[^\[\]()]+)(?:\[(?P<rows>[^\[\]()]*)\]|(?P<call>\(\)))?")
"""The text of a target: a name, then `[rows]`, which may be several, or `()` for a call."""


@dataclass(frozen=True)
class Target:
    """One target, taken apart."""

    text: str
    """The text of the target as the user gave it."""
    excludes: bool
    """Whether it takes points away ("!")."""
    selects: Callable[[str], bool]
    """Whether it stands for the parameter or call at a path."""
    rows: tuple[str, ...] = ()
    """Names of the rows that it stands for; none for whole parameters and calls."""
    names_calls: bool = False
    """Whether it may stand for calls: "scan()", or a regular expression that speaks of "()"."""
    names_rows: bool = False
    """Whether it is a regular expression that speaks of "[", and so may be found in the path of rows."""
    is_expression: bool = False
    """Whether it is a regular expression, which means one direction of a scan unless it says otherwise."""

    def means(self, place: str, shared_names: Mapping[str, str]) -> bool:
        """Whether it stands for the parameter or call at a path, by its own name or by one that it shares.

        Args:
            place: the path.
            shared_names: as in `Points`.
        """
        if self.selects(place):
            return True
        return place in shared_names and not self.is_expression and self.selects(shared_names[place])

    def stands_for(self, path: str, shared_names: Mapping[str, str]) -> bool:
        """Whether the point at `path`, which may be rows of a parameter, is one of those that are meant.

        Args:
            path: the path of the point.
            shared_names: as in `Points`.
        """
        place, _, rows = path.partition("[")
        if self.names_rows and self.selects(path):
            return True
        return self.means(place, shared_names) and (not self.rows or rows.removesuffix("]") in self.rows)

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target that a text says.

        Raises:
            ValueError: no target, or no regular expression.
        """
        excludes = text.startswith("!")
        name = text.removeprefix("!").strip()
        if name.startswith("re:"):
            pattern = name.removeprefix("re:")
            found = _search(pattern, text)
            return cls(
                text,
                excludes,
                found,
                names_calls=r"\(\)" in pattern,
                names_rows=r"\[" in pattern,
                is_expression=True,
            )
        match = _TARGET.fullmatch(name)
        if match is None or match["rows"] == "":
            raise ValueError(
                f"target {quote(text)}: expected a name such as in_proj, rows such as x_proj[dt|B], a call "
                "such as scan(), 're:' and a regular expression, or one of these after '!'"
            )
        rows = tuple(row.strip() for row in match["rows"].split("|")) if match["rows"] else ()
        full = match["name"] + (match["call"] or "")
        return cls(text, excludes, lambda path: matches(path, full), rows, match["call"] is not None)


def _search(pattern: str, text: str) -> Callable[[str], bool]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"target {quote(text)} is no regular expression: {error}") from None
    return lambda path: expression.search(path) is not None


def resolve_targets(
    points: Points, targets: str | Sequence[str], layers: Sequence[int] | None = None
) -> list[str]:
    """Paths of the points that `targets` stand for: parameters and rows in the model's order, then calls.

    Args:
        points: those of the model.
        targets: one or several targets (see the table above); a string may list several, separated by commas
            outside of brackets.
            Whole paths of points are targets as well.
        layers: keep only these blocks (negative counts from the end); all if None.

    Raises:
        ValueError: a target that selects nothing or a layer that the model does not have (the message lists
            what it has).
    """
    given = split_targets(targets)
    included = [target for target in given if not target.excludes]
    excluded = [target for target in given if target.excludes]
    if not included:
        raise ValueError(f"targets {quote(targets)} name nothing to adapt. {_known(points)}")
    chosen: dict[str, list[str]] = {}
    for target in included:  # The parts of an alias have one text.
        chosen[target.text] = chosen.get(target.text, []) + _select(points, target)
    kept = {path for paths in chosen.values() for path in paths}
    for target in excluded:
        taken = {path for path in kept if target.stands_for(path, points.shared_names)}
        if not taken:
            raise ValueError(f"target {quote(target.text)} takes nothing away from {_listed(included)}")
        kept -= taken
    if layers is not None:
        kept = set(in_layers(sorted(kept), layers))
    for text, paths in chosen.items():
        if kept.isdisjoint(paths):
            because = (
                "is taken away by the exclusions"
                if layers is None
                else f"lies in none of the layers {list(layers)}"
            )
            raise ValueError(f"target {quote(text)} selects nothing: all of it {because}")
    return [path for path in points_in_order(points) if path in kept]


def split_targets(targets: str | Sequence[str]) -> list[Target]:
    """Targets one by one, aliases replaced by what they stand for.

    Raises:
        ValueError: one of them is no target.
    """
    texts = split_outside(targets, ",") if isinstance(targets, str) else targets
    parts: list[Target] = []
    for text in map(str.strip, texts):
        sign, name = ("!", text[1:].strip()) if text.startswith("!") else ("", text)
        for part in ALIASES.get(name, (name,)):
            parts.append(dataclasses.replace(Target.parse(sign + part), text=text))
    return parts


def split_option_targets(key: str) -> list[Target]:
    """The targets in a key of an option's values by target. A regular expression is a key by itself, with its
    commas.

    Raises:
        ValueError: one of them is no target.
    """
    return split_targets([key] if key.lstrip().startswith("re:") else key)


def _select(points: Points, target: Target) -> list[str]:
    searched = [*points.parameters, *(points.calls if target.names_calls else ())]
    tied = {first for path, first in points.tied.items() if target.selects(path)}
    places = [path for path in searched if target.means(path, points.shared_names) or path in tied]
    if target.names_rows:  # The rows of a parameter that is meant itself are a part of it.
        rows = [f"{path}[{row}]" for path in points.rows if path not in places for row in points.rows[path]]
        places += [path for path in rows if target.selects(path)]
    if not target.rows:
        if not places:
            _refuse_call(points, target)
            _refuse_alias(points, target)
            raise ValueError(f"unknown target {quote(target.text)}.{_hint(points, target)} {_known(points)}")
        return places
    having = [path for path in places if path in points.rows]
    if not having:
        raise ValueError(f"target {quote(target.text)}: the model has no such named rows. {_known(points)}")
    for path in having:
        for row in target.rows:
            if row not in points.rows[path]:
                known = "|".join(points.rows[path])
                raise ValueError(
                    f"target {quote(target.text)}: {path} has no rows {quote(row)}, it has [{known}]"
                )
    return [f"{path}[{row}]" for path in having for row in points.rows[path] if row in target.rows]


def _refuse_call(points: Points, target: Target) -> None:
    """Say why a target that names the call of a module that there is stands for no call."""
    for path in points.parameters if target.names_calls else ():
        layer = path.rpartition(".")[0]
        if target.selects(layer + "()"):
            reason = (
                f"the model only reads the weight of {layer}, so that there is no call to surround: choose "
                f"the weight, {short_name(f'{layer}.weight')!r}"
                if layer in points.read
                else f"{layer} is no linear layer, and the model declares no such call"
            )
            raise ValueError(f"target {quote(target.text)}: {reason}. {_known(points)}")


def _refuse_alias(points: Points, target: Target) -> None:
    """Say which of the targets that an alias stands for the model does not have."""
    if target.text not in ALIASES:
        return
    parts = ALIASES[target.text]
    missing = [part for part in parts if not any(matches(path, part) for path in points.parameters)]
    raise ValueError(
        f"target {quote(target.text)} stands for {' and '.join(parts)}, and this model has no "
        f"{' and no '.join(missing)}: name the targets that are meant. {_known(points)}"
    )


def points_in_order(points: Points) -> list[str]:
    """The paths of all points: each parameter followed by its rows, then the calls."""
    paths: list[str] = []
    for path in points.parameters:
        paths += [path, *(f"{path}[{row}]" for row in points.rows.get(path, ()))]
    return [*paths, *points.calls]


def refuse_overlaps(paths: Collection[str]) -> None:
    """Refuse points of one method of which one is a part of another.

    Raises:
        ValueError: rows are among them, and the parameter that they belong to is, too.
    """
    for path in sorted(paths):
        whole = path.partition("[")[0]
        if whole != path and whole in paths:
            raise ValueError(
                f"{path} is a part of {whole}, which the same method adapts as a whole: name one of the two"
            )


def _known(points: Points) -> str:
    return f"Targets of this model: {', '.join(available_targets(points))}"


def _listed(targets: Sequence[Target]) -> str:
    return ", ".join(target.text for target in targets)


def _hint(points: Points, target: Target) -> str:
    return suggest(target.text.removeprefix("!"), available_targets(points))


def available_targets(points: Points) -> list[str]:
    """Every short name that a model understands as a target."""
    short = dict.fromkeys(
        alias
        for alias, parts in ALIASES.items()
        if all(any(matches(path, part) for path in points.parameters) for part in parts)
    )
    for path in points.parameters:
        short[_short_name(path)] = None
        if path in points.rows:
            short[f"{_short_name(path)}[{'|'.join(points.rows[path])}]"] = None
    for path in points.calls:
        short[path.rpartition(".")[2]] = None
    return list(short)


def _short_name(path: str) -> str:
    """The last part of a path that says which parameter it is."""
    parts = path.split(".")
    if parts[-1] == "weight" and len(parts) > 1:
        return parts[-2]
    return ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]


def short_name(path: str) -> str:
    """The target that stands for a point in every layer: "in_proj", "x_proj[B]", "scan()"."""
    place, bracket, rows = path.partition("[")
    short = place.rpartition(".")[2] if place.endswith("()") else _short_name(place)
    return short + bracket + rows


def is_bias(path: str) -> bool:
    """Whether a parameter is a bias by its name, as are `dt_bias` and `bias_ih_l0` beside their weights."""
    name = path.rpartition(".")[2]
    return name == "bias" or name.endswith("_bias") or name.startswith("bias_")


def block_index(path: str) -> int | None:
    """Index of the block that a point belongs to: the first number in its path."""
    match = _INDEX.search(path)
    return int(match.group(1)) if match else None


def matches(path: str, name: str) -> bool:
    """Whether the name of a target means the parameter or call at `path`.

    A name that ends with a dot means everything below the modules that it names.
    """
    if name.endswith("."):
        return path.startswith(name) or f".{name}" in path
    return any(path == full or path.endswith(f".{full}") for full in (name, f"{name}.weight"))


def in_layers(paths: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Those of the points that belong to some blocks, by their indices (negative counts from the end).

    Raises:
        ValueError: there are no such blocks among them.
    """
    indices = {index for path in paths if (index := block_index(path)) is not None}
    depth = max(indices) + 1 if indices else 0
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not layers:
        raise ValueError(
            f"layers {list(layers)}: the blocks with such targets are 0 to {depth - 1} (or -{depth} to -1)"
        )
    wanted = {layer % depth for layer in layers}
    return [path for path in paths if block_index(path) in wanted]
