"""The names of the package `vimtune`: all there, documented, and loaded on first use."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import vimtune
from vimtune import compare, data, models


@pytest.mark.parametrize("name", vimtune.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    thing = getattr(vimtune, name)
    assert name in dir(vimtune)
    assert thing.__name__ == name and len(inspect.getdoc(thing)) > 20
    assert thing.__doc__, "the docstring of a base class says nothing about this one"
    members = vars(thing).items() if inspect.isclass(thing) else ()
    for member, function in members:
        if inspect.isfunction(function) and not member.startswith("_"):
            assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"


def test_every_name_has_one_home():
    homes = [name for names in vimtune._HOMES.values() for name in names]
    assert sorted(homes) == sorted(vimtune.__all__)


def test_names_without_torch():
    """What defines recipes, methods, data sets and tasks is imported without torch."""
    names = ["Recipe", "load_recipe", "Method", "register_method", "list_methods", "register_dataset", "Task"]
    names += ["register_model", "list_models", "list_datasets", "option", "register_task"]
    code = (
        f"import sys, vimtune\nfor name in {names}: getattr(vimtune, name)\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FILES = sorted(Path(vimtune.__file__).parent.rglob("*.py"))


def test_models_are_registered_whoever_has_asked_for_timm_before():
    """transformers, for one, asks whether there is a timm without importing it."""
    code = "import sys, vimtune, importlib.util as u; a, b = u.find_spec('timm'), u.find_spec('timm'); "
    code += "assert a and b and 'timm' not in sys.modules; import timm; timm.create_model('test_vim'); "
    code += "assert not [one for one in sys.meta_path if type(one).__module__.startswith('vimtune')]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FILES[0].parent)))
def test_every_public_definition_of_a_module_is_documented(path):
    """Functions and classes by their docstring, anything else by a text below it, which editors show."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names, text = [node.name], ast.get_docstring(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [
                name.id
                for target in targets
                if not isinstance(target, ast.Attribute)  # that of something documented elsewhere
                for name in ast.walk(target)
                if isinstance(name, ast.Name)
            ]
            value = after.value if isinstance(after, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else None
        else:
            continue
        public = [name for name in names if not name.startswith("_") and name != "logger"]
        assert not public or isinstance(text, str), f"line {node.lineno}: {', '.join(public)}"


PACKAGES = [vimtune, compare, data, models]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_names_that_are_imported_on_first_use(package):
    assert set(package.__all__) <= set(dir(package))
    others = {name for name in dir(package) if not name.startswith("__")} - set(package.__all__)
    assert all(inspect.ismodule(getattr(package, name)) for name in others), others
    for home, names in package._HOMES.items():
        for name in names:
            assert name in package.__all__
            assert getattr(package, name) is getattr(sys.modules[home], name)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_unknown_names(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'injekt'"):
        getattr(package, "injekt")  # noqa: B009 - an attribute by itself looks useless to the linter


def test_scripts_of_one_name_do_not_meet():
    """Files beside the package import each other by their bare names, also several folders in one process."""
    root = Path(__file__).parent.parent
    names = Counter(
        path.name
        for folder in ("benchmarks", "docs", "examples", "notebooks", "tests")
        for path in (root / folder).rglob("*.py")
        if path.name not in ("conftest.py", "__init__.py")
    )
    assert [name for name, count in names.items() if count > 1] == []
