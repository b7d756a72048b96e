"""Weights of classes in the loss."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from vimtune.recipe import Recipe, RecipeError
from vimtune.tasks.images.mixing import summed_loss
from vimtune.tasks.images.weighting import class_weights

CLASSES = ["ant", "bee", "cat", "dog"]
LABELS = [0] * 6 + [1] * 2 + [2] * 1


def test_balanced_weights_give_every_class_the_same_part_of_the_loss() -> None:
    weights = class_weights("balanced", LABELS, CLASSES)
    assert weights is not None
    parts = [float(weights[label]) * LABELS.count(label) for label in range(3)]
    assert parts == pytest.approx([3.0, 3.0, 3.0])  # 9 images, 3 classes that have any


def test_given_weights_keep_their_ratios_and_are_1_on_average() -> None:
    weights = class_weights({"bee": 3.0, "dog": 7.0}, LABELS, CLASSES)
    assert weights is not None
    assert (weights / weights[0]).tolist() == pytest.approx([1, 3, 1, 7])
    assert sum(float(weights[label]) for label in LABELS) == pytest.approx(len(LABELS))
    assert class_weights("none", LABELS, CLASSES) is None
    with pytest.raises(ValueError, match=r"no class 'catt'.*'cat'"):
        class_weights({"catt": 2.0}, LABELS, CLASSES)
    with pytest.raises(ValueError, match=r"no class 'nix'\. The data set has 'ant', 'bee', 'cat', 'dog'"):
        class_weights({"nix": 2.0}, LABELS, CLASSES)


def test_the_loss_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(9, 4), torch.tensor(LABELS), torch.tensor([1.0, 2.0, 0.5, 9.0])
    rows = -torch.log_softmax(logits, 1)
    expected = sum(float(weights[label]) * float(rows[row, label]) for row, label in enumerate(LABELS))
    assert float(summed_loss(logits, labels, 0.0, weights)) == pytest.approx(expected, rel=1e-5)
    shares = F.one_hot(labels, 4).float()
    assert float(summed_loss(logits, shares, 0.0, weights)) == pytest.approx(expected, rel=1e-5)


def test_what_evens_out_the_classes_is_asked_for_once() -> None:
    assert Recipe(class_weights="cat=2,dog=0.5").task.class_weights == {"cat": 2.0, "dog": 0.5}
    with pytest.raises(RecipeError, match="give one of them"):
        Recipe(balanced=True, class_weights="balanced")


def test_weights_of_classes_with_any_name():
    names = {'say "x", y': 3.0, "=b": 2.0}
    assert Recipe(class_weights=json.dumps(names)).task.class_weights == names
    with pytest.raises(RecipeError, match=r"of names with commas: '{\"cat, grey\": 2}'"):
        Recipe(class_weights='b=2,say "x", y=many')
