"""CKA: the estimate answers to its definition, written out image by image."""

from __future__ import annotations

import pytest
import torch

from vimtune.analysis.similarity import MinibatchCka, block_features, gram_matrices, unbiased_hsic


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def minibatch_cka(pairs) -> torch.Tensor:
    """CKA of minibatches, each a pair of features (F, n, P)."""
    found = MinibatchCka()
    for pair in pairs:
        found.add(*pair)
    return found.value()


def hsic_of_definition(first: torch.Tensor, second: torch.Tensor) -> float:
    """Song et al. 2012, equation 5, of two Gram matrices (n, n)."""
    size = len(first)
    K = [[0.0 if i == j else float(first[i, j]) for j in range(size)] for i in range(size)]
    L = [[0.0 if i == j else float(second[i, j]) for j in range(size)] for i in range(size)]
    places = range(size)
    trace = sum(K[i][j] * L[j][i] for i in places for j in places)
    sums = sum(map(sum, K)) * sum(map(sum, L)) / ((size - 1) * (size - 2))
    product = sum(K[i][j] * L[j][k] for i in places for j in places for k in places)
    return (trace + sums - 2 / (size - 2) * product) / (size * (size - 3))


def test_hsic_answers_to_its_definition():
    first, second = features(2, 6, 3), features(3, 6, 5, seed=1)
    found = unbiased_hsic(gram_matrices(first), gram_matrices(second))
    for i in range(2):
        for j in range(3):
            wanted = hsic_of_definition(first[i] @ first[i].T, second[j] @ second[j].T)
            assert float(found[i, j]) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="expected at least 4"):
        unbiased_hsic(gram_matrices(features(1, 3, 2)), gram_matrices(features(1, 3, 2)))


def test_minibatches_are_summed_before_they_are_divided():
    pairs = [(features(1, n, 4, seed=n), features(1, n, 4, seed=9 + n)) for n in (5, 7)]

    def total(one: int, other: int) -> float:
        grams = [(pair[one][0] @ pair[one][0].T, pair[other][0] @ pair[other][0].T) for pair in pairs]
        return sum(hsic_of_definition(*pair) for pair in grams)

    wanted = total(0, 1) / (total(0, 0) * total(1, 1)) ** 0.5
    assert float(minibatch_cka(pairs)) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="no images"):
        minibatch_cka([])


def test_rotation_and_scale_do_not_matter_and_chance_is_near_0():
    first = features(1, 30, 8)
    rotation = torch.linalg.qr(features(8, 8, seed=1)).Q
    assert float(minibatch_cka([(first, 3 * first @ rotation)])) == pytest.approx(1)
    # Wide features of few images: the biased estimate calls these alike.
    pairs = [(features(1, 8, 500, seed=n), features(1, 8, 500, seed=100 + n)) for n in range(20)]
    assert abs(float(minibatch_cka(pairs))) < 0.15


def test_features_are_those_of_all_blocks(subject):
    patches, classes = block_features(subject.before, subject.batches[0])
    assert [each.shape for each in patches] == [(5, 16 * 16)] * 3
    assert [each.shape for each in classes] == [(5, 16)] * 3
    torch.testing.assert_close(
        subject.before.norm_f(classes[-1]),
        subject.before.forward_features(subject.batches[0])[:, subject.before.cls_position],
    )
