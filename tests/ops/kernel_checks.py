"""What the tests of backend `nvrtc` compare by."""

from __future__ import annotations

import torch

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def assert_close(actual, expected, tolerance, label, floor=0.0):
    """Largest deviation from fp64 results, relative to the largest value but at least to `floor`."""
    assert actual.shape == expected.shape, label
    assert torch.isfinite(actual).all(), label
    error = (actual.double().to(expected.device) - expected).abs().max() / expected.abs().max().clamp_min(
        floor
    )
    assert error <= tolerance, f"{label}: relative error {error:.2e}"
