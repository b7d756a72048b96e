"""The mixer of one direction: what its relation to that of both directions says about it."""

import pytest
import torch

from vimtune import ops

BATCH, TOKENS, INNER, STATES, RANK, WIDTH = 2, 11, 12, 5, 3, 4


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def direction(generator, dtype):
    shapes = [
        (INNER, WIDTH),
        (INNER,),
        (RANK + 2 * STATES, INNER),
        (INNER, RANK),
        (INNER,),
        (INNER, STATES),
        (INNER,),
        (INNER, STATES),
    ]
    tensors = [torch.randn(*shape, generator=generator, dtype=dtype) / 2 for shape in shapes]
    return ops.DirectionWeights(*(tensor.requires_grad_() for tensor in tensors))


@pytest.mark.parametrize(
    "backend, dtype, tolerance",
    [
        ("reference", torch.float64, 1e-12),
        ("torch", torch.float32, 1e-5),
        ("auto", torch.float32, 1e-5),
        ("auto", torch.bfloat16, 3e-2),
    ],
)
def test_both_directions_are_the_average_of_two_causal_mixers(generator, backend, dtype, tolerance):
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    forward, reverse = direction(generator, weights), direction(generator, weights)
    xz = torch.randn(BATCH, TOKENS, 2 * INNER, generator=generator, dtype=dtype, requires_grad=True)
    grad = torch.randn(BATCH, TOKENS, INNER, generator=generator, dtype=dtype)

    both = ops.bidirectional_scan(xz, forward, reverse, backend)
    ahead = ops.causal_mixer(xz, forward, backend)
    back = ops.causal_mixer(xz.flip(1), reverse, backend).flip(1)
    leaves = [xz, *forward, *reverse]
    found = [(ahead + back) / 2, *torch.autograd.grad((ahead + back) / 2, leaves, grad)]
    expected = [both, *torch.autograd.grad(both, leaves, grad)]
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def test_no_token_sees_a_later_one(generator):
    weights = direction(generator, torch.float32)
    xz = torch.randn(1, TOKENS, 2 * INNER, generator=generator)
    changed = xz.clone()
    changed[:, 6:] += 1
    out, other = ops.causal_mixer(xz, weights), ops.causal_mixer(changed, weights)
    assert torch.equal(out[:, :6], other[:, :6]) and not torch.equal(out[:, 6], other[:, 6])


def test_tensors_that_do_not_fit_are_named(generator):
    weights = direction(generator, torch.float32)
    xz = torch.randn(1, TOKENS, 2 * INNER, generator=generator)
    with pytest.raises(ValueError, match=r"inputs do not fit together: D is \(3,\), expected \(12,\)"):
        ops.causal_mixer(xz, weights._replace(D=torch.ones(3)))
    with pytest.raises(ValueError, match=r"xz must be \(B, L, 2 E\)"):
        ops.causal_mixer(xz[0], weights)
