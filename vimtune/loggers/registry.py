"""The table of loggers, and how a recipe names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, TypeVar

from vimtune.loggers.base import Logger
from vimtune.registry import Registry, require_complete

LOGGERS: Registry[type[Logger]] = Registry("logger")
"""All loggers by name."""

LoggerType = TypeVar("LoggerType", bound=type[Logger])
"""The class that is registered."""


def register_logger(name: str) -> Callable[[LoggerType], LoggerType]:
    """Class decorator: make a `Logger` known under `name`.

    Raises:
        ValueError: the name is taken, or the class has no summary of its own or lacks a method.
    """

    def register(cls: LoggerType) -> LoggerType:
        require_complete(cls, f"logger {name!r}")
        LOGGERS.add(name, cls)
        return cls

    return register


def list_loggers() -> dict[str, str]:
    """Names of all loggers with a line about each."""
    return {name: cls.summary for name, cls in LOGGERS.items()}


def parse_loggers(value: Any) -> list[str]:
    """Loggers as a recipe or a flag gives them: names with commas between, or a list; "none" for no more than
    metrics.jsonl.

    Raises:
        ValueError: a name that is unknown, or given twice.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "")):
        return []
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise ValueError(f"expected names of loggers ({', '.join(LOGGERS)}) with commas between, or none")
    parsed = [LOGGERS.parse(name.strip() if isinstance(name, str) else name) for name in names]
    if len(set(parsed)) < len(parsed):
        raise ValueError("expected every logger once")
    return parsed


def require_installed(names: Iterable[str]) -> None:
    """Make sure that the packages of loggers are there, without importing them.

    Raises:
        ValueError: one is not; the message says what to install.
    """
    for name in names:
        cls = LOGGERS.get(name)
        if cls.module is not None and find_spec(cls.module) is None:
            raise ValueError(
                f"logger {name} needs {cls.package}, which is not installed: pip install {cls.package}, or "
                f"leave {name} out of --logger"
            )
