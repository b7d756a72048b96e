"""A table of named things to which a user's own package can add: methods, models, data sets, tasks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from vimtune.plugins import load_installed
from vimtune.text import quote, suggest

T = TypeVar("T")
"""What a registry holds."""


class Registry(Generic[T]):
    """Things by name, in the order in which they were added.

    What vimtune itself adds is there once the room that owns the registry has been imported. Whatever
    installed packages add (`vimtune.plugins`) is loaded when the registry is first asked.
    """

    def __init__(self, kind: str, error: type[ValueError] = ValueError) -> None:
        """An empty registry.

        Args:
            kind: what the things are, in the singular, for messages: "method".
            error: class of the error for an unknown name.
        """
        self.kind = kind
        self._error = error
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Make `thing` known under `name`. A new version of the same definition takes its place.

        Raises:
            ValueError: the name belongs to another thing, or has characters that mean something elsewhere.
        """
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"{self.kind} {quote(name)}: expected a name of letters, digits, '_', '-' and '.'"
            )
        known = self._things.get(name)
        if known is not None and _origin(known) != _origin(thing):
            raise ValueError(
                f"there is a {self.kind} {quote(name)} already ({_origin(known)}); choose another name for "
                f"{_origin(thing)}"
            )
        self._things[name] = thing

    def get(self, name: str) -> T:
        """The thing called `name`.

        Raises:
            ValueError: (or the registry's own subclass) unknown name; the message lists those that are known.
        """
        if name not in self:
            hints = self.hints(name)
            raise self._error(f"unknown {self.kind} {quote(name)}.{hints} Known: {', '.join(self)}")
        return self._things[name]

    def parse(self, value: Any) -> str:
        """A name as a recipe or a flag gives it.

        Raises:
            ValueError: it is not the name of any of the things.
        """
        if not isinstance(value, str) or value not in self:
            raise ValueError(f"expected a known {self.kind}: {', '.join(self)}.{self.hints(value)}")
        return value

    def hints(self, name: Any) -> str:
        """What may help somebody who gave an unknown name."""
        close = suggest(name, self) if isinstance(name, str) else ""
        broken = "".join(f" Package {key} cannot be loaded: {why}." for key, why in load_installed().items())
        return f"{close} What a package of your own adds is known once it is imported (--import).{broken}"

    def items(self) -> Iterator[tuple[str, T]]:
        """(name, thing) of all."""
        load_installed()
        yield from list(self._things.items())

    def __contains__(self, name: object) -> bool:
        load_installed()
        return isinstance(name, str) and name in self._things

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _origin(thing: object) -> str:
    """Where a thing was defined. A class or function knows it; entries of one class state it as `origin`."""
    if not isinstance(thing, type) and isinstance(stated := getattr(thing, "origin", None), str):
        return stated
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def require_complete(cls: type, what: str) -> None:
    """Check that a class that is being registered states its line of `--list` itself, and has every method
    that its base leaves open.

    Raises:
        ValueError: the class body has no `summary = "one line"`, or a method is missing; the message names
            class and file.
    """
    shown = f"{what}: class {cls.__name__} in {_file_of(cls)}"
    summary = vars(cls).get("summary")
    if not isinstance(summary, str) or not summary.strip() or "\n" in summary:
        raise ValueError(f'{shown} needs summary = "...", one line that --list shows')
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise ValueError(
            f"{shown} needs the methods {', '.join(missing)}; the docstrings of its base say what they do"
        )


def _file_of(cls: type) -> str:
    """The file of a class; its module where there is none, as in a notebook."""
    try:
        return inspect.getsourcefile(cls) or cls.__module__
    except (TypeError, OSError):
        return cls.__module__
