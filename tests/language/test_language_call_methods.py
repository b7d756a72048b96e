"""Methods around calls of language models: against their formulas, token by token, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from dense_scan import dense_scan
from tiny_language import FAMILIES, both_models, cached, tokens, transformers

import vimtune
from vimtune.adapters import check_gradients
from vimtune.language import pooled_classifier
from vimtune.testing.methods import disturb

SCANS = [
    ("affix", {"num_tokens": 2}),
    ("affix", {"num_tokens": 2, "hidden": 3}),
    ("state_offset", {}),
    ("state_offset", {"kind": "y"}),
    ("memba", {"chunk_length": 5, "tau": 0.8, "threshold": 0.2}),
]


def adapt(model, method, **options):
    torch.manual_seed(1)
    return disturb(vimtune.inject(model, method, **options)).eval()


def whole(model, ids):
    """Logits of a pass over all tokens."""
    return model(ids, use_cache=False).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def rule_of(module, call):
    return module.adapters[call]["default"]


# --- prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_stand_before_the_text(family):
    slow, model = both_models(family)
    adapt(model, "prompt", num_tokens=3)
    prompt = rule_of(model.backbone, "encode()").table.tokens
    assert prompt.shape == (3, 32)
    texts = slow.backbone.embeddings(tokens())
    expected = slow(inputs_embeds=torch.cat([prompt.expand(3, -1, -1), texts], 1), use_cache=False).logits
    close(whole(model, tokens()), expected[:, 3:])
    found = model(tokens(), use_cache=False, output_hidden_states=True, return_dict=False)
    assert all(hidden.shape == (3, 21, 32) for hidden in found[1])
    whole(model, tokens()).square().mean().backward()
    check_gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_in_the_states_that_decoding_goes_on_from(family):
    _, model = both_models(family)
    adapt(model, "prompt", num_tokens=3)
    expected = whole(model, tokens())
    first, cache = cached(model, tokens()[:, :9])
    rest = [cached(model, part, cache)[0] for part in tokens()[:, 9:].split([1, 1, 5, 1, 4], 1)]
    close(torch.cat([first, *rest], 1), expected)


@pytest.mark.parametrize(
    ("family", "method"),
    [("mamba", "prompt"), ("mamba2", "prompt"), ("mamba", "affix"), ("mamba", "lora+affix")],
)
def test_texts_of_several_lengths_are_generated_as_each_alone(family, method):
    """Padding on the left does not come between the learnt tokens and a text."""
    _, model = both_models(family)
    adapt(model, method, num_tokens=3)
    rows = [tokens()[0, :2], tokens()[1, :7], tokens()[2, :5]]
    ids = torch.stack([torch.cat([torch.zeros(7 - len(row), dtype=row.dtype), row]) for row in rows])
    mask = torch.tensor([[0] * (7 - len(row)) + [1] * len(row) for row in rows])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(ids, attention_mask=mask, **settings)
    for number, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings)
        assert torch.equal(together.sequences[number, 7:], alone.sequences[0, len(row) :])
        for mine, other in zip(together.logits, alone.logits, strict=True):
            close(mine[number], other[0])
        written = alone.sequences[:, : len(row) + 4]
        close(alone.logits[-1], whole(model, written)[:, -1])


def test_prompts_of_a_classifier():
    _, model = both_models("mamba")
    classifier = adapt(pooled_classifier(model, 4, "mean"), "prompt", num_tokens=2)
    mask = torch.ones_like(tokens())
    mask[1, 9:] = 0
    expected = torch.stack([classifier(tokens()[i : i + 1, : mask[i].sum()])[0] for i in range(3)])
    close(classifier(tokens(), mask), expected)


def test_models_stay_what_transformers_makes_them():
    slow, model = both_models("mamba")
    assert type(model.backbone).__name__ == type(slow.backbone).__name__
    assert isinstance(model.backbone, type(slow.backbone))


# --- around the scans


def test_affix_and_offsets_against_the_formulas():
    for method, options in SCANS[:4]:
        _, model = both_models("mamba")
        adapt(model, method, **options)
        for layer in model.backbone.layers:
            mixer, xz = layer.mixer, torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(4))
            rule = rule_of(mixer, "scan()")
            if method == "affix":
                rows = torch.cat([rule.tokens()[0], torch.ones(2, 64)], 1).expand(2, -1, -1)
                expected = dense_scan(torch.cat([rows, xz], 1), mixer)[:, 2:]
            elif options:
                expected = dense_scan(xz, mixer) + rule.offset * torch.nn.functional.silu(xz[..., 64:])
            else:
                expected = dense_scan(xz, mixer, "", rule.offsets[0].full)
            close(mixer.scan(xz), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_memba_goes_on_from_the_same_token_of_the_chunk_before(family):
    _, model = both_models(family)
    adapt(model, "memba", chunk_length=5, tau=0.8, threshold=0.2)
    vimtune.inject(fast := both_models(family)[1], "lora", rank=2)  # starts as the plain model
    mixer, plain = model.backbone.layers[1].mixer, fast.backbone.layers[1].mixer
    columns = slice(64, 128) if family == "mamba" else slice(0, 64)
    projected = torch.randn(2, 13, plain.in_proj.out_features, generator=torch.Generator().manual_seed(4))
    gated = projected.clone()
    for t in range(13):
        before = gated[:, t - 5, columns] if t >= 5 else 0
        v = 0.8 * before + projected[:, t, columns]
        gated[:, t, columns] = torch.where(v > 0.2, 0.0, v)
    close(mixer.scan(projected), plain.scan(gated))
    assert not torch.allclose(gated, projected)


@pytest.mark.parametrize(("method", "options"), [*SCANS, ("prompt", {}), ("additional_scan", {})])
def test_no_token_knows_of_later_ones(method, options):
    """Nor do their likelihoods: neither other words behind a text nor fewer of them change it."""
    _, model = both_models("mamba")
    adapt(model, method, **options)
    ids = tokens()
    other = torch.cat([ids[:, :12], ids[:, 12:].flip(1)], 1)
    expected = whole(model, ids)[:, :12]
    close(whole(model, other)[:, :12], expected)
    close(whole(model, ids[:, :12]), expected)


@pytest.mark.parametrize(("method", "options"), SCANS)
def test_states_and_padding_are_followed(method, options):
    """Learnt tokens are in the states with which decoding goes on, and offsets alike for every token."""
    _, model = both_models("mamba")
    adapt(model, method, **options)
    expected = whole(model, tokens())
    first, cache = cached(model, tokens()[:, :16])
    rest = [cached(model, part, cache)[0] for part in tokens()[:, 16:].split([1, 3, 1], 1)]
    close(torch.cat([first, *rest], 1), expected)
    for pad in ((2, 0), (0, 2), (3, 1)):
        mask = torch.nn.functional.pad(torch.ones_like(tokens()), pad)
        padded = torch.nn.functional.pad(tokens(), pad)
        found, cache = cached(model, padded, attention_mask=mask)
        close(found[:, pad[0] : pad[0] + 21], expected)
        longer = torch.cat([tokens(), tokens()[:, :2]], 1)
        more = torch.nn.functional.pad(mask, (0, 2), value=1)
        behind = cached(model, tokens()[:, :2], cache, attention_mask=more)[0]
        close(behind, whole(model, longer)[:, 21:])


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("mamba2", "affix", r"scan\(\) takes z \| x \| B \| C \| dt: it acts on the mixers of Vim and Mamba"),
        ("mamba2", "additional_scan", "this model has no such pair: it acts on the mixers of Vim and Mamba"),
        ("mamba2", "state_offset", "has a norm between the two: it acts on the mixers of Vim and Mamba"),
        ("mamba", "svp", "svp is made for Vim"),
    ],
)
def test_refusals(family, method, message):
    _, model = both_models(family)
    with pytest.raises(ValueError, match=message):
        vimtune.inject(model, method)


# --- more states


def test_more_states_of_a_language_model(tmp_path):
    """Cached decoding has them, too, and the merged model is transformers' with another state_size."""
    slow, model = both_models("mamba")
    plain = whole(model, tokens())
    vimtune.inject(model, "additional_scan", num_states=3)
    close(whole(model, tokens()), plain)
    expected = whole(disturb(model).eval(), tokens())
    first, cache = cached(model, tokens()[:, :19])
    rest = [cached(model, tokens()[:, t : t + 1], cache)[0] for t in (19, 20)]
    close(torch.cat([first, *rest], 1), expected)
    vimtune.merge(model, reversible=True)
    assert model.config.state_size == model.backbone.config.state_size == 11
    close(whole(model, tokens()), expected)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    close(loaded.eval()(tokens()).logits, expected)
    vimtune.adapters.unmerge(model)
    assert model.config.state_size == 8
    with pytest.raises(ValueError, match="the sizes of MambaMixer are fixed by its configuration"):
        vimtune.inject(slow, "additional_scan")
