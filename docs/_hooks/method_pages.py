"""The page of the methods, from their registry: formulas from docstrings, options, counts, measurements."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeGuard

import evidence
import timm
from markdown_tables import write_table
from torch import nn

import vimtune
from vimtune.adapters.composition import single_rules
from vimtune.adapters.manage import head_parameters
from vimtune.adapters.rule import Rule
from vimtune.adapters.slots import iter_slots, join
from vimtune.fields import Option, options_of
from vimtune.methods import METHODS, Method
from vimtune.text import shorten

COUNTED = "vim_tiny_patch16_224"
"""The model for which trained numbers are counted."""


@dataclass(frozen=True)
class Facts:
    """What is known of a method with its default places and options."""

    trained: int
    """How many numbers it trains of `COUNTED`, the head aside."""
    places: list[str]
    """Targets where it acts."""
    rules: list[type[Rule]]
    """Classes of its rules."""
    merges: bool
    """Whether a plain model can compute what it computes."""


def table() -> str:
    """A line for each method."""
    rows = []
    for name, method in METHODS.items():
        facts = facts_about(name)
        merges = "yes" if facts.merges else "no"
        rows.append([f"[`{name}`](#{name})", method.summary, f"{facts.trained:,}", merges])
    return write_table(["`--peft`", "what it trains", "Vim-tiny, without head", "merges"], rows)


def sections() -> str:
    """A section for each method."""
    return "\n\n".join("\n\n".join(_section(name, method)) for name, method in METHODS.items())


def _section(name: str, method: type[Method]) -> Iterator[str]:
    facts = facts_about(name)
    yield f"## `{name}` {{ #{name} }}"
    yield docstring_of(inspect.getmodule(method))
    places = ", ".join(f"`{place}`" for place in facts.places)
    yield (
        f"**Trains** {facts.trained:,} numbers of Vim-tiny beside the head. "
        f"**Acts on** {places or 'nothing but the head'}. "
        f"**Merges:** {'yes' if facts.merges else 'no, the adapter stays beside the model'}."
    )
    yield from formulas(facts.rules)
    common = options_of(Method)
    own = [item for item in options_of(method).values() if item.name not in common]
    if own:
        yield write_table(["option", "default", "what"], map(_option_row, own))
    if found := evidence.about(name):
        yield found


def _option_row(item: Option) -> list[str]:
    return [f"`{item.name}`", f"`{shorten(str(item.default))}`", item.help]


def formulas(rules: list[type[Rule]]) -> Iterator[str]:
    """What the files of rules say about their formulas. Where a file has rules of other methods, too, what
    the classes say follows."""
    for home in dict.fromkeys(rule.__module__ for rule in rules):
        module = importlib.import_module(home)
        own = [rule for rule in rules if rule.__module__ == home]
        there = [thing for thing in vars(module).values() if _is_rule(thing) and thing.__module__ == home]
        if home != Rule.__module__:
            yield docstring_of(module)
        if home == Rule.__module__ or len(there) > len(own):
            yield from map(docstring_of, own)


def _is_rule(thing: object) -> TypeGuard[type[Rule]]:
    return isinstance(thing, type) and issubclass(thing, Rule)


def docstring_of(thing: object) -> str:
    """The docstring without what is about the arguments of a class."""
    text = inspect.getdoc(thing) or ""
    return text.partition("\n\nArgs:")[0].strip()


@cache
def facts_about(name: str) -> Facts:
    """What is known of a method."""
    model = _empty_model()
    vimtune.inject(model, name, name="counted")
    try:
        report = vimtune.summary(model)
        head = head_parameters(model)
        rules = {type(rule): None for path, rule in _rules(model) if path not in head}
        places = list(report.adapted.get(name, {}))
        return Facts(report.trainable - report.head, places, list(rules), merges(name))
    finally:
        vimtune.delete_adapter(model, "counted")


def _rules(model: nn.Module) -> Iterator[tuple[str, Rule]]:
    for path, _, name, slot in iter_slots(model):
        for rule in single_rules(slot.rule):
            yield join(path, name), rule


@cache
def _empty_model() -> nn.Module:
    """The model without values, which is enough to count."""
    return timm.create_model(COUNTED, num_classes=2, device="meta")


def merges(name: str) -> bool:
    """Whether a method with its default options can be merged, as found on one layer of a small model."""
    model = timm.create_model("vim_nano_patch8_64", depth=2, num_classes=2)
    vimtune.inject(model, name)
    try:
        vimtune.merge(model)
    except ValueError as error:
        if "nothing was merged" not in str(error):
            raise
        return False
    return True
