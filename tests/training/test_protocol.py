"""Few training examples, the protocol of 800 and 200, and runs that do not look at the test split."""

from __future__ import annotations

import functools

import pytest

from vimtune.data.synthetic import SyntheticFlowers
from vimtune.recipe import RecipeError
from vimtune.training import train

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that are opened, in order."""
    splits: list[str] = []
    original = SyntheticFlowers.__init__

    @functools.wraps(original)  # whose signature says which options there are
    def init(self: SyntheticFlowers, split: str, *args, **kwargs) -> None:
        splits.append(split)
        original(self, split, *args, **kwargs)

    monkeypatch.setattr(SyntheticFlowers, "__init__", init)
    return splits


def test_800_and_200_select_an_epoch_and_the_report_says_what_was_drawn(tiny) -> None:
    report = train(tiny(train_size=10, epochs=2))
    assert report.split == "test" and report.selection_split == "val"
    assert len([record for record in report.history if "top1" in record]) == 2
    assert "8 images" in report.data["train"] and "2 images" in report.data["val"]
    assert all("for train_size 10 drawn with seed 0" in report.data[split] for split in ("train", "val"))
    assert report.recipe["train_size"] == 10


def test_all_1000_are_tested_once(tiny) -> None:
    report = train(tiny(train_size=10, train_split="train+val", epochs=2))
    assert report.best_epoch == 2 and report.selection_split == "test"
    assert ["top1" in record for record in report.history] == [False, True]
    assert "10 images" in report.data["train+val"]


def test_a_run_without_test_does_not_open_it(tiny, opened) -> None:
    report = train(tiny(test=False, epochs=1, shots=2))
    assert set(opened) == {"train", "val"}
    assert report.split == "val" and set(report.data) == {"train", "val"}
    assert "10 images, 2 of each class drawn with seed 0" in report.data["train"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 2, "train_size": 10}, "give one of them"),
        ({"shots": 0}, "expected a whole number >= 1"),
        ({"train_size": 1}, "expected a whole number >= 2"),
        ({"test": False, "train_split": "train+val"}, "test = false leaves nothing to score"),
        ({"test": False, "eval_split": "test"}, "test = false leaves nothing to score"),
    ],
)
def test_what_contradicts_itself_is_refused(tiny, changes, message) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny(**changes)
