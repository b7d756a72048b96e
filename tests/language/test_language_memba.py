"""Membranes of language models: a text in parts, among others and behind padding has those of the whole."""

from __future__ import annotations

import copy

import pytest
import torch
from rounding import assert_near
from tiny_language import FAMILIES, both_models, cached, tokens
from torch.nn.utils.rnn import pad_sequence

import vimtune
from vimtune.testing.methods import disturb

LENGTH = 21
COMBINED = [
    *[(family, method) for family in FAMILIES for method in ("memba", "lora+memba", "prompt+memba")],
    ("mamba", "affix+memba"),
    ("mamba", "memba+affix"),
    ("mamba", "additional_scan+memba"),
]


def adapted(family, method="memba", chunk_length=5):
    torch.manual_seed(1)
    model = both_models(family)[1]
    vimtune.inject(model, method, chunk_length=chunk_length, tau=0.8, threshold=0.2)
    return disturb(model).eval()


def whole(model, ids):
    """Logits of a pass over all tokens."""
    return model(ids, use_cache=False).logits


def in_parts(model, ids, sizes):
    """Logits of a text that is read in parts of these sizes."""
    logits, cache = [], None
    for part in ids.split(sizes, 1):
        found, cache = cached(model, part, cache)
        logits.append(found)
    return torch.cat(logits, 1)


def batch(rows, side):
    """Rows of several lengths with padding on one side, and their mask."""
    masks = [torch.ones_like(row) for row in rows]
    return [pad_sequence(parts, batch_first=True, padding_side=side) for parts in (rows, masks)]


@pytest.mark.parametrize(("family", "method"), COMBINED)
def test_parts_are_those_of_the_whole_text(family, method):
    """Parts that are shorter and longer than a chunk, and single tokens across chunks."""
    model = adapted(family, method)
    expected = whole(model, tokens())
    with vimtune.disabled(model):
        plain = whole(model, tokens())
        assert_near(in_parts(model, tokens(), [4, 1, 16]), plain)
    assert not torch.allclose(plain, expected, atol=1e-2)
    for sizes in ([1] * LENGTH, [4] + [1] * 17, [5, 1, 1, 14], [6, 5, 10], [13, 3, 1, 4], [LENGTH]):
        assert_near(in_parts(model, tokens(), sizes), expected)


@pytest.mark.parametrize(("family", "method"), COMBINED)
def test_each_row_behind_padding_is_as_it_is_alone(family, method):
    """At once and in parts, the first of which may be padding alone where no learnt tokens are behind it."""
    model = adapted(family, method)
    rows = [tokens()[0, :3], tokens()[1, :14], tokens()[2, :8]]
    ids, mask = batch(rows, "left")
    found, cache = [model(ids, use_cache=False, attention_mask=mask).logits], None
    for sizes in ([14], [12, 1, 1] if "prompt" in method or "affix" in method else [3, 6, 4, 1]):
        parts, cache = [], None
        for end in torch.tensor(sizes).cumsum(0):
            begin = sum(part.shape[1] for part in parts)
            logits, cache = cached(model, ids[:, begin:end], cache, attention_mask=mask[:, :end])
            parts.append(logits)
        found.append(torch.cat(parts, 1))
    for logits in found:
        for row, own, its_mask in zip(rows, logits, mask.bool(), strict=True):
            assert_near(own[its_mask], whole(model, row[None])[0])


@pytest.mark.parametrize(("family", "method"), COMBINED)
def test_each_row_before_padding_is_as_it_is_alone(family, method):
    """With padding behind each of several parts."""
    model = adapted(family, method)
    texts, ends = [tokens()[i] for i in range(3)], [(3, 5, 9), (8, 14, 18), (6, 7, 11)]
    alone = [whole(model, text[None])[0] for text in texts]
    begins, cache, seen = [0, 0, 0], None, torch.ones(3, 0, dtype=torch.long)
    for place in range(3):
        now = [slice(begin, end[place]) for begin, end in zip(begins, ends, strict=True)]
        ids, mask = batch([text[part] for text, part in zip(texts, now, strict=True)], "right")
        seen = torch.cat([seen, mask], 1)
        logits, cache = cached(model, ids, cache, attention_mask=seen)
        for row in range(3):
            assert_near(logits[row][mask[row].bool()], alone[row][now[row]])
        begins = [part.stop for part in now]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_is_generating_without(family, beams):
    """Rows of several lengths, of which each beam takes the membranes with it."""
    model = adapted(family, "lora+memba", chunk_length=3)
    ids, mask = batch([tokens()[0, :2], tokens()[1, :7], tokens()[2, :5]], "left")
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": -1, "num_beams": beams}
    settings |= {"num_return_sequences": beams, "output_scores": True, "return_dict_in_generate": True}
    found, expected = (
        model.generate(ids, attention_mask=mask, use_cache=use_cache, **settings)
        for use_cache in (True, False)
    )
    assert torch.equal(found.sequences, expected.sequences)
    for mine, other in zip(found.scores, expected.scores, strict=True):
        assert_near(mine, other)
    if beams > 1:
        assert_near(found.sequences_scores, expected.sequences_scores)
        moved = found.beam_indices[:, 1:9] != found.beam_indices[:, :8]
        assert moved.any(), "no beam has changed its place, so that this tells nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_membranes_go_with_their_cache(family):
    """Copies, changes of the order, other texts at the same time, and a new text after `reset`."""
    model = adapted(family)
    ids, other = tokens(), tokens().flip(0, 1)
    expected, expected_of_other = whole(model, ids), whole(model, other)
    _, cache = cached(model, ids[:, :7])
    _, second = cached(model, other[:, :4])
    copied = copy.deepcopy(cache)
    assert_near(cached(model, ids[:, 7:9], cache)[0], expected[:, 7:9])
    assert_near(cached(model, other[:, 4:11], second)[0], expected_of_other[:, 4:11])
    assert_near(cached(model, ids[:, 9:], cache)[0], expected[:, 9:])
    copied.reorder_cache(torch.tensor([2, 0, 0]))
    assert_near(cached(model, ids[[2, 0, 0], 7:13], copied)[0], expected[[2, 0, 0], 7:13])
    cache.reset()
    assert_near(cached(model, other[:, :2], cache)[0], expected_of_other[:, :2])
    assert_near(cached(model, other[:, 2:], cache)[0], expected_of_other[:, 2:])


def test_a_cache_is_that_of_one_adapter_at_a_time():
    """Longer chunks need a text from its first token on; after `reset` there is room for them."""
    model, ids = adapted("mamba"), tokens()
    vimtune.inject(model, "memba", name="long", chunk_length=8, tau=0.8, threshold=0.2)
    vimtune.set_adapter(model, "default")
    _, cache = cached(model, ids[:, :9])
    vimtune.set_adapter(model, "long")
    with pytest.raises(ValueError, match=r"the last 8 tokens, and the cache has it of 5, .* first token on"):
        cached(model, ids[:, 9:], cache)
    cache.reset()
    cached(model, ids[:, :9], cache)
    assert_near(cached(model, ids[:, 9:], cache)[0], whole(model, ids)[:, 9:])


def test_membranes_begin_with_the_adapter():
    """Tokens that were read without it have none: with chunks as long as the rest of a text it changes no
    gate but for those above the threshold."""
    model, ids = adapted("mamba", chunk_length=12), tokens()
    with vimtune.disabled(model):
        _, cache = cached(model, ids[:, :9])
    without = copy.deepcopy(cache)
    parts = [cached(model, part, cache)[0] for part in ids[:, 9:].split([5, 1, 6], 1)]
    vimtune.inject(model, "memba", name="others", chunk_length=40, tau=0.5, threshold=0.2)
    assert_near(torch.cat(parts, 1), cached(model, ids[:, 9:], without)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    model = adapted(family, "lora+memba").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mask = batch([tokens()[0], tokens()[1, :8], tokens()[2, :6]], "left")[1]

    def gradients():
        return torch.autograd.grad(model(tokens(), attention_mask=mask).logits.square().mean(), trained)

    expected = gradients()
    model.gradient_checkpointing_enable()
    for mine, other in zip(gradients(), expected, strict=True):
        assert_near(mine, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_from_part_to_part(family):
    model = adapted(family, "lora+memba")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, expected = (
        torch.autograd.grad(logits.square().mean(), trained)
        for logits in (in_parts(model, tokens(), [7, 1, 1, 4, 8]), whole(model, tokens()))
    )
    for mine, other in zip(found, expected, strict=True):
        assert_near(mine, other)
