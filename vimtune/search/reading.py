"""Spaces in YAML: how one is read, and everything that can be wrong with it, at once.

    parts:
      projectors:
        method: lora
        targets: [in_proj, out_proj]
        options:
          rank: {low: 2, high: 16, log: true}
          alpha: {value: 0.5, times: rank}
      biases: {method: bitfit, optional: false}
    keys:
      lr: {low: 1.0e-4, high: 1.0e-2, log: true}
      weight_decay: {choose: [0, 0.01, 0.1]}

A part is a method at its places; each trial has it or goes without it, unless `optional` is false. With
`combine: one` a trial has exactly one of the parts. An option or a key is a value, `{low, high}` with `step`
for whole numbers or `log`, or `{choose: [...]}`; `times` multiplies it by an option of the same part, or by
a key of the recipe. With `refine` (options of a part; or, of the space, `keys`, `remove_one`, and `options`
that every part has, such as `lr_scale`) there is a second step around the best trial.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any, cast

from vimtune import parsers
from vimtune.fields import Option, not_an_option, options_of
from vimtune.methods import METHODS, Method
from vimtune.recipe import RecipeError
from vimtune.search.composing import method_keys
from vimtune.search.contradictions import contradictions, wrong_factors
from vimtune.search.reading_settings import parse_setting
from vimtune.search.settings import Setting
from vimtune.search.space import NONE, PART, WITHOUT, Part, Space
from vimtune.strict_yaml import read_yaml
from vimtune.text import quote, suggest

MAX_PARTS = 64
"""Most parts of a space."""

_NAME = re.compile(r"[A-Za-z][\w-]{0,39}")
"""What a part may be called: its name is a column of tables."""
_SPACE_KEYS = ("combine", "keys", "parts", "refine")
_PART_KEYS = ("method", "optional", "options", "refine", "targets")
_REFINE_KEYS = ("keys", "options", "remove_one")

Problems = list[str]
"""Lines about what is wrong, to which functions add."""


class SpaceError(RecipeError):
    """A space that cannot be searched; `problems` lists every reason, one line each."""

    subject = "the space"


def published_spaces() -> dict[str, str]:
    """The spaces that come with vimtune: name -> path of the file."""
    folder = files("vimtune.search").joinpath("spaces")
    return {
        entry.name.removesuffix(".yaml"): str(entry)
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def read_space_file(name: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of a space, still to be checked by `parse_space`.

    Args:
        name: one of `published_spaces()`, or a file.

    Raises:
        ValueError: there is no such file, or it is no YAML.
    """
    published = published_spaces()
    text = os.fspath(name)
    if text in published:
        return read_yaml(published[text])
    if not os.path.exists(text):
        raise ValueError(
            f"--space {quote(text)}: expected a YAML file or one of {', '.join(published)}."
            f"{suggest(text, published)}"
        )
    return read_yaml(text)


def parse_space(values: Mapping[str, Any], keys: Mapping[str, Option]) -> Space:
    """The space that the values of a file state.

    Args:
        values: as YAML gives them.
        keys: those of the recipe that a trial may set, by name.

    Raises:
        SpaceError: with all that is wrong.
    """
    problems: Problems = []
    values = {key: value for key, value in values.items() if value is not None}
    _refuse_unknown("the space", values, _SPACE_KEYS, problems)
    refine = _mapping(values.get("refine", {}), "refine", problems)
    _refuse_unknown("refine", refine, _REFINE_KEYS, problems)
    space = Space(
        parts=_parts(values.get("parts"), _refined_everywhere(refine.get("options", {}), problems), problems),
        keys=_keys("keys", values.get("keys", {}), keys, problems),
        refined_keys=_keys("refine: keys", refine.get("keys", {}), keys, problems),
        alternatives=_word("combine", values.get("combine", "any"), ("any", "one"), problems) == "one",
        remove_one=_switch("refine: remove_one", refine.get("remove_one", False), problems),
    )
    if not problems:
        problems += contradictions(space)
    if problems:
        raise SpaceError(problems)
    return space


def _refined_everywhere(values: Any, problems: Problems) -> dict[str, Setting]:
    """What the second step draws for every part: options that all methods have."""
    what, known = "refine: options", options_of(Method)

    def unknown(key: Any, value: Any) -> str:
        return not_an_option(key, value, "every method", known)

    settings, wrong = _settings(what, values, known, unknown, problems)
    problems += wrong_factors(what, settings, known, wrong)
    return settings


def _parts(values: Any, refined: Mapping[str, Setting], problems: Problems) -> dict[str, Part]:
    if not isinstance(values, dict) or not values:
        problems.append(f"parts = {quote(values)}: expected named parts such as {{lora: {{method: lora}}}}")
        return {}
    if len(values) > MAX_PARTS:
        problems.append(f"{len(values)} parts: expected at most {MAX_PARTS}")
        return {}
    parts = {}
    for name, own in values.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (PART, WITHOUT, NONE):
            problems.append(
                f"part {quote(name)}: expected a name of at most 40 letters, digits, '_' and '-' that begins "
                f"with a letter and is none of {PART}, {WITHOUT}, {NONE}"
            )
            continue
        if not isinstance(own, dict):
            problems.append(f"part {name} = {quote(own)}: expected a mapping such as {{method: lora}}")
        elif (part := _part(name, own, refined, problems)) is not None:
            parts[name] = part
    return parts


def _part(
    name: str, values: Mapping[str, Any], refined_everywhere: Mapping[str, Setting], problems: Problems
) -> Part | None:
    what = f"part {name}"
    _refuse_unknown(what, values, _PART_KEYS, problems)
    targets: list[str] = []
    if "targets" in values:
        try:
            given = parsers.targets(values["targets"])
            targets = [given] if isinstance(given, str) else given
        except ValueError as error:
            problems.append(f"{what}: targets = {quote(values['targets'])}: {error}")
    optional = _switch(f"{what}: optional", values.get("optional", True), problems)
    try:
        method = METHODS.parse(values.get("method"))
    except ValueError as error:
        problems.append(f"{what}: method = {quote(values.get('method'))}: {error}")
        return None
    known = options_of(METHODS.get(method))

    def unknown(key: Any, value: Any) -> str:
        return not_an_option(key, value, method, known)

    options, wrong = _settings(f"{what}: options", values.get("options", {}), known, unknown, problems)
    refined, more = _settings(f"{what}: refine", values.get("refine", {}), known, unknown, problems)
    problems += wrong_factors(f"{what}: options", options, known, wrong)
    if refined:
        problems += wrong_factors(f"{what}: refine", {**options, **refined}, known, wrong | more)
    return Part(name, method, tuple(targets), optional, options, {**refined_everywhere, **refined})


def _keys(what: str, values: Any, known: Mapping[str, Option], problems: Problems) -> dict[str, Setting]:
    of_methods = method_keys()

    def unknown(key: Any, value: Any) -> str:
        if key in of_methods:
            return f"{quote(key)} says how the model is adapted: state it in the parts"
        hint = suggest(key, known) if isinstance(key, str) else ""
        return f"{quote(key)} = {quote(value)} is no key that a search may vary.{hint}"

    settings, _ = _settings(what, values, known, unknown, problems)
    problems += wrong_factors(what, settings, known, known)
    return settings


def _settings(
    what: str,
    values: Any,
    known: Mapping[str, Option],
    unknown: Callable[[Any, Any], str],
    problems: Problems,
) -> tuple[dict[str, Setting], set[str]]:
    """What may be drawn for each of `values`, which are options or keys of the table `known`.

    Returns:
        (what may be drawn by name, names of those that are wrong).
    """
    settings: dict[str, Setting] = {}
    wrong: set[str] = set()
    for key, value in _mapping(values, what, problems).items():
        if key not in known:
            problems.append(f"{what}: {unknown(key, value)}")
            continue
        try:
            settings[key] = parse_setting(value, known[key])
        except ValueError as error:
            problems.append(f"{what}: {key} = {quote(value)}: {error}")
            wrong.add(key)
    return settings, wrong


def _refuse_unknown(what: str, values: Mapping[str, Any], known: Iterable[str], problems: Problems) -> None:
    for key in values:
        if key not in known:
            hint = suggest(key, known) if isinstance(key, str) else ""
            problems.append(f"{what}: unknown key {quote(key)}.{hint} Its keys are {', '.join(known)}")


def _mapping(values: Any, what: str, problems: Problems) -> dict[Any, Any]:
    if isinstance(values, dict):
        return values
    problems.append(f"{what} = {quote(values)}: expected a mapping")
    return {}


def _switch(what: str, value: Any, problems: Problems) -> bool:
    try:
        return parsers.boolean(value)
    except ValueError as error:
        problems.append(f"{what} = {quote(value)}: {error}")
        return False


def _word(what: str, value: Any, words: tuple[str, ...], problems: Problems) -> str:
    if value not in words:
        problems.append(f"{what} = {quote(value)}: expected {' or '.join(words)}")
        return words[0]
    return cast(str, value)
