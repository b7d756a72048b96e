"""The catalogue read off the source files, and what it does with sources that it cannot read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from vimtune import catalog
from vimtune.adapters import Method, get_method, register_method
from vimtune.data import ImageDataset, register_dataset
from vimtune.methods import option


@pytest.fixture
def sources(monkeypatch, tmp_path) -> Path:
    """A copy of the files that the catalogue reads; the registries stay those of the package."""
    shutil.copytree(
        catalog._PACKAGE / "models", tmp_path / "models", ignore=lambda *_: ["weights", "__pycache__"]
    )
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path)
    return tmp_path


def test_a_model_without_description_is_named_with_its_file(sources):
    path = sources / "models" / "vim.py"
    path.write_text(
        path.read_text(encoding="utf-8") + "\n@register_model\ndef vim_new(pretrained):\n    ...\n"
    )
    with pytest.raises(ValueError, match=r"model vim_new in .*vim\.py needs a docstring"):
        catalog._models()


@pytest.mark.parametrize("summary", [None, "", " ", 3, "two\nlines"])
def test_a_class_without_summary_is_refused_with_class_and_file(summary):
    body = {} if summary is None else {"summary": summary}
    for register, base in ((register_method, Method), (register_dataset, ImageDataset)):
        with pytest.raises(ValueError, match=rf"'new'.*class New in .*{Path(__file__).name} needs summary"):
            register("new")(type("New", (base,), body | {"__module__": __name__}))


def test_an_inherited_summary_is_none_of_ones_own():
    with pytest.raises(ValueError, match="needs summary"):
        register_method("new")(type("New", (get_method("lora"),), {"__module__": __name__}))


def test_a_field_without_help_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class New(Method):
        summary = "new"
        good: int = option(1, "help")
        bad: int = 3

        def build_rule(self, site):
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"method 'new': field bad needs option\(default, help\)"):
        register_method("new")(New)
