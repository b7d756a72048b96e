"""A bottleneck beside a layer, against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vimtune
from vimtune.testing.methods import build_test_model, close, disturb


def adapted(**options):
    return disturb(vimtune.inject(build_test_model(), "parallel_adapter", rank=6, **options))


def test_formula():
    model = adapted(scale=0.3).eval()
    layer = model.layers[1].mixer.out_proj
    rule = layer.adapters["forward()"]["default"]
    u = torch.randn(2, 7, layer.in_features)
    hidden = torch.einsum("rk,blk->blr", rule.down, u).clamp(min=0)
    added = 0.3 * torch.einsum("or,blr->blo", rule.up, hidden)
    close(layer(u), F.linear(u, layer.weight) + added)


def test_dropout_acts_within_the_bottleneck_in_training_only():
    model = adapted(dropout=0.5)
    layer = model.layers[0].mixer.out_proj
    u = torch.randn(50, layer.in_features)
    layer.train()
    first, second = layer(u), layer(u)
    assert (first != second).any(0).all()
    layer.eval()
    assert torch.equal(layer(u), layer(u))


def test_it_stands_beside_any_linear_layer_that_is_called():
    model = adapted(targets="in_proj(),out_proj()")
    assert vimtune.summary(model).adapted["parallel_adapter"] == {"in_proj()": 2, "out_proj()": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "scan()"}, r"layers.0.mixer.scan\(\) is none: choose targets such as out_proj\(\)"),
        (
            {"targets": "in_proj"},
            "beside the call of a linear layer, and layers.0.mixer.in_proj.weight is no",
        ),
        (
            {"rank": 33},
            r"rank 33 does not fit layers.0.mixer.out_proj\(\) of shape 16 x 32: expected 1 to 32",
        ),
    ],
)
def test_where_it_does_not_fit(options, message):
    model = build_test_model()
    with pytest.raises(ValueError, match=message):
        vimtune.inject(model, "parallel_adapter", **options)
    assert vimtune.list_adapters(model) == []


def test_merging_is_refused():
    with pytest.raises(
        ValueError, match=r"has a ParallelAdapterRule at layers.0.mixer.out_proj\(\), which no"
    ):
        vimtune.merge(adapted())
