from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY

from vimtune.recipe import Recipe


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Recipe]:
    """`tiny("name", **changes)`: recipe of a run into the folder `name`."""

    def build(name: str = "run", **changes: Any) -> Recipe:
        return Recipe(**{**TINY, "output_dir": str(tmp_path / name), **changes})

    return build


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out, a third of the time of a tiny run."""
    monkeypatch.setattr("vimtune.train.report._save", lambda figure, path: path.touch())
