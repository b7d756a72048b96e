"""The CUDA C++ in front of the scan answers to its definition; without a GPU it runs in the emulator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import TOLERANCES, assert_close, build_weights

from vimtune.ops import reference
from vimtune.ops.nvrtc import prepare, scan


def definition(x, weights, dtype):
    """u, time steps and B | C | dt_r in fp64, rounded where the kernels round."""
    us, deltas, projections = [], [], []
    for d in range(len(weights["x_proj"])):
        own = {name: None if value[d] is None else value[d].double() for name, value in weights.items()}
        u = reference.causal_conv1d(x.double(), own["conv_weight"], own["conv_bias"], True, bool(d))
        rank = own["dt_proj"].shape[1]
        num_states = (own["x_proj"].shape[0] - rank) // 2
        rows = (u.to(dtype).double() @ own["x_proj"].to(dtype).double().t()).to(dtype).double()
        padding = scan.padded_states(num_states) - num_states
        dt, B, C = rows.split([rank, num_states, num_states], dim=-1)
        raw = dt @ own["dt_proj"].to(dtype).double().t() + own["dt_bias"]
        us.append(u)
        deltas.append(F.softplus(raw))
        projections.append(torch.cat([F.pad(B, (0, padding)), F.pad(C, (0, padding)), dt], dim=-1))
    return torch.stack(us), torch.stack(deltas), torch.stack(projections)


@pytest.mark.parametrize(
    "directions, batch, tokens, inner, rank, width, bias, num_states, dtype",
    [
        (2, 1, 1, 8, 1, 4, True, 16, torch.bfloat16),
        (2, 2, 5, 40, 3, 2, False, 22, torch.float16),
        (2, 1, 33, 72, 17, 4, True, 16, torch.bfloat16),
        (2, 1, 40, 648, 40, 4, True, 16, torch.bfloat16),
        (2, 2, 19, 72, 70, 8, True, 16, torch.bfloat16),
        (2, 1, 197, 384, 12, 4, True, 16, torch.float16),
        (1, 3, 5, 40, 3, 2, False, 5, torch.float16),
        (1, 2, 33, 72, 17, 4, True, 32, torch.bfloat16),
        (1, 1, 3, prepare.MAX_WIDTH, 128, 4, True, 16, torch.bfloat16),
    ],
)
def test_prepare(device, directions, batch, tokens, inner, rank, width, bias, num_states, dtype):
    weights = build_weights(inner, rank, width, bias, device, 0, num_states, directions)
    xz = torch.randn(batch, tokens, 2 * inner, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    x = xz[..., :inner]
    expected = definition(x, weights, dtype)
    packed = prepare.pack_weights(**weights, dtype=dtype)
    u, delta, projections = prepare.prepare(x, packed)
    tolerance = TOLERANCES[dtype]
    assert_close(u, expected[0], tolerance, "u")
    before_dt = 2 * scan.padded_states(num_states)
    assert_close(projections[..., : before_dt + rank], expected[2], tolerance, "projections")
    for end, start in ((before_dt // 2, num_states), (before_dt, before_dt // 2 + num_states)):
        assert not projections[..., start:end].any(), "padding of states is zero"
    assert not projections[..., before_dt + rank :].any(), "padding is zero"
    # dt_r was rounded: compare the time steps with what follows from the rounded ones.
    low_rank = projections[..., before_dt : before_dt + rank].double()
    dt_proj = torch.stack(weights["dt_proj"]).to(dtype).double()
    raw = torch.einsum("dblr,der->dble", low_rank, dt_proj)
    exact = F.softplus(raw + torch.stack(weights["dt_bias"]).double()[:, None, None])
    torch.testing.assert_close(delta.double(), exact, rtol=1e-3, atol=1e-7)

    again = prepare.prepare(x, packed, projections)
    assert torch.equal(again[0], u) and torch.equal(again[1], delta)


def test_what_is_covered():
    assert not prepare.refusals(384, 4)
    assert not prepare.refusals(4096, 8)
    assert prepare.refusals(4104, 4) == ["inner width 4104 is above 4096"]
    assert prepare.refusals(384, 9) == ["filter width 9 is above 8"]
