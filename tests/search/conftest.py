"""Fixtures that the tests of searches share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

pytest.importorskip("optuna")


@pytest.fixture(scope="session", autouse=True)
def each_flower_is_painted_once() -> Iterator[None]:
    """Trials see the same images; painting them is most of the time of one. A trial gets a copy."""
    from vimtune.data.synthetic import scene

    paint = functools.lru_cache(maxsize=2000)(scene.render_flower)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene, "render_flower", lambda *place: paint(*place).copy())
        yield


@pytest.fixture(autouse=True)
def no_pictures_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing of each run, a third of its time."""
    monkeypatch.setattr("vimtune.training.pictures.save_picture", lambda figure, path: path.touch())
