"""What exported graphs have in the place of this package's operations computes what the definitions do."""

from __future__ import annotations

import pytest
import torch

from vimtune.export.scans import chunked_recurrence, operations
from vimtune.ops import reference


def inputs(tokens: int, batch: int = 2, inner: int = 6, states: int = 3) -> dict[str, torch.Tensor]:
    """Tensors of a scan in fp64, so that what is compared is the formula."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sequence = batch, tokens, inner
    return {
        "u": draw(*sequence),
        "delta": draw(*sequence),
        "A": -draw(inner, states).exp(),
        "B": draw(batch, tokens, states),
        "C": draw(batch, tokens, states),
        "D": draw(inner),
        "z": draw(*sequence),
        "delta_bias": draw(inner),
    }


def table(name: str):
    (function,) = (f for op, f in operations(chunked_recurrence).items() if op.name() == f"vimtune::{name}")
    return function


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9, 10, 37])
def test_scans_are_those_of_the_definition(tokens, reverse):
    given = inputs(tokens)
    expected = reference.selective_scan(**given, delta_softplus=True, reverse=reverse)
    found, kept = table("selective_scan")(*given.values(), True, reverse, "torch", False)
    torch.testing.assert_close(found, expected)
    assert kept.numel() == 0

    state = torch.randn(2, 6, 3, dtype=torch.float64)
    expected, last = reference.stateful_scan(**given, delta_softplus=True, state=state, reverse=reverse)
    found, behind, _ = table("stateful_scan")(*given.values(), state, True, reverse, "torch", False)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(behind, last)


def test_a_scan_may_lack_what_is_optional():
    given = inputs(5) | dict.fromkeys(("D", "z", "delta_bias"))
    given["delta"] = given["delta"].abs()
    found, _ = table("selective_scan")(*given.values(), False, False, "torch", False)
    torch.testing.assert_close(found, reference.selective_scan(**given))


def test_long_time_steps_overflow_nowhere():
    given = inputs(40)
    given["delta"] += 80
    found, _ = table("selective_scan")(*given.values(), True, False, "torch", False)
    torch.testing.assert_close(found, reference.selective_scan(**given, delta_softplus=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_convolutions_are_those_of_the_definition(tokens, silu, reverse):
    x, weight = torch.randn(2, tokens, 6), torch.randn(6, 4)
    for bias in (torch.randn(6), None):
        found = table("causal_conv1d")(x, weight, bias, silu, reverse, "torch")
        torch.testing.assert_close(found, reference.causal_conv1d(x, weight, bias, silu, reverse))
