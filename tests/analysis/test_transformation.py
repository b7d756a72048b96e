"""T = pinv(W) W', its diagonal, and its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from vimtune.analysis.diagonal import diagonal_share
from vimtune.analysis.gradient import (
    transformation_gradient,
    transformation_gradients,
    with_head_of,
)
from vimtune.analysis.transformation import (
    DiagonalNumbers,
    measure,
    pseudo_inverse,
    random_change,
    transformation_of,
)

TALL, WIDE = (24, 8), (8, 24)


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("shape", [TALL, WIDE, (6, 6)])
def test_the_pseudo_inverse_and_the_rank(shape):
    weight = matrix(*shape)
    inverse, rank, condition = pseudo_inverse(weight)
    assert rank == min(shape) and condition == pytest.approx(float(torch.linalg.cond(weight)))
    torch.testing.assert_close(inverse, torch.linalg.pinv(weight))
    low = matrix(shape[0], 2) @ matrix(2, shape[1], seed=1)
    inverse, rank, _ = pseudo_inverse(low.float())  # what is 0 up to the rounding of fp32 counts as 0
    assert rank == 2
    torch.testing.assert_close(inverse, torch.linalg.pinv(low), rtol=1e-4, atol=1e-6)
    assert pseudo_inverse(torch.zeros(3, 2))[1] == 0


def test_a_tall_weight_has_one_transformation():
    weight, wanted = matrix(*TALL), torch.eye(8) + 0.1 * matrix(8, 8, seed=1)
    found = transformation_of(weight, weight @ wanted)
    torch.testing.assert_close(found.plain, wanted)
    torch.testing.assert_close(found.nearest, wanted)
    assert found.explained == pytest.approx(1) and found.rank == 8
    beside = torch.linalg.qr(weight, mode="complete").Q[:, 8:] @ matrix(16, 8, seed=2)
    found = transformation_of(weight, weight + beside)
    assert found.explained == pytest.approx(0, abs=1e-12)
    assert measure(0, "in_proj", weight, weight + beside).change is not None  # rounding alone is left


def test_a_wide_weight_has_many_and_the_nearest_one_is_the_identity_where_nothing_changes():
    weight = matrix(*WIDE)
    tiny = 1e-9 * matrix(*WIDE, seed=1)
    found = transformation_of(weight, weight + tiny)
    torch.testing.assert_close(found.nearest, torch.eye(24, dtype=torch.double), atol=1e-6, rtol=0)
    numbers = DiagonalNumbers.of(found.plain)
    assert numbers.diagonal_mean == pytest.approx(8 / 24)  # the projection on the row space
    torch.testing.assert_close(found.plain @ found.plain, found.plain, atol=1e-6, rtol=0)
    found = transformation_of(weight, matrix(*WIDE, seed=2))
    for transformation in (found.plain, found.nearest):
        torch.testing.assert_close(weight @ transformation, matrix(*WIDE, seed=2))
    assert found.explained == pytest.approx(1)


def test_factors_of_columns_and_rows_are_told_apart():
    weight, factors = matrix(*TALL), 1 + 0.1 * matrix(8, seed=1)
    by_columns = transformation_of(weight, weight * factors)
    assert by_columns.by_columns == pytest.approx(1) and by_columns.by_rows < 0.5
    share = measure(0, "in_proj", weight, weight * factors).change
    assert share.share == pytest.approx(1) and share.concentration == pytest.approx(8)
    by_rows = transformation_of(weight, weight * (1 + 0.1 * matrix(24, 1, seed=1)))
    assert by_rows.by_rows == pytest.approx(1) and by_rows.by_columns < 0.5


@pytest.mark.parametrize("shape", [(96, 32), (32, 96)])
def test_a_random_change_is_near_the_identity_and_not_diagonal(shape):
    """The measure that a small change meets by chance, and the one that it does not."""
    weight = matrix(*shape)
    changed = weight + random_change(shape, 0.01 * float(weight.norm()), seed=5)
    assert float((changed - weight).norm()) == pytest.approx(0.01 * float(weight.norm()))
    found = measure(0, "in_proj", weight, changed)
    numbers = DiagonalNumbers.of(found.found.nearest)
    assert numbers.off_diagonal_energy < 0.01 and numbers.diagonal_mean == pytest.approx(1, abs=0.01)
    assert numbers.off_diagonal_energy == pytest.approx(found.control_energy, rel=0.3)
    assert abs(found.change.deviations) < 4 and found.change.concentration < 2
    assert found.found.explained == pytest.approx(min(shape) / shape[0], abs=0.05)
    unrelated = DiagonalNumbers.of(transformation_of(weight, matrix(*shape, seed=9)).plain)
    assert unrelated.off_diagonal_energy > 0.9


def test_chance_is_the_mean_over_all_orders_of_the_columns():
    squares = matrix(4, 4).square()
    shares = [squares[range(4), order].sum() / squares.sum() for order in itertools.permutations(range(4))]
    found = diagonal_share(squares)
    assert found.chance == pytest.approx(float(sum(shares)) / len(shares)) == 0.25
    assert found.spread == pytest.approx(float(torch.stack(shares).std()), rel=0.25)
    assert found.share == pytest.approx(float(squares.trace() / squares.sum()))
    assert found == diagonal_share(squares)
    assert diagonal_share(torch.zeros(3, 3)) is None


def test_sizes_of_rows_and_columns_explain_a_product():
    rows = torch.tensor([9.0, 1.0, 1.0, 1.0])
    found = diagonal_share(torch.outer(rows, rows))
    assert found.concentration > 2 and found.excess == pytest.approx(1)
    assert diagonal_share(torch.eye(4)).excess == pytest.approx(4)


def test_gradients_of_a_model_are_those_of_autograd(subject):
    """With W T in the place of the weight of a projector."""
    model = with_head_of(subject)
    (found, _) = transformation_gradients(model, subject.losses())
    assert len(found) == 2 * len(model.layers)
    path = "layers.1.mixer.out_proj.weight"
    identity = torch.eye(32, requires_grad=True)
    changed = {path: dict(model.named_parameters())[path].detach() @ identity}
    loss = next(subject.losses())(lambda images: torch.func.functional_call(model, changed, images))
    (wanted,) = torch.autograd.grad(loss, identity)
    torch.testing.assert_close(found[path].float(), wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.head.weight, subject.weights_after["head.weight"])


def test_the_gradient_of_the_transformation_is_that_of_autograd():
    weight, inputs = matrix(6, 4), matrix(5, 4, seed=1)
    identity = torch.eye(4, dtype=torch.double, requires_grad=True)
    (wanted,) = torch.autograd.grad(F.linear(inputs, weight @ identity).square().sum(), identity)
    leaf = weight.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.linear(inputs, leaf).square().sum(), leaf)
    torch.testing.assert_close(transformation_gradient(weight, gradient), wanted)
