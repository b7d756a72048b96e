"""Adapters act in every way through a language model: training, evaluation, prefill, cached decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_language import FAMILIES, both_models, cached, tokens, transformers

import vimtune
from vimtune.adapters import check_gradients
from vimtune.fields import options_of
from vimtune.methods import METHODS
from vimtune.testing.methods import disturb

SMALL = {"rank": 2, "block_size": 4, "dropout": 0.0}
PLACES = {
    "mamba": [
        ("lora", "in_proj"),
        ("lora", "out_proj"),
        ("lora", "x_proj"),
        ("lora", "dt_proj"),
        ("lora", "conv1d"),
        ("lora", "lm_head"),
        ("lora", "in_proj[x],x_proj[dt|C]"),
        ("dora", "in_proj[z],x_proj[B],dt_proj"),
        ("prodial", "in_proj,out_proj"),
        ("ft", "A_log"),
        ("ft", "D"),
        ("ft", "conv1d,conv1d.bias"),
        ("ft", "dt_proj,dt_proj.bias"),
        ("ft", "norm"),
        ("ft", "norm_f"),
        ("ft", "embeddings"),
    ],
    "mamba2": [
        ("lora", "in_proj"),
        ("lora", "out_proj"),
        ("lora", "conv1d"),
        ("lora", "lm_head"),
        ("lora", "in_proj[z|x|B|C|dt]"),
        ("dora", "in_proj[x],out_proj"),
        ("prodial", "in_proj,out_proj"),
        ("ft", "in_proj[dt]"),
        ("ft", "A_log"),
        ("ft", "D"),
        ("ft", "dt_bias"),
        ("ft", "conv1d[B],conv1d.bias"),
        ("ft", "mixer.norm"),
        ("ft", "embeddings"),
    ],
}
# These surround calls or change sizes, which test_language_call_methods.py is about, or act on what language
# models do not have.
ELSEWHERE = (
    *("prompt", "affix", "additional_scan", "state_offset", "svp", "memba", "parallel_adapter"),
    *("cls_token_tuning", "pos_embed_tuning"),
)
DEFAULTS = [
    (name, None) for name in METHODS if not METHODS.get(name).trains_head_only and name not in ELSEWHERE
]
REFUSED = {("mamba2", "sdt"): "rows B and C of x_proj, which this model does not have"}
"""Methods that have no place in the models of a family, and what they say to that."""
CASES = [
    (family, *case)
    for family in FAMILIES
    for case in [*DEFAULTS, *PLACES[family]]
    if (family, case[0]) not in REFUSED
]


def adapt(model, method, targets):
    torch.manual_seed(1)
    options = {key: value for key, value in SMALL.items() if key in options_of(METHODS.get(method))}
    return vimtune.inject(model, method, targets=targets, **options)


def ways(model):
    """Logits of the same tokens in training, in evaluation, and in prefill with single tokens behind it."""
    ids = tokens(2, 9)
    found = {"training": model.train()(ids, use_cache=False).logits}
    with torch.no_grad():
        found["evaluation"] = model.eval()(ids, use_cache=False).logits
        first, cache = cached(model, ids[:, :7])
        rest = [cached(model, ids[:, t : t + 1], cache)[0] for t in (7, 8)]
        found["prefill and decoding"] = torch.cat([first, *rest], 1)
    return found


@pytest.mark.parametrize(("family", "method", "targets"), CASES)
def test_alive_in_every_way(family, method, targets, tmp_path):
    slow, model = both_models(family)
    with torch.no_grad():
        plain = model(tokens(2, 9)).logits
    disturb(adapt(model, method, targets))

    found = ways(model)
    reference = found["evaluation"]
    model.zero_grad()
    found["training"].square().mean().backward()
    check_gradients(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "embeddings" not in name:  # not every token occurs
            assert (parameter.grad != 0).all(), f"{name} is dead in places"

    vimtune.save_adapter(model, tmp_path / "adapter.safetensors")
    vimtune.load_adapter(slow, tmp_path / "adapter.safetensors")
    found |= {f"{way}, transformers' own": logits for way, logits in ways(slow).items()}
    vimtune.merge(model)
    found |= {f"{way}, merged": logits for way, logits in ways(model).items()}
    for way, logits in found.items():
        torch.testing.assert_close(
            logits, reference, rtol=1e-4, atol=2e-5, msg=lambda text, way=way: f"{way}: {text}"
        )
        # Prefill and both tokens that are decoded alone are others than without the adapter.
        change = (logits - plain).abs().amax((0, 2))
        assert (change[[6, 7, 8]] > 1e-4).all(), f"{way}: {change}"


@pytest.mark.parametrize(("family", "method"), REFUSED)
def test_methods_say_where_they_have_no_place(family, method):
    with pytest.raises(ValueError, match=REFUSED[family, method]):
        adapt(both_models(family)[1], method, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parallel_adapter_is_alive_in_every_way(family, tmp_path):
    slow, model = both_models(family)
    with torch.no_grad():
        plain = model(tokens(2, 9)).logits
    disturb(adapt(model, "parallel_adapter", None))
    vimtune.save_adapter(model, tmp_path / "adapter.safetensors")
    _, other = both_models(family)
    vimtune.load_adapter(other, tmp_path / "adapter.safetensors")
    found = ways(model) | {f"{way}, loaded": logits for way, logits in ways(other).items()}
    for way, logits in found.items():
        torch.testing.assert_close(logits, found["evaluation"], rtol=1e-4, atol=2e-5, msg=way)
        assert ((logits - plain).abs().amax((0, 2))[[6, 7, 8]] > 1e-4).all(), way
    found["training"].square().mean().backward()
    check_gradients(model)
    with pytest.raises(ValueError, match="is no call to adapt"):
        vimtune.load_adapter(slow, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["both", "conv1d,lm_head"])
def test_merged_model_in_plain_transformers(family, targets, tmp_path):
    _, model = both_models(family)
    disturb(adapt(model, "lora", targets))
    expected = model.eval()(tokens()).logits
    told = model.generate(tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=6)
    vimtune.merge(model).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-3, atol=1e-4)
    again = plain.generate(tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=6)
    assert torch.equal(again, told)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_gradient_checkpointing_and_compiler(family):
    _, model = both_models(family, num_hidden_layers=1)
    disturb(adapt(model, "prodial", "both")).train()
    logits = model(tokens(), use_cache=False).logits
    logits.square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    for other in (twin, torch.compile(model, backend="aot_eager")):
        other.zero_grad()
        found = other(tokens(), use_cache=False).logits
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
        found.square().mean().backward()
        gradients = [p.grad for p in other.parameters() if p.requires_grad]
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)


def test_biases_of_both_families():
    """BitFit finds the biases of the time steps, whatever they are called."""
    for family, bias in (("mamba", "dt_proj.bias"), ("mamba2", "dt_bias")):
        _, model = both_models(family)
        vimtune.inject(model, "bitfit")
        sites = vimtune.adapters.active_adapter(model).sites["bitfit"]
        assert {path.partition("mixer.")[2] for path in sites} == {"conv1d.bias", bias}


@pytest.mark.parametrize("family", FAMILIES)
def test_out_proj_is_called(family):
    """Dropout on the input of out_proj acts, which kernels that only read its weight cannot offer."""
    _, model = both_models(family)
    vimtune.inject(model, "lora", targets="out_proj", rank=2, dropout=0.5)
    disturb(model).train()
    logits = [model(tokens(), use_cache=False).logits for _ in range(2)]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_of_the_mixers(family):
    from vimtune.adapters.points import Points

    calls = Points(both_models(family)[1]).calls
    names = {path.rpartition("mixer.")[2] for path in calls if "mixer" in path}
    assert names == {"scan()", "in_proj()", "out_proj()"}
