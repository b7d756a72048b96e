"""Rules that surround calls act in cached decoding as in a pass over all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_language import FAMILIES, both_models, cached, tokens
from torch import nn

import vimtune
from vimtune.adapters import CallRule, Method, check_gradients, register_method
from vimtune.methods import METHODS
from vimtune.testing.methods import disturb


class TurnRule(CallRule):
    """Scales what goes into a call, and bends what comes out, token by token."""

    def __init__(self, site):
        super().__init__()
        self.scale, self.bend = (nn.Parameter(site.new_empty(1).zero_()) for _ in range(2))

    def around(self, call, x, *flow):
        y = call(x * (1 + 5 * self.scale))
        return y + 20 * self.bend * torch.tanh(y)


class PrefixRule(CallRule):
    """A token before the others, whose output is cut off."""

    def __init__(self, site):
        super().__init__()
        self.prefix = nn.Parameter(site.new_empty(site.owner.in_proj.out_features).normal_(std=0.1))

    def around(self, call, x, *flow):
        prefix = self.prefix.expand(x.shape[0], 1, -1)
        return call(torch.cat([prefix, x], 1))[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Turn(Method):
    summary = "a factor for what goes into the scan"
    default_targets = "scan()"

    def build_rule(self, site):
        return TurnRule(site)


@dataclass(frozen=True, kw_only=True)
class Prefix(Turn):
    summary = "a token before the scan"
    changes_at_start = True

    def build_rule(self, site):
        return PrefixRule(site)


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    """The methods of this file are known while one of its tests runs."""
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    register_method("demo_turn")(Turn)
    register_method("demo_prefix")(Prefix)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["scan()", "in_proj()", "out_proj()", "scan(),in_proj(),out_proj()"])
def test_generating_is_a_full_pass_for_each_token(family, targets):
    plain, model = both_models(family)
    disturb(vimtune.inject(model, "demo_turn", targets=targets)).eval()
    prompt, settings = tokens(2, 7), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(prompt)
    told = model.generate(prompt, attention_mask=mask, **settings)
    for number, logits in enumerate(told.logits):
        whole = model(told.sequences[:, : 7 + number], use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
        unadapted = plain(told.sequences[:, : 7 + number], use_cache=False).logits[:, -1]
        assert (whole - unadapted).abs().max() > 1e-2
    model(prompt).logits.square().mean().backward()
    check_gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_that_adds_tokens_is_refused_where_states_are_kept(family):
    """In a pass over all tokens it acts; behind a cache its tokens would come again before each new one."""
    _, model = both_models(family)
    plain = model(tokens(), use_cache=False).logits
    vimtune.inject(model, "demo_prefix")
    logits = model(tokens(), use_cache=False).logits
    assert logits.shape == plain.shape and not torch.allclose(logits, plain, atol=1e-3)
    with pytest.raises(ValueError, match=r"22 tokens instead of 21 .*use_cache=False"):
        cached(model, tokens())
    padded = torch.ones_like(tokens())
    padded[0, -1] = 0
    with pytest.raises(ValueError, match=r"22 tokens instead of 21 .*attention_mask"):
        model(tokens(), use_cache=False, attention_mask=padded)
