"""What a task is, and the registry that finds tasks by name.

A task is what a model is trained for. It is a frozen dataclass whose fields are its options.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from vimtune.fields import Options, options_of
from vimtune.registry import Registry
from vimtune.utils import require_summary


@dataclass(frozen=True, kw_only=True)
class Task(Options, ABC):
    """What a model is trained for.

    Derived classes are frozen dataclasses and registered with `register_task`. Their fields, stated with
    `vimtune.fields.option`, are keys of the recipes of this task.
    """

    name: ClassVar[str] = ""
    """Name in the registry."""
    summary: ClassVar[str] = ""
    """One line for tables."""


AnyTask = TypeVar("AnyTask", bound=type[Task])

TASKS: Registry[type[Task]] = Registry("task")
"""All tasks by name."""


def register_task(name: str) -> Callable[[AnyTask], AnyTask]:
    """Class decorator that makes a task known under `name`.

    Raises:
        ValueError: the name is taken by another task, or the class has no summary of its own or a field
            without help.
    """

    def register(cls: AnyTask) -> AnyTask:
        require_summary(cls, f"task {name!r}")
        options_of(cls)
        TASKS.add(name, cls)
        cls.name = name
        return cls

    return register
