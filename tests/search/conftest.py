"""Fixtures that the tests of searches share."""

from __future__ import annotations

import pytest

pytest.importorskip("optuna")


@pytest.fixture(scope="session", autouse=True)
def images_of_trials(each_flower_is_painted_once: None) -> None:
    """Trials see the same images; painting them is most of the time of one."""


@pytest.fixture(autouse=True)
def no_pictures_of_runs(no_pictures: None) -> None:
    """Trials are not drawn; what the search itself draws is."""
