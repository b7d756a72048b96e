"""Mixed batches of language models: rows of texts with an adapter each."""

from __future__ import annotations

import pytest
import torch
from tiny_language import FAMILIES, both_models, tokens

import vimtune
from vimtune.adapters.mixing import forward_mixed, using
from vimtune.testing.methods import close, disturb


def with_adapters(model, **adapters):
    """The model with random adapters by name: (method, options of `inject`)."""
    for name, (method, options) in adapters.items():
        disturb(vimtune.inject(model, method, name=name, **options), size=0.02)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models(family):
    for model in both_models(family):
        with_adapters(
            model,
            a=("lora", {"targets": "in_proj", "rank": 2}),
            b=("lora", {"targets": "in_proj", "rank": 3}),
            c=("ssm" if family == "mamba" else "bitfit", {}),
        )
        ids, names = tokens(4), ["a", "b", "c", None]
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        found = forward_mixed(model, ids, names, attention_mask=mask, use_cache=False)
        for row, name in enumerate(names):
            with torch.no_grad(), using(model, name):
                wanted = model(ids[row : row + 1], attention_mask=mask[row : row + 1], use_cache=False).logits
            close(found[row].logits, wanted[0], 1e-4)
