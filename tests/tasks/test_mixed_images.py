"""Mixing of image batches, and the loss of a classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vimtune.tasks.images.mixing import BatchMixer, summed_loss


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_mixing(mixup, cutmix, size):
    mix = BatchMixer(mixup, cutmix, num_classes=4)
    images, labels = torch.randn(size, 3, 8, 8), torch.arange(size) % 4
    before = images.clone()
    mixed, targets = mix(images, labels, seed=3)
    assert torch.equal(images, before)  # the batch may be replayed
    assert mixed.shape == images.shape and targets.shape == (size, 4)
    assert torch.allclose(targets.sum(1), torch.ones(size))
    again = mix(images, labels, seed=3)
    assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])
    if size % 2:  # the last one has no partner
        assert torch.equal(mixed[-1], images[-1])
        assert torch.equal(targets[-1], F.one_hot(labels[-1], 4).float())
    if size > 2:
        assert any(not torch.equal(mix(images, labels, seed=s)[0], mixed) for s in range(4, 8))


def test_mixed_targets_are_the_shares_of_the_images():
    mix = BatchMixer(0.8, 0.0, num_classes=2)
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    mixed, targets = mix(images, torch.tensor([0, 1]), seed=0)
    # Pixels of class 1 are 1, so a mixed image's value is its share of class 1.
    assert torch.allclose(mixed.mean((1, 2, 3)), targets[:, 1], atol=1e-6)
    assert 0 < targets[0, 1] < 1


def test_without_mixing_nothing_happens():
    images, labels = torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 2])
    assert BatchMixer(0.0, 0.0, 3)(images, labels, seed=0) == (images, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_adds_up_and_treats_labels_and_shares_alike(smoothing):
    logits, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    whole = summed_loss(logits, labels, smoothing)
    parts = summed_loss(logits[:3], labels[:3], smoothing) + summed_loss(logits[3:], labels[3:], smoothing)
    shares = summed_loss(logits, F.one_hot(labels, 5).float(), smoothing)
    assert torch.allclose(whole, parts) and torch.allclose(whole, shares)
    assert torch.allclose(whole, 7 * F.cross_entropy(logits, labels, label_smoothing=smoothing))
