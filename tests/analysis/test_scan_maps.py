"""Scan maps: the matrix is the scan, and the maps are those of the model with its adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from changed_models import changed_vim
from method_cases import options_for

import vimtune
from vimtune.analysis.components import movements
from vimtune.analysis.parameters import effective_parameters
from vimtune.analysis.scan_matrix import Reach, as_patch_map, read_maps, scan_matrix
from vimtune.methods import list_methods
from vimtune.ops import reference


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_the_matrix_times_the_inputs_is_the_scan(reverse, scale):
    torch.manual_seed(0)
    u, delta = torch.randn(2, 9, 6).double(), scale * torch.randn(2, 9, 6).double()
    B, C = torch.randn(2, 9, 4).double(), torch.randn(2, 9, 4).double()
    A, D, bias = -torch.rand(6, 4).double(), torch.randn(6).double(), torch.randn(6).double()
    wanted = reference.selective_scan(
        u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, reverse=reverse
    )
    matrix = scan_matrix(delta, A, B, C, bias, reverse)
    torch.testing.assert_close(torch.einsum("bets,bse->bte", matrix, u) + D * u, wanted)
    unread = matrix.tril(-1) if reverse else matrix.triu(1)
    assert not unread.any()


def test_maps_are_shares_of_what_can_be_read():
    model, _ = changed_vim()
    maps = read_maps(model, torch.randn(2, 3, 32, 32))
    assert maps.shape == (3, 2, 2, 17, 17)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 2, 17))
    assert not maps[:, 0].triu(1).any() and not maps[:, 1].tril(-1).any() and (maps >= 0).all()
    assert not any(module._forward_hooks for module in model.modules())
    assert as_patch_map(model, maps[0, 0, 0, 8]).shape == (4, 4)


def test_maps_of_an_adapted_model_are_those_of_the_merged_one():
    before, after = changed_vim("lora", targets=["in_proj", "x_proj", "dt_proj"], rank=4)
    images = torch.randn(1, 3, 32, 32)
    found = read_maps(after, images)
    torch.testing.assert_close(found, read_maps(vimtune.merge(copy.deepcopy(after)), images))
    assert (found - read_maps(before, images)).abs().max() > 1e-3


def test_pieces_of_channels_add_up(monkeypatch):
    model, _ = changed_vim()
    images = torch.randn(1, 3, 32, 32)
    whole = read_maps(model, images)
    monkeypatch.setattr("vimtune.analysis.scan_matrix.LARGEST", 17 * 17 * 5)  # 32 channels, 5 at a time
    torch.testing.assert_close(read_maps(model, images), whole)


def test_reach():
    maps = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]])
    found = Reach.of(maps)
    assert found.distance == pytest.approx((0 + 0.5 + 1) / 3)
    assert found.tokens == pytest.approx((1 + 2 + 2) / 3) and found.itself == pytest.approx(2 / 3)


@pytest.mark.parametrize("method", list_methods())
def test_every_method_can_be_looked_at(method):
    before, after = changed_vim(method, **options_for(method, {}))
    maps = read_maps(after, torch.randn(1, 3, 32, 32))
    assert maps.shape[0] == 3 and maps.isfinite().all()
    assert movements(effective_parameters(before), effective_parameters(after))
