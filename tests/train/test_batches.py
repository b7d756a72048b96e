"""Mixing, the loss, seeds, and the scores of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vimtune.train.batch import BatchMixer, summed_loss
from vimtune.train.distributed import resolve_device
from vimtune.train.evaluate import Evaluation, evaluate, rank_answers
from vimtune.train.guard import NonFiniteError
from vimtune.train.precision import build_autocast
from vimtune.train.settings import derive_seed, numpy_seed

CPU = torch.device("cpu")


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


def test_seeds_are_fixed_and_differ():
    assert derive_seed(0, "step", 1, 2) == derive_seed(0, "step", 1, 2) == 7986440277878847354
    seeds = {derive_seed(s, "step", a, b) for s in range(3) for a in range(20) for b in range(20)}
    assert len(seeds) == 1200 and all(0 <= seed < 2**63 for seed in seeds)


def test_numpy_seed_is_restored():
    np.random.seed(1)
    expected = np.random.rand(3)
    np.random.seed(1)
    with numpy_seed(7):
        inside = np.random.rand()
    assert np.array_equal(np.random.rand(3), expected)
    with numpy_seed(7):
        assert np.random.rand() == inside


class Answers(nn.Module):
    """Returns its input as logits."""

    def forward(self, x):
        return x.flatten(1)


def batches(logits, labels, size):
    for start in range(0, len(logits), size):
        yield logits[start : start + size].reshape(-1, logits.shape[1], 1, 1), labels[start : start + size]


@pytest.mark.parametrize("classes", [2, 5, 6, 9])
def test_scores_equal_their_definitions(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, classes, generator=generator)
    labels = torch.randint(0, classes, (23,), generator=generator)
    model = Answers().train()
    scores = evaluate(
        model, batches(logits, labels, 4), classes, device=CPU, autocast=build_autocast("none", CPU)
    )
    assert model.training
    right = logits.argmax(1) == labels
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert scores.num_images == 23
    assert scores.top1 == pytest.approx(100 * right.float().mean().item())
    # Among five classes or fewer every answer would be right.
    assert scores.top5 == (pytest.approx(100 * (ranks < 5).float().mean().item()) if classes > 5 else None)
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    for label, share in enumerate(scores.per_class):
        mine = labels == label
        if mine.any():
            assert share == pytest.approx(100 * right[mine].float().mean().item())
        else:
            assert share is None
    for true, given in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        assert scores.confusion[true, given] > 0


def test_class_without_images_has_no_score():
    assert Evaluation(torch.tensor([[3, 1], [0, 0]]), 4, 0.0).per_class == [75.0, None]


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
    autocast = build_autocast("none", CPU)
    scores = evaluate(Answers(), batches(torch.zeros(8, 8), labels, 3), 8, device=CPU, autocast=autocast)
    assert (scores.top1, scores.top5) == (100 / 8, 100 * 5 / 8)
    assert scores.confusion[:, 0].tolist() == [1] * 8


@pytest.mark.parametrize("num_batches", [0, 2])
def test_a_split_without_images_has_no_score(num_batches):
    empty = [(torch.zeros(0, 3, 1, 1), torch.zeros(0, dtype=torch.int64))] * num_batches
    with pytest.raises(ValueError, match="there is no image to score"):
        evaluate(Answers(), empty, 3, device=CPU, autocast=build_autocast("none", CPU))


def test_evaluation_stops_on_request():
    logits, labels = torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)
    autocast = build_autocast("none", CPU)
    stopped = evaluate(
        Answers(), batches(logits, labels, 2), 3, device=CPU, autocast=autocast, should_stop=lambda: True
    )
    assert stopped is None


def test_non_finite_outputs_are_no_scores():
    logits = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(NonFiniteError, match="in evaluation; first in the input images"):
        evaluate(
            Answers(),
            batches(logits, torch.tensor([0]), 1),
            2,
            device=CPU,
            autocast=build_autocast("none", CPU),
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpu", "expected auto, cpu, cuda"), ("cuda:99", "GPU 99 is asked for"), ("xpu", "expected auto, cpu")],
)
def test_devices_this_machine_does_not_have(name, expected):
    with pytest.raises(ValueError, match=expected):
        resolve_device(name)


def test_one_gpu_cannot_serve_several_processes():
    with pytest.raises(ValueError, match="names one GPU for 2 processes"):
        resolve_device("cuda:0", local_world_size=2)


def test_device_of_any_machine():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
