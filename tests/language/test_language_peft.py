"""Where HF peft refuses to adapt a Mamba model, the same places are adapted here, and the adapters train."""

from __future__ import annotations

import pytest
import torch
from tiny_language import FAMILIES, slow_model, tokens

import vimtune
from vimtune.adapters import check_gradients
from vimtune.language import accelerate
from vimtune.testing.methods import disturb

peft = pytest.importorskip("peft", reason="no peft")

REFUSED = ("out_proj", "conv1d")
"""Modules that peft knows to be read, not called, by kernels for Mamba models."""


@pytest.mark.parametrize("target", REFUSED)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_refuses(family, target):
    config = peft.LoraConfig(target_modules=["in_proj", target], r=4)
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        peft.get_peft_model(slow_model(family), config)


@pytest.mark.parametrize("place", ["transformers", "vimtune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vimtune_adapts_trains_and_merges(family, place):
    model, ids = slow_model(family), tokens()
    names = set(model.state_dict())
    if place == "vimtune":
        model = accelerate(model)
    with torch.no_grad():
        before = model(ids).logits
    vimtune.inject(model, "lora", targets=["in_proj", *REFUSED], rank=4)
    disturb(model)  # off the start, where B = 0 hides the gradient of A
    model.train()(ids, labels=ids).loss.backward()
    check_gradients(model)
    trained = {name.split(".")[4] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"in_proj", *REFUSED}
    with torch.no_grad():
        adapted = model.eval()(ids).logits
        merged = vimtune.merge(model)(ids).logits
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names
