"""Rules that surround calls act in cached decoding as in a pass over all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from rounding import assert_near
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


class MixRule(CallRule):
    """Each token has the sum of those before it; nothing says how a text in parts is to be read."""

    mixes_tokens = True

    def __init__(self, site):
        super().__init__()
        self.share = nn.Parameter(site.new_empty(1).fill_(0.1))

    def around(self, call, x, *flow):
        return call(x + self.share * x.cumsum(1))


class EchoRule(MixRule):
    """Each token has a share of the one that is two tokens before it; texts may come in parts."""

    def around(self, call, x, *flow):
        return call(self.echo(x, None)[0])

    def around_part(self, call, x, part, *flow):
        return call(part.go_on(x, 2, self.echo))

    def echo(self, x, before):
        before = torch.zeros_like(x[:, :1]).expand(-1, 2, -1) if before is None else before
        return x + self.share * torch.cat([before, x], 1)[:, : x.shape[1]], x


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


@dataclass(frozen=True, kw_only=True)
class Mix(Turn):
    summary = "a sum of tokens"
    changes_at_start = True

    def build_rule(self, site):
        return MixRule(site)


@dataclass(frozen=True, kw_only=True)
class Echo(Mix):
    summary = "a token that is heard again"

    def build_rule(self, site):
        return EchoRule(site)


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    """The methods of this file are known while one of its tests runs."""
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    register_method("demo_turn")(Turn)
    register_method("demo_prefix")(Prefix)
    register_method("demo_mix")(Mix)
    register_method("demo_echo")(Echo)


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
        assert_near(logits, whole)
        unadapted = plain(told.sequences[:, : 7 + number], use_cache=False).logits[:, -1]
        assert (whole - unadapted).abs().max() > 1e-2
    model(prompt).logits.square().mean().backward()
    check_gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_that_adds_tokens_is_refused_where_states_are_kept(family):
    """In the first part of a text it acts; behind a cache its tokens would come again before each new one."""
    _, model = both_models(family)
    plain = model(tokens(), use_cache=False).logits
    vimtune.inject(model, "demo_prefix")
    logits = model(tokens(), use_cache=False).logits
    assert logits.shape == plain.shape and not torch.allclose(logits, plain, atol=1e-3)
    first, cache = cached(model, tokens())
    assert_near(first, logits)
    with pytest.raises(ValueError, match=r"makes 3 tokens of 2 that go on with a text .* around_part"):
        cached(model, tokens()[:, :2], cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_that_mixes_tokens_and_knows_no_parts_is_refused_where_texts_have_them(family):
    _, model = both_models(family)
    plain = model(tokens(), use_cache=False).logits
    vimtune.inject(model, "demo_mix")
    assert not torch.allclose(model(tokens(), use_cache=False).logits, plain, atol=1e-3)
    with pytest.raises(ValueError, match=r"a rule at scan\(\) makes .* use_cache=False .*config.use_cache"):
        cached(model, tokens())
    padded = torch.ones_like(tokens())
    padded[0, 0] = 0
    with pytest.raises(ValueError, match=r"no around_part, .* no attention_mask"):
        model(tokens(), use_cache=False, attention_mask=padded)


@pytest.mark.parametrize("spec", ["demo_echo", "demo_prefix+demo_echo", "memba+demo_echo", "demo_echo+memba"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_that_mix_tokens_keep_each_its_own(family, spec, monkeypatch):
    """Parts of one token and of several, behind padding, are what they are in a whole text."""
    monkeypatch.setattr(PrefixRule, "around_part", around_first_part, raising=False)
    _, model = both_models(family)
    vimtune.inject(model, spec, **({"chunk_length": 3} if "memba" in spec else {})).eval()
    whole = model(tokens(), use_cache=False).logits
    ids, mask = torch.nn.functional.pad(tokens(), (2, 0)), torch.ones(3, 23, dtype=torch.long)
    mask[:, :2] = 0
    first, cache = cached(model, ids[:, :6], attention_mask=mask[:, :6])
    rest = [cached(model, part, cache)[0] for part in ids[:, 6:].split([1, 1, 5, 1, 9], 1)]
    assert_near(torch.cat([first, *rest], 1)[:, 2:], whole)


def around_first_part(rule, call, x, part, *flow):
    """Of the rule that adds a token: with the first part of a text alone."""
    return rule.around(call, x, *flow) if part.begins else call(x)
