"""Our mixers compute what transformers' own do, in every way through the model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_near
from tiny_language import FAMILIES, both_models, cached, slow_model, tokens, transformers

import vimtune
from vimtune import ops
from vimtune.language import accelerate, mixers, norms
from vimtune.language.mixers import FastMamba2Mixer, FastMambaMixer
from vimtune.language.refusals import PACKED
from vimtune.ops.gated_norm import gated_rms_norm

family_wise = pytest.mark.parametrize("family", FAMILIES)


def gradients(model, **arguments):
    model.zero_grad()
    model(tokens(), labels=tokens(), **arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@family_wise
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_bias": True, "conv_kernel": 3},
        {"use_conv_bias": False, "residual_in_fp32": False},
        {"tie_word_embeddings": False, "expand": 4, "num_heads": 8},
    ],
)
def test_logits_and_gradients(family, changes):
    if family == "mamba":
        changes = {key: value for key, value in changes.items() if key != "num_heads"}
    slow, fast = both_models(family, **changes)
    assert_near(fast(tokens()).logits, slow(tokens()).logits)
    assert_near(gradients(fast), gradients(slow))
    assert fast.state_dict().keys() == slow.state_dict().keys()


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_backends(backend):
    slow, fast = both_models("mamba")
    accelerate(fast, backend)
    assert_near(fast(tokens()).logits, slow(tokens()).logits)
    assert_near(cached(fast, tokens())[0], slow(tokens()).logits)


def test_a_prompt_and_a_token_in_one_operation(monkeypatch):
    """What a backend with such kernels gives is used, in every step of generation."""
    slow, fast = both_models("mamba")
    calls = []

    def prompt(xz, weights, backend):
        x, z = xz.chunk(2, dim=-1)
        u = ops.causal_conv1d(x, weights.conv_weight, weights.conv_bias, True)
        dt, B, C = F.linear(u, weights.x_proj).split([weights.dt_proj.shape[1], 8, 8], dim=-1)
        given = (u, F.linear(dt, weights.dt_proj), -weights.A_log.exp(), B, C, weights.D, z, weights.dt_bias)
        calls.append("prompt")
        return ops.stateful_scan(*given, True)

    def step(xz, recent, state, weights, backend):
        x, z = xz.chunk(2, dim=-1)
        recent.copy_(torch.cat([recent[..., 1:], x[..., None]], -1))
        u = F.silu((recent * weights.conv_weight).sum(-1) + weights.conv_bias)
        dt, B, C = F.linear(u, weights.x_proj).split([weights.dt_proj.shape[1], 8, 8], dim=-1)
        given = (u, F.linear(dt, weights.dt_proj), -weights.A_log.exp(), B, C, weights.D, z, weights.dt_bias)
        y, after = ops.scan_step(*given, True, state)
        state.copy_(after)
        calls.append("step")
        return y

    monkeypatch.setattr(mixers, "causal_prompt", prompt)
    monkeypatch.setattr(mixers, "causal_step", step)
    for length in (1, 2, 9):
        del calls[:]
        given = {"attention_mask": torch.ones(3, length), "max_new_tokens": 6, "min_new_tokens": 6}
        ids = [model.generate(tokens(length=length), **given, do_sample=False) for model in (fast, slow)]
        assert torch.equal(*ids)
        assert calls == ["prompt"] * 2 + ["step"] * 10
    # In parts, as a prompt that is read bit by bit: what is not one token is composed.
    _, cache = cached(fast, tokens()[:, :7])
    logits, _ = cached(fast, tokens()[:, 7:], cache)
    assert_near(logits, slow(tokens()).logits[:, 7:])


def test_a_token_of_mamba2_in_one_operation(monkeypatch):
    slow, fast = both_models("mamba2")
    calls = []

    def step(projected, recent, state, weights, options, backend):
        inner, groups = state.shape[1] * state.shape[2], options.groups * state.shape[3]
        z, xBC, dt = projected.split([inner, inner + 2 * groups, state.shape[1]], -1)
        recent.copy_(torch.cat([recent[..., 1:], xBC[..., None]], -1))
        u = F.silu((recent * weights.conv_weight).sum(-1) + weights.conv_bias)
        x, B, C = u.split([inner, groups, groups], -1)
        given = (x.unflatten(-1, state.shape[1:3]), dt, -weights.A_log.exp())
        B, C = (part.unflatten(-1, (options.groups, -1)) for part in (B, C))
        limits = options.lowest, options.highest
        y, after = ops.ssd_step(*given, B, C, weights.D, weights.dt_bias, True, limits, state)
        state.copy_(after)
        calls.append("step")
        return gated_rms_norm(y.flatten(1), z, weights.norm_weight, options.norm_groups, options.eps)

    monkeypatch.setattr(mixers, "ssd_mixer_step", step)
    given = {"attention_mask": torch.ones(3, 9), "max_new_tokens": 6, "min_new_tokens": 6}
    ids = [model.generate(tokens(length=9), **given, do_sample=False) for model in (fast, slow)]
    assert torch.equal(*ids) and calls == ["step"] * 10


@family_wise
def test_norms_in_one_operation(family, monkeypatch):
    slow, fast = both_models(family)
    calls = []
    monkeypatch.setattr(norms, "has_add_rms_norm", lambda *given: calls.append(given) or True)
    expected = gradients(slow)
    assert_near(gradients(fast), expected)
    assert len(calls) == 3  # of two layers, and of the norm behind them
    hidden = torch.randn(1, 2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        normed = fast.backbone.norm_f(hidden)
    assert normed.dtype == torch.bfloat16
    assert_near(normed.float(), slow.backbone.norm_f(hidden), 1e-2)


@family_wise
def test_gradient_checkpointing(family):
    _, model = both_models(family)
    expected = gradients(model.train())
    model.gradient_checkpointing_enable()
    assert_near(gradients(model), expected)


@family_wise
@torch.no_grad()
def test_prefill_chunks_and_single_tokens_are_one_pass(family):
    slow, fast = both_models(family)
    ids = tokens(3, 30)
    expected = slow(ids).logits
    logits, cache = [], None
    for part in ids.split([7, 1, 1, 2, 10, 1, 8], dim=1):  # 2 is shorter than the filter
        chunk, cache = cached(fast, part, cache)
        logits.append(chunk)
    assert_near(torch.cat(logits, 1), expected)


@family_wise
def test_gradients_pass_through_the_cache(family):
    _, model = both_models(family)
    expected = gradients(model)
    model.zero_grad()
    logits, cache = [], None
    for part in tokens().split([9, 1, 11], dim=1):
        chunk, cache = cached(model, part, cache)
        logits.append(chunk)
    loss = model.loss_function(torch.cat(logits, 1), tokens(), vocab_size=model.config.vocab_size)
    loss.backward()
    assert_near({name: p.grad for name, p in model.named_parameters()}, expected)


@family_wise
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_beams": 2, "num_return_sequences": 2}],
)
def test_generate(family, how):
    slow, fast = both_models(family)
    mask = torch.ones_like(tokens())
    mask[0, :6], mask[1, :2] = 0, 0
    results = []
    for model in (slow, fast):
        torch.manual_seed(0)
        results.append(model.generate(tokens(), attention_mask=mask, max_new_tokens=9, **how))
    assert torch.equal(*results)


@family_wise
@torch.no_grad()
def test_padding_never_enters_a_state(family):
    """Rows padded on the left, on the right and on both sides continue as the row alone does."""
    _, model = both_models(family)
    ids, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.long)
    mask[0, 5:], mask[1, :4], mask[2, :3], mask[2, 8:] = 0, 0, 0, 0
    logits, cache = cached(model, ids, attention_mask=mask)
    after = tokens(4, 3) % 7 + 1
    continued = [cached(model, after[:, :1], cache)[0], cached(model, after[:, 1:], cache)[0]]
    for row in range(4):
        real = mask[row].bool()
        alone = model(torch.cat([ids[row, real], after[row]])[None]).logits[0]
        assert_near(logits[row, real], alone[:-3])
        assert_near(torch.cat(continued, 1)[row], alone[-3:])


@family_wise
@torch.no_grad()
def test_padding_between_chunks(family):
    """Prompts of different lengths in chunks that are padded on the right, with the mask of all of them."""
    _, model = both_models(family)
    first, second = tokens(2, 6), tokens(2, 5) % 9 + 1
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 2:6], mask[1, 7:] = 0, 0
    _, cache = cached(model, first, attention_mask=mask[:, :6])
    logits, _ = cached(model, second, cache, attention_mask=mask)
    for row in range(2):
        real = mask[row].bool()
        alone = model(torch.cat([first, second], 1)[row, real][None]).logits[0]
        count = int(mask[row, 6:].sum())
        assert_near(logits[row, :count], alone[-count:])


@family_wise
@torch.no_grad()
def test_left_padding_as_in_transformers(family):
    slow, fast = both_models(family)
    mask = torch.ones_like(tokens())
    mask[0, :7], mask[2, :1] = 0, 0
    expected, found = (model(tokens(), attention_mask=mask).logits for model in (slow, fast))
    assert_near(found[mask.bool()], expected[mask.bool()])


@family_wise
def test_bfloat16(family):
    """As close to fp32 as transformers' own mixers come, in bf16 and under autocast."""
    slow, fast = both_models(family)
    expected = slow(tokens()).logits.log_softmax(-1)

    def error(logits):
        return (logits.log_softmax(-1) - expected).abs().mean().item()

    def autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(tokens()).logits

    assert error(autocast(fast)) < 1.3 * error(autocast(slow)) + 1e-3
    slow, fast = slow.to(torch.bfloat16), fast.to(torch.bfloat16)
    theirs = error(slow(tokens()).logits)
    assert error(fast(tokens()).logits) < 1.3 * theirs + 1e-3
    with torch.no_grad():
        logits, cache = cached(fast, tokens()[:, :-1])
        last, _ = cached(fast, tokens()[:, -1:], cache)
    assert error(torch.cat([logits, last], 1)) < 1.3 * theirs + 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients(fast).values())


@family_wise
def test_compile(family):
    _, model = both_models(family)
    expected = model(tokens(), use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(tokens(), use_cache=False).logits
    assert_near(found, expected)
    found.square().sum().backward()


@family_wise
def test_copies_pickles_and_files(family, tmp_path):
    _, model = both_models(family)
    expected = model(tokens()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.backbone.layers[0].mixer) in (FastMambaMixer, FastMamba2Mixer)
        assert_near(twin(tokens()).logits, expected)
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(model) and not isinstance(
        plain.backbone.layers[0].mixer, FastMambaMixer | FastMamba2Mixer
    )
    assert_near(plain(tokens()).logits, expected)


@family_wise
def test_accelerating_before_and_after_an_adapter(family):
    models = []
    for accelerated_first in (True, False):
        model = slow_model(family)
        steps = [accelerate, lambda model: vimtune.inject(model, "ft", targets="A_log,D,in_proj")]
        for step in steps if accelerated_first else reversed(steps):
            step(model)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        models.append(model)
    mixers = [model.backbone.layers[0].mixer for model in models]
    assert type(mixers[0]) is type(mixers[1]) and isinstance(mixers[0], FastMambaMixer | FastMamba2Mixer)
    assert_near(models[0](tokens()).logits, models[1](tokens()).logits)
    accelerate(models[0], "torch")
    assert mixers[0].backend == "torch" and vimtune.list_adapters(models[0]) == ["default"]
    for model in models:
        vimtune.delete_adapter(model, "default")
        assert type(model.backbone.layers[0].mixer) in (FastMambaMixer, FastMamba2Mixer)


@pytest.mark.parametrize("name", PACKED)
@family_wise
def test_packed_sequences_are_refused(family, name):
    _, model = both_models(family)
    assert model.backbone(tokens(), num_items_in_batch=3, **{name: None})[0].shape[:2] == tokens().shape
    accelerate(model)
    models = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert [len(found._forward_pre_hooks) for found in models] == [1, 1, 1]
    mixer = model.backbone.layers[0].mixer
    hidden = torch.zeros(*tokens().shape, model.config.hidden_size)
    calls = [*((found, tokens()) for found in models), (model.backbone, tokens()), (mixer, hidden)]
    for call, inputs in calls:
        with pytest.raises(ValueError, match=rf"packed sequences \({name}\) are not supported"):
            call(inputs, **{name: torch.zeros_like(tokens())})


def test_a_hook_that_comes_later_does_not_take_the_place_of_the_refusal(monkeypatch):
    """A model from a file meets a process in which torch has counted no hook yet."""
    content = pickle.dumps(both_models("mamba")[1])
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)
    model = pickle.loads(content)
    for part in (model, model.backbone):
        part.register_forward_pre_hook(lambda module, inputs: None)
        assert len(part._forward_pre_hooks) == 2


def test_what_cannot_be_accelerated():
    with pytest.raises(ValueError, match="Linear has no mixer of transformers' Mamba"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="hidden_act = 'gelu': only mixers with 'silu'"):
        accelerate(slow_model("mamba", hidden_act="gelu"))
