"""Scores of a classifier, and how an evaluation comes to them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.runtime.precision import build_autocast
from vimtune.tasks.classes.answers import answers_of, rank_answers
from vimtune.tasks.images.scoring import ImageTally, evaluation_of
from vimtune.tasks.job import Batch, Trial
from vimtune.training import InputError, evaluate
from vimtune.training.evaluate import _Counting, evaluate_trial
from vimtune.training.guard import NonFiniteError

CPU = torch.device("cpu")


class Answers(nn.Module):
    """Returns its input as logits."""

    def forward(self, x):
        return x.flatten(1)


def batches(logits, labels, size):
    for start in range(0, len(logits), size):
        part = logits[start : start + size].reshape(-1, logits.shape[1], 1, 1)
        places = torch.arange(start, start + len(part))
        yield Batch({"images": part, "labels": labels[start : start + size], "places": places}, len(part))


def score(batches, num_classes, model=None, **options):
    autocast = build_autocast("none", CPU)
    model = Answers() if model is None else model
    tally = ImageTally(num_classes, 30, complete=False)
    return evaluate(model, batches, tally, device=CPU, autocast=autocast, **options)


@pytest.mark.parametrize("classes", [2, 5, 6, 9])
def test_scores_equal_their_definitions(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, classes, generator=generator)
    labels = torch.randint(0, classes, (23,), generator=generator)
    model = Answers().train()
    found = score(batches(logits, labels, 4), classes, model)
    assert model.training
    right = logits.argmax(1) == labels
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found.count == 23
    assert found.scores["top1"] == pytest.approx(100 * right.float().mean().item())
    # Among five classes or fewer every answer would be right.
    top5 = 100 * (ranks < 5).float().mean().item()
    assert found.scores["top5"] == (pytest.approx(top5) if classes > 5 else None)
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    for label, share in enumerate(found.per_class):
        mine = labels == label
        if mine.any():
            assert share == pytest.approx(100 * right[mine].float().mean().item())
        else:
            assert share is None
    for true, given in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        assert found.confusion[true, given] > 0


def test_class_without_images_has_no_score():
    answers = answers_of(torch.eye(2)[[0, 0, 0, 1]], torch.zeros(4, dtype=torch.int64))
    assert evaluation_of(answers, 0.0).per_class == [75.0, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_lowest_index_comes_first(dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 3, (200, 9), generator=generator).to(dtype).float()
    labels = torch.randint(0, 9, (200,), generator=generator)
    predicted, ranks = rank_answers(logits, labels)
    # A stable sort keeps the order of equal ones.
    order = logits.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(predicted, order[:, 0])
    assert torch.equal(order.gather(1, ranks[:, None])[:, 0], labels)


def test_equal_logits_are_no_success():
    labels = torch.arange(8)
    found = score(batches(torch.zeros(8, 8), labels, 3), 8)
    assert found.scores == {"top1": 100 / 8, "top5": 100 * 5 / 8}
    assert found.confusion[:, 0].tolist() == [1] * 8


@pytest.mark.parametrize("num_batches", [0, 2])
def test_a_split_without_images_has_no_score(num_batches):
    none = torch.zeros(0, dtype=torch.int64)
    nothing = Batch({"images": torch.zeros(0, 3, 1, 1), "labels": none, "places": none}, 0)
    with pytest.raises(ValueError, match="there is nothing to score"):
        score([nothing] * num_batches, 3)


def test_evaluation_stops_on_request():
    logits, labels = torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)
    assert score(batches(logits, labels, 2), 3, should_stop=lambda: True) is None


class BesideAnother(Processes):
    """One of two processes, of which the other one cannot read its data."""

    def sum(self, tensor):
        return tensor + 1

    def gather(self, value):
        return [value, "cannot read disk/picture.png"]


@pytest.mark.parametrize("processes", [Processes(), BesideAnother(world_size=2)])
def test_data_that_one_process_cannot_read_end_the_trials_of_all(processes):
    def fail():
        raise InputError("cannot read disk/picture.png")
        yield

    loader = fail() if processes.world_size == 1 else batches(torch.eye(3), torch.arange(3), 1)
    trial = Trial(Answers(), loader, ImageTally(3, 30, complete=False))
    with pytest.raises(InputError, match=r"^cannot read disk/picture.png$"):
        evaluate_trial(trial, Recipe(amp="none"), processes)


def test_non_finite_outputs_are_no_scores():
    logits = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(NonFiniteError, match="in evaluation; first in the input images"):
        score(batches(logits, torch.tensor([0]), 1), 2)


def test_late_counting_changes_nothing(monkeypatch):
    """On a GPU a batch is counted, or found to be not finite, when the next one has been launched."""
    generator = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(11, 7, generator=generator), torch.arange(11) % 7
    at_once = score(batches(logits, labels, 3), 7)
    order: list[str] = []

    class Late(_Counting):
        def __init__(self, *arguments, late):
            super().__init__(*arguments, late=True)

        def add(self, tensors, own):
            order.append("launched")
            super().add(tensors, own)

    class Noted(ImageTally):
        def count(self, judged):
            order.append("counted")
            super().count(judged)

    monkeypatch.setattr(sys.modules[_Counting.__module__], "_Counting", Late)
    monkeypatch.setattr(sys.modules[__name__], "ImageTally", Noted)
    late = score(batches(logits, labels, 3), 7)
    assert (late.loss, late.scores, late.count) == (at_once.loss, at_once.scores, at_once.count)
    assert torch.equal(late.confusion, at_once.confusion)
    assert order == ["launched", *["launched", "counted"] * 3, "counted"]
    logits[10] = float("nan")
    with pytest.raises(NonFiniteError, match="first in the input images"):
        score(batches(logits, labels, 3), 7)
