"""The CUDA C++ behind the scan's backward answers to autograd; without a GPU it runs in the emulator."""

from __future__ import annotations

import kernel_checks
import pytest
import torch
import torch.nn.functional as F
from kernel_checks import TOLERANCES, assert_close, assert_compiles

from vimtune.ops import reference
from vimtune.ops.nvrtc import prepare, prepare_backward, runtime, scan


def build_weights(inner, rank, width, bias, dtype, directions=2, num_states=16) -> dict:
    """The projections already as activations of this dtype can be."""
    sizes = inner, rank, width, bias, "cpu", inner + rank, num_states, directions
    weights = kernel_checks.build_weights(*sizes)
    for name in ("x_proj", "dt_proj"):
        weights[name] = [w.to(dtype).float() for w in weights[name]]
    return weights


def build_gradients(
    batch, tokens, inner, dtype, directions=2, num_states=16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_u, grad_delta and partial_BC, which is zero in the padding of states."""
    generator = torch.Generator().manual_seed(tokens)
    both = torch.randn(2, directions, batch, tokens, inner, generator=generator).to(dtype)
    padding = scan.padded_states(num_states) - num_states
    shape = directions, -(-inner // 64), batch, tokens, 2, num_states
    partial = F.pad(torch.randn(shape, generator=generator), (0, padding)).flatten(-2)
    return both[0], both[1], partial.to(dtype)


def definition(x, weights, grad_u, grad_delta, partial_BC) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of B | C | dt_r and of filters and bias, by autograd in fp64."""
    x = x.double().requires_grad_()
    loss, projections, filters = 0, [], []
    for d in range(len(grad_u)):
        own = {name: None if value[d] is None else value[d].double() for name, value in weights.items()}
        own["conv_weight"].requires_grad_()
        bias = torch.zeros(x.shape[-1], dtype=torch.float64) if own["conv_bias"] is None else own["conv_bias"]
        bias.requires_grad_()
        y = reference.causal_conv1d(x, own["conv_weight"], bias, False, bool(d))
        u = F.silu(y)
        rank = own["dt_proj"].shape[1]
        num_states = (own["x_proj"].shape[0] - rank) // 2
        padding = scan.padded_states(num_states) - num_states
        dt, B, C = (u @ own["x_proj"].t()).split([rank, num_states, num_states], dim=-1)
        BC = torch.cat([F.pad(B, (0, padding)), F.pad(C, (0, padding))], dim=-1)
        loss = loss + (u * grad_u[d]).sum() + (BC * partial_BC[d].sum(0)).sum()
        loss = loss + (dt @ own["dt_proj"].t() * grad_delta[d]).sum()
        projections += [BC, dt]
        filters += [own["conv_weight"], bias]
    grad_x, *rest = torch.autograd.grad(loss, [x, *projections, *filters])
    pairs = [rest[first : first + 2] for first in range(0, len(rest), 2)]
    gp = torch.stack([torch.cat(pair, dim=-1) for pair in pairs[: len(grad_u)]])
    return grad_x, gp, torch.stack([torch.cat([w.t(), b[None]]) for w, b in pairs[len(grad_u) :]])


def check(device, batch, tokens, inner, rank, width, bias, dtype, trained, directions=2, num_states=16):
    weights = build_weights(inner, rank, width, bias, dtype, directions, num_states)
    gradients = build_gradients(batch, tokens, inner, dtype, directions, num_states)
    xz = torch.randn(batch, tokens, 2 * inner, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = definition(xz[..., :inner], weights, *(g.double() for g in gradients))

    moved = {name: [w if w is None else w.to(device) for w in value] for name, value in weights.items()}
    packed = prepare.pack_weights(**moved, dtype=dtype)
    grad_xz = torch.full_like(xz, 7.0, device=device)
    gradients = [g.to(device) for g in gradients]
    found = prepare_backward.prepare_backward(
        *gradients, xz.to(device)[..., :inner], packed, grad_xz[..., :inner], trained
    )
    tolerance = TOLERANCES[dtype]
    assert_close(grad_xz[..., :inner], expected[0], tolerance, "x")
    assert (grad_xz[..., inner:] == 7).all(), "the other half is not this kernel's"
    if trained:
        used = 2 * scan.padded_states(num_states) + rank
        assert_close(found[0][..., :used], expected[1], tolerance, "projections")
        assert not found[0][..., used:].any(), "padding"
        assert_close(found[1], expected[2], tolerance, "filters")
    else:
        assert found[0].numel() == found[1].numel() == 0


@pytest.mark.parametrize(
    "batch, tokens, inner, rank, width, bias, dtype, trained",
    [
        (1, 1, 8, 3, 4, True, torch.bfloat16, False),
        (1, 1, 8, 3, 4, True, torch.bfloat16, True),
        (2, 2, 40, 12, 2, False, torch.float16, True),
        (1, 3, 64, 3, 4, True, torch.float16, False),
        (2, 7, 72, 17, 4, False, torch.bfloat16, False),
        (1, 33, 40, 24, 1, True, torch.bfloat16, True),
        (1, 65, 72, 33, 4, True, torch.float16, True),
        (2, 59, 8, 3, 7, True, torch.bfloat16, True),
        (5, 1, 72, 3, 4, True, torch.bfloat16, True),
        (3, 31, 72, 3, 4, True, torch.float16, False),
        (3, 31, 72, 3, 4, True, torch.float16, True),
        (2, 9, 40, 70, 8, True, torch.bfloat16, False),
        (2, 9, 40, 70, 8, True, torch.bfloat16, True),
    ],
)
def test_gradients(device, batch, tokens, inner, rank, width, bias, dtype, trained):
    check(device, batch, tokens, inner, rank, width, bias, dtype, trained)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "batch, tokens, inner, rank, width, bias, num_states, dtype",
    [
        (2, 2, 40, 12, 2, False, 22, torch.float16),
        (3, 31, 72, 3, 4, True, 7, torch.float16),
        (1, 65, 72, 33, 4, False, 32, torch.bfloat16),
    ],
)
def test_gradients_of_one_direction(
    device, batch, tokens, inner, rank, width, bias, num_states, dtype, trained
):
    check(device, batch, tokens, inner, rank, width, bias, dtype, trained, 1, num_states)


@pytest.mark.parametrize(
    "directions, tokens, inner, rank, trained",
    [
        (2, 197, 384, 12, False),
        (2, 30, 384, 12, True),
        (2, 9, 424, 14, True),
        (2, 14, 1224, 48, True),
        (1, 5, prepare.MAX_WIDTH, 128, True),
    ],
)
def test_gradients_of_usual_widths(device, directions, tokens, inner, rank, trained):
    check(device, 1, tokens, inner, rank, 4, True, torch.bfloat16, trained, directions)


@pytest.mark.parametrize("inner", [8, 96])
def test_images_are_apart(device, inner):
    """Rows beside an image belong to its neighbours and count for nothing, whatever they are."""
    batch, tokens = 3, 5
    weights = build_weights(inner, 3, 4, True, torch.float16)
    moved = {name: [w.to(device) for w in value] for name, value in weights.items()}
    packed = prepare.pack_weights(**moved, dtype=torch.float16)
    gradients = [g.to(device) for g in build_gradients(batch, tokens, inner, torch.float16)]
    xz = torch.ones(batch, tokens, 2 * inner, dtype=torch.float16, device=device)
    found = []
    for outside in (0.0, float("nan")):
        for tensor, image_axis in ((gradients[0], 1), (gradients[1], 1), (gradients[2], 2), (xz, 0)):
            tensor.narrow(image_axis, 0, 1).fill_(outside)
            tensor.narrow(image_axis, 2, 1).fill_(outside)
        grad_xz = torch.empty_like(xz)
        prepare_backward.prepare_backward(
            *gradients, xz[..., :inner], packed, grad_xz[..., :inner], need_weights=False
        )
        found.append(grad_xz[1, :, :inner])
    assert found[0].any()
    assert torch.equal(found[0], found[1])


def test_little_shared_memory_means_fewer_warps_and_none_that_nothing_is_covered(monkeypatch):
    found = []
    for directions, limit in ((2, 160), (2, 64), (2, 24), (1, 64), (1, 12)):
        monkeypatch.setattr(runtime, "shared_memory", lambda device, limit=limit: limit * 1024)
        cpu = torch.device("cpu")
        found.append(prepare_backward._most_warps(directions, prepare_backward.ROWS_TRAINED, 48, cpu))
        assert bool(prepare_backward.refusals(directions, 12, 16, cpu)) == (limit in (24, 12))
        assert prepare_backward.refusals(directions, 1025, 16, cpu)
    assert found == [6, 3, 0, 6, 0]


@pytest.mark.parametrize("directions, limit", [(2, 160), (2, 64), (2, 40), (1, 40)])
def test_gradients_with_little_shared_memory(directions, limit, on_cpu, monkeypatch):
    monkeypatch.setattr(runtime, "shared_memory", lambda device: limit * 1024)
    check("cpu", 1, 30, 424, 12, 4, True, torch.bfloat16, True, directions)


@pytest.mark.parametrize(
    "directions, fp16, trained, architecture",
    [(2, 0, 0, "sm_90"), (2, 1, 1, "sm_80"), (1, 0, 1, "sm_80"), (1, 1, 0, "sm_90")],
)
def test_sources_compile_without_a_gpu(directions, fp16, trained, architecture, nvrtc):
    rows = prepare_backward.ROWS_TRAINED if trained else prepare_backward.ROWS_FROZEN
    common = (("STATES", 16), ("WIDTH", 40), ("COLUMNS", 48), ("WARPS", 1), ("FP16", fp16))
    assert_compiles(prepare_backward.PROJECT, (*common, ("BLOCKS", 1)), [architecture])
    convolve = (
        *common,
        ("DIRECTIONS", directions),
        ("FILTER", 4),
        ("ROWS", rows),
        ("TRAINED", trained),
    )
    assert_compiles(prepare_backward.CONVOLVE, convolve, [architecture])
