"""Precision, recall, F1 and confused pairs follow from their definitions, example by example."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vimtune.metrics.classes import (
    ClassScores,
    Confusion,
    macro_f1,
    micro_f1,
    most_confused,
    score_classes,
    score_labels,
)

ANSWERS = st.integers(2, 6).flatmap(
    lambda classes: st.lists(
        st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=30
    ).map(lambda pairs: (classes, pairs))
)
"""Numbers of classes, and pairs of true class and answer."""


def confusion_of(classes: int, pairs: list[tuple[int, int]]) -> torch.Tensor:
    found = torch.zeros(classes, classes, dtype=torch.int64)
    for true, answer in pairs:
        found[true, answer] += 1
    return found


@given(ANSWERS)
@settings(max_examples=60, deadline=None)
def test_scores_are_their_definitions(case: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = case
    found = score_classes(confusion_of(classes, pairs))
    of_present = []
    for label, own in enumerate(found):
        true_positives = sum(true == answer == label for true, answer in pairs)
        false_positives = sum(answer == label != true for true, answer in pairs)
        false_negatives = sum(true == label != answer for true, answer in pairs)
        assert own.examples == true_positives + false_negatives
        answered, there = true_positives + false_positives, true_positives + false_negatives
        precision = true_positives / answered if answered else None
        recall = true_positives / there if there else None
        assert own.precision == (None if precision is None else pytest.approx(100 * precision))
        assert own.recall == (None if recall is None else pytest.approx(100 * recall))
        if not answered and not there:
            assert own.f1 is None
            continue
        both = precision and recall
        harmonic = 2 * precision * recall / (precision + recall) if both else 0.0
        assert own.f1 == pytest.approx(100 * harmonic)
        of_present.append(100 * harmonic)
    assert macro_f1(found) == pytest.approx(sum(of_present) / len(of_present))


def test_macro_f1_is_that_of_scikit_learn() -> None:
    # Its definition: the mean over the classes that are there or were answered,
    # which have 4/5, 1/2 and 2/3 here; class 2, which nobody names, does not count.
    pairs = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 3), (3, 3)]
    found = macro_f1(score_classes(confusion_of(4, pairs)))
    assert found == pytest.approx(100 * (4 / 5 + 1 / 2 + 2 / 3) / 3)


def test_labels_are_counted_class_by_class() -> None:
    # Class 0 is there twice and right once of two answers, class 1 there and answered thrice, class 2
    # answered once and never there, class 3 neither. So four of five labels and of six answers are right.
    labels = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    predicted = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]]).bool()
    found = score_labels(predicted, labels)
    assert found == [ClassScores(2, 2, 1), ClassScores(3, 3, 3), ClassScores(0, 1, 0), ClassScores(0, 0, 0)]
    assert macro_f1(found) == pytest.approx(100 * (1 / 2 + 1 + 0) / 3)
    assert micro_f1(found) == pytest.approx(200 * 4 / (5 + 6))


def test_nothing_has_no_score() -> None:
    own = ClassScores(0, 0, 0)
    assert (own.precision, own.recall, own.f1, macro_f1([own]), micro_f1([own])) == (None,) * 5


@pytest.mark.parametrize("number", [2, 5, 40])
def test_most_confused_pairs_are_those_with_most_wrong_answers(number: int) -> None:
    counts = torch.randint(0, 5, (number, number), generator=torch.Generator().manual_seed(number))
    found = most_confused(counts, 10)
    wrong = [int(counts[i, j]) for i in range(number) for j in range(number) if i != j]
    assert [pair.count for pair in found] == [n for n in sorted(wrong, reverse=True)[:10] if n]
    for pair in found:
        assert pair.true != pair.answer and pair.count == counts[pair.true, pair.answer]
        assert pair.of == counts[pair.true].sum()


def test_pairs_come_by_their_number() -> None:
    confusion = torch.tensor([[5, 1, 0], [2, 0, 2], [0, 3, 4]])
    found = most_confused(confusion, 3)
    assert found == [Confusion(2, 1, 3, 7), Confusion(1, 0, 2, 4), Confusion(1, 2, 2, 4)]
    assert most_confused(torch.eye(3, dtype=torch.int64), 3) == []
