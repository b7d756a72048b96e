"""The method of CONTRIBUTING.md works as it is written there, wherever methods are listed and tested."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from document_blocks import ROOT, blocks_of

from vimtune.methods import METHODS
from vimtune.testing import check_method


@pytest.fixture
def method_of_contributing(monkeypatch, tmp_path) -> Path:
    """A copy of the package with the two files of CONTRIBUTING.md; this process knows their method."""
    rule, options = (block.body for block in blocks_of("python", "CONTRIBUTING.md"))
    ignored = shutil.ignore_patterns("__pycache__", "fixtures")
    shutil.copytree(ROOT / "vimtune", tmp_path / "vimtune", ignore=ignored)
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    for name, text in {"adapters.rules.gain": rule, "methods.gain": options}.items():
        path = tmp_path / "vimtune" / f"{name.replace('.', '/')}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"vimtune.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"vimtune.{name}", module)
        spec.loader.exec_module(module)
    package = tmp_path / "vimtune" / "methods" / "__init__.py"
    text = package.read_text(encoding="utf-8")
    changed = re.sub(
        r"^(from vimtune\.methods import .*?)(, \w+)(  # noqa)", r"\1\2, gain\3", text, flags=re.M
    )
    assert changed != text
    package.write_text(changed, encoding="utf-8")
    return tmp_path


def test_the_method_of_contributing_is_listed_without_torch(method_of_contributing):
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vimtune", "--list"],
        cwd=method_of_contributing,
        env={**os.environ, "PYTHONPATH": str(method_of_contributing)},
        capture_output=True,
        text=True,
    )
    assert "vimtune.methods.gain" in listing.stderr and "torch" not in listing.stderr
    assert "one free factor per output channel" in listing.stdout and "start=1.0" in listing.stdout


@pytest.mark.usefixtures("method_of_contributing")
def test_the_method_of_contributing_passes_the_checks_of_every_method():
    check_method("gain")


@pytest.mark.usefixtures("method_of_contributing")
@pytest.mark.parametrize("name", ["adapters/test_methods.py", "test_configs.py"])
def test_the_generic_tests_take_the_method_of_contributing(name, monkeypatch):
    """They go over the methods that are registered when they are collected."""
    if name == "adapters/test_methods.py":
        monkeypatch.syspath_prepend(ROOT / "tests" / "adapters")
        monkeypatch.setitem(sys.modules, "method_cases", None)  # what is there now comes back in the end
        del sys.modules["method_cases"]
    spec = importlib.util.spec_from_file_location("collected_anew", ROOT / "tests" / name)
    collected = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collected)
    if name == "test_configs.py":
        collected.test_one_step_of_every_method_setting_moves_all_it_trains(collected.distinct()["gain"])
    else:
        assert ("gain", {}) in collected.CASES
