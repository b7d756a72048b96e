"""Where HF peft refuses to adapt a Mamba model, the same places are adapted here, and the adapters train."""

from __future__ import annotations

import pytest
import torch
from tiny_language import FAMILIES, both_models, cached, slow_model, tokens

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


def wrapped(model, *targets):
    """The model with random LoRA of peft."""
    torch.manual_seed(3)
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=list(targets), r=4, init_lora_weights=False)
    )


@pytest.mark.parametrize(("family", "targets"), [("mamba", ("in_proj", "x_proj")), ("mamba2", ("in_proj",))])
def test_adapters_of_peft_act_where_transformers_calls(family, targets):
    # One layer, because the compiler takes seconds for each.
    models = [wrapped(model, *targets) for model in both_models(family, num_hidden_layers=1)]
    found = []
    for model in models:
        logits, cache = cached(model, tokens()[:, :-1])
        last, _ = cached(model, tokens()[:, -1:], cache)
        whole = model.eval()(tokens(), attention_mask=torch.ones_like(tokens())).logits
        whole.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and grad.abs().max() > 0 for grad in gradients)
        found.append([torch.cat([logits, last], 1), whole, *gradients])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    compiled = torch.compile(models[1], backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=tokens()).logits, found[1][1], rtol=1e-4, atol=1e-4)


def hooked(model, name):
    """The model with a hook at a module of every mixer that changes what it gives."""
    for layer in model.backbone.layers:
        getattr(layer.mixer, name).register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


class Doubled(torch.nn.Module):
    """Twice what a module gives, with its weights, as other libraries wrap a module."""

    def __init__(self, part):
        super().__init__()
        self.part, self.weight, self.bias = part, part.weight, getattr(part, "bias", None)
        self.variance_epsilon = getattr(part, "variance_epsilon", None)

    def forward(self, *inputs):
        return 2 * self.part(*inputs)


def replaced(model, name):
    """The model with a module of another class in every mixer."""
    for layer in model.backbone.layers:
        setattr(layer.mixer, name, Doubled(getattr(layer.mixer, name)))
    return model


@pytest.mark.parametrize("change", [hooked, replaced])
@pytest.mark.parametrize(("family", "name"), [("mamba", "x_proj"), ("mamba2", "norm")])
def test_what_transformers_calls_is_called(family, name, change):
    unchanged, fast = both_models(family)[1], change(both_models(family)[1], name)
    slow = change(both_models(family)[0], name)
    ids, mask = tokens(), torch.ones_like(tokens())
    mask[0, :4] = 0
    for arguments in ({}, {"attention_mask": mask}, {"use_cache": False}):
        expected = slow(ids, **arguments).logits
        torch.testing.assert_close(fast(ids, **arguments).logits, expected, rtol=1e-3, atol=1e-4)
        assert (unchanged(ids, **arguments).logits - expected).abs().max() > 1e-3
    steps = [cached(model, ids[:, -1:], cached(model, ids[:, :-1])[1])[0] for model in (fast, slow)]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"), [("mamba", "dt_proj"), ("mamba", "conv1d"), ("mamba2", "conv1d")]
)
def test_what_would_do_nothing_is_refused(family, name):
    model = replaced(both_models(family)[1], name)
    for use_cache in (False, True):
        with pytest.raises(ValueError, match=rf"^{name} of Fast.*Doubled.* with vimtune\.inject$"):
            model(tokens(), use_cache=use_cache)


def test_hooks_that_watch_every_module_do_no_harm():
    model = both_models("mamba")[1]
    expected = model(tokens()).logits
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert "backbone.layers.0.mixer.x_proj" in seen


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
