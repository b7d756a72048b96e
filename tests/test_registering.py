"""What is refused when something is registered."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from vimtune.adapters import Method, get_method, register_method
from vimtune.data import ImageDataset, register_dataset
from vimtune.loggers import Logger, register_logger
from vimtune.methods import option
from vimtune.tasks import Task, register_task


@pytest.mark.parametrize("summary", [None, "", " ", 3, "two\nlines"])
def test_a_class_without_summary_is_refused_with_class_and_file(summary):
    body = {} if summary is None else {"summary": summary}
    for register, base in ((register_method, Method), (register_dataset, ImageDataset)):
        with pytest.raises(ValueError, match=rf"'new'.*class New in .*{Path(__file__).name} needs summary"):
            register("new")(type("New", (base,), body | {"__module__": __name__}))


def test_a_class_of_a_session_without_a_file_is_refused_with_its_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "session", ModuleType("session"))
    with pytest.raises(ValueError, match=r"'new': class New in session needs summary"):
        register_method("new")(type("New", (Method,), {"__module__": "session"}))


def test_an_inherited_summary_is_none_of_ones_own():
    with pytest.raises(ValueError, match="needs summary"):
        register_method("new")(type("New", (get_method("lora"),), {"__module__": __name__}))


@pytest.mark.parametrize(
    ("register", "base", "missing"),
    [
        (register_dataset, ImageDataset, "describe, load"),
        (register_logger, Logger, "close, open, write"),
        (register_task, Task, "open"),
    ],
)
def test_a_class_without_what_its_base_leaves_open_is_refused(register, base, missing):
    body = {"summary": "new", "__module__": __name__}
    with pytest.raises(ValueError, match=rf"'new': class New in .* needs the methods .*{missing}"):
        register("new")(type("New", (base,), body))


def test_a_field_without_help_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class New(Method):
        summary = "new"
        good: int = option(1, "help")
        bad: int = 3

        def build_rule(self, site):
            raise NotImplementedError

    message = r"class New: field bad has no help: expected bad: TYPE = option\(.*from vimtune import option"
    with pytest.raises(ValueError, match=message):
        register_method("new")(New)
