"""What an evaluation of a classifier says follows from the answers, and no name in it does harm."""

from __future__ import annotations

import json
import math

import pytest
import torch
from nasty import NASTY_NAMES
from PIL import Image

from vimtune.metrics.calibration import HIGHEST
from vimtune.pages.page import Page
from vimtune.tasks.classes import page as module
from vimtune.tasks.classes import reliability
from vimtune.tasks.classes.answers import answers_of
from vimtune.tasks.classes.calibration import Calibration, Temperature, temperature_of
from vimtune.tasks.classes.details import ClassDetails, Examples

IMAGES = Examples("path", "images", lambda index: f"{index}.jpg", lambda index: Image.new("RGB", (8, 8)))
NONE = Temperature(None, "nobody asked")


@pytest.fixture
def details(monkeypatch: pytest.MonkeyPatch) -> ClassDetails:
    """Four classes, of which the last one has no images."""
    monkeypatch.setattr("vimtune.pages.page.to_png", lambda figure: b"")
    monkeypatch.setattr(reliability, "draw_reliability", lambda *what: None)
    monkeypatch.setattr(module, "draw_confusion_matrix", lambda *what: None)
    logits = torch.tensor([[3.0, 0, 0, 0], [0, 2, 0, 0], [4, 0, 0, 0], [0, 0, 1, 0], [0, 5, 0, 0]])
    answers = answers_of(logits, torch.tensor([0, 1, 1, 2, 2]))
    return ClassDetails(
        answers, ["a", "b", "c", "d"], "test", IMAGES, Temperature(2.0, "by hand"), notes=["Beware."]
    )


def test_the_worst_mistake_comes_first(details: ClassDetails) -> None:
    worst, other = details.mistakes()
    assert (worst["path"], worst["true"], worst["predicted"], worst["true_rank"]) == ("4.jpg", "c", "b", 3)
    assert (other["path"], other["true"], other["predicted"], other["true_rank"]) == ("2.jpg", "b", "a", 2)
    assert worst["loss"] == pytest.approx(math.log(3 + math.exp(5)))
    assert worst["true_probability"] == pytest.approx(1 / (3 + math.exp(5)))
    assert worst["probability"] == pytest.approx(math.exp(5) / (3 + math.exp(5)))


def test_numbers_are_those_of_the_metrics(details: ClassDetails) -> None:
    scores, numbers = details.scores(), details.numbers()
    json.dumps(numbers)
    assert scores["macro_f1"] == pytest.approx((100 * 2 / 3 + 50 + 100 * 2 / 3) / 3)
    assert scores["temperature"] == 2.0 and scores["calibrated_ece"] != scores["ece"]
    assert numbers["notes"] == ["Beware."] and sum(own["count"] for own in numbers["reliability"]) == 5
    assert numbers["classes"][3] == {"class": "d", "count": 0, "answers": 0} | dict.fromkeys(
        ("precision", "recall", "f1")
    )
    assert numbers["most_confused"][0] == {"true": "b", "predicted": "a", "count": 1, "of": 2}


def test_the_page_shows_the_mistakes(details: ClassDetails) -> None:
    page = Page("c", "t", details.rows(), details.sections().values()).to_html()
    assert page.count("data:image/jpeg") == 2 and 'title="4.jpg"' in page and "Beware." in page
    assert "temperature</td><td>2.000, by hand" in page and "Of 4 classes 1 have no images." in page


def test_answers_that_are_all_right_are_a_page_too(details: ClassDetails) -> None:
    answers = answers_of(torch.eye(2), torch.arange(2))
    found = ClassDetails(answers, ["a", "b"], "test", IMAGES, NONE)
    assert found.mistakes() == [] and found.scores()["macro_f1"] == 100
    page = Page("c", "t", found.rows(), found.sections().values()).to_html()
    assert "Nothing is taken for anything else." in page and "There is no temperature: nobody asked." in page


def test_names_are_harmless(details: ClassDetails) -> None:
    count = len(NASTY_NAMES)
    answers = answers_of(torch.eye(count).roll(1, 0), torch.arange(count))
    found = ClassDetails(answers, list(NASTY_NAMES), "test", IMAGES, NONE)
    page = Page("c", "t", found.rows(), found.sections().values()).to_html()
    assert "<script" not in page and "\x1b" not in page
    assert len(found.mistakes()) == count


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (0.5, "here it does not help"),  # four of five answers are right with 85 %: it makes them surer still
        (1.2, "the model is too sure as it is"),
    ],
)
def test_a_temperature_that_makes_the_error_larger_says_nothing_of_how_sure_a_model_is(
    value: float, meaning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reliability, "draw_reliability", lambda *what: None)
    logits = torch.tensor([[2.5, 0, 0]] * 5)
    questions = answers_of(logits, torch.tensor([0, 0, 0, 0, 1])).questions
    found = Calibration(questions, Temperature(value, "fitted to others"))
    _, finding = reliability.calibration_section(found, reliability.CLASSES).findings
    assert finding.endswith(f"%: {meaning}.")


def test_a_temperature_says_where_it_comes_from() -> None:
    logits = torch.tensor([[2.0, 0], [0, 1], [1, 0]])
    truth, wrong = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    found = temperature_of(answers_of(logits, truth).questions, "val", "3 images", "test")
    assert found.origin == "fitted to the 3 images of 'val'" and found.value is not None
    same = temperature_of(answers_of(logits, truth).questions, "val", "3 images", "val")
    assert "which are the ones that are scored here" in same.origin
    extreme = temperature_of(answers_of(logits, wrong).questions, "val", "3 images", "test")
    assert extreme.value == HIGHEST and "because the answers say less than chance" in extreme.origin
    perfect = temperature_of(answers_of(logits[:2], truth[:2]).questions, "val", "2 images", "test")
    assert perfect.value is None and "are all but right" in perfect.origin
