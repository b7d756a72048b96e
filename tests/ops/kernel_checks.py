"""What the tests of the compiled kernels have in common: weights, and what they compare by."""

from __future__ import annotations

import torch

from vimtune.ops.nvrtc import runtime

# Of torch.library.opcheck: schema and fake implementation (strides included) agree with the operation.
OPCHECKS = ("test_schema", "test_faketensor")
AUTOGRAD_OPCHECKS = (*OPCHECKS, "test_autograd_registration")
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
# With one token the gradient of A is 0, and what backend `nvrtc` finds a difference of equal numbers, each
# divided by the number of directions.
ZERO_A = 2e-4


def assert_close(actual, expected, tolerance, label, floor=0.0):
    """Largest deviation from `expected`, relative to its largest value but at least to `floor`."""
    assert actual.shape == expected.shape, label
    assert torch.isfinite(actual).all(), label
    expected = expected.double()
    scale = expected.abs().max().clamp_min(max(floor, 1e-30))
    error = (actual.double().to(expected.device) - expected).abs().max() / scale
    assert error <= tolerance, f"{label}: relative error {error:.2e}"


def assert_compiles(source, constants, architectures=("sm_80", "sm_90")):
    """For the oldest architecture that has the needed instructions, and for a newer one.

    Where many constants are compiled, each may take one of the two: the sources are the same for both.
    """
    for architecture in architectures:
        assert runtime.compile_source(source, constants, architecture)[:4] == b"\x7fELF"


def build_weights(inner, rank, width, bias, device="cpu", seed=0, num_states=16, directions=2) -> dict:
    """Of what surrounds the scan, in each direction, fp32; by the names of `prepare.pack_weights`."""
    generator = torch.Generator().manual_seed(seed)

    def each(*shape, scale=1.0):
        return [(torch.randn(*shape, generator=generator) * scale).to(device) for _ in range(directions)]

    return {
        "conv_weight": each(inner, width, scale=0.5),
        "conv_bias": each(inner) if bias else [None] * directions,
        "x_proj": each(rank + 2 * num_states, inner, scale=inner**-0.5),
        "dt_proj": each(inner, rank, scale=rank**-0.5),
        "dt_bias": [b - 3 for b in each(inner, scale=2.0)],
    }
