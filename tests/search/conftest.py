"""Fixtures that the tests of searches share."""

from __future__ import annotations

import pytest

pytest.importorskip("optuna")


@pytest.fixture(scope="session", autouse=True)
def images_of_trials(each_flower_is_painted_once: None) -> None:
    """Trials see the same images; painting them is most of the time of one."""


@pytest.fixture(autouse=True)
def no_pictures_of_searches(no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither trials nor searches are drawn, apart from those of fixtures that are made once for a file."""
    monkeypatch.setattr("vimtune.search.search.save_picture", lambda figure, path: path.touch())
