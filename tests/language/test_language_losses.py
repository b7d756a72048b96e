"""Log-likelihoods in chunks and the pooled head, against the plain computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_near
from tiny_language import FAMILIES, VOCABULARY, both_models, tokens

import vimtune
from vimtune.adapters import adapter_state_dict, check_gradients
from vimtune.language import greedy_hits, losses, pooled_classifier, sequence_losses
from vimtune.testing.methods import disturb


def labelled():
    """Four sequences: all labelled, answers alone, padded on the right, none labelled."""
    ids = tokens(4, 15)
    labels = ids.clone()
    labels[1, :10], labels[2, 8:], labels[3] = -100, -100, -100
    return ids, labels


def plain_losses(model, ids, labels):
    logits = model(ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.sum(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_tokens", [4, None])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_losses_and_gradients(family, chunk_tokens, frozen_head):
    _, model = both_models(family, tie_word_embeddings=not frozen_head)
    model.lm_head.requires_grad_(not frozen_head)
    factors, results = torch.tensor([1.0, -2.0, 0.5, 3.0]), []
    ids, labels = labelled()
    counted = (labels[:, 1:] != -100).nonzero()
    # As they are, and in another order with tokens that are not counted between them.
    known = torch.cat([torch.zeros(3, dtype=torch.long), counted[:, 0] * 15 + counted[:, 1] + 1]).flip(0)
    for compute in (
        plain_losses,
        lambda *given: sequence_losses(*given, chunk_tokens=chunk_tokens),
        lambda *given: sequence_losses(*given, known, chunk_tokens=chunk_tokens),
    ):
        model.zero_grad()
        losses = compute(model, ids, labels)
        (losses * factors).sum().backward()
        results.append([losses, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert_near(results[1], results[0])
    assert_near(results[2], results[1])
    assert results[1][0][3] == 0
    with torch.no_grad():
        assert_near(sequence_losses(model, *labelled(), chunk_tokens=chunk_tokens), results[0][0].detach())


def test_a_frozen_head_computes_the_logits_once_and_a_trained_one_twice():
    for frozen, calls in ((True, 3), (False, 6)):
        _, model = both_models("mamba", tie_word_embeddings=False)
        model.lm_head.requires_grad_(not frozen)
        seen = []
        model.lm_head.register_forward_hook(lambda *call, seen=seen: seen.append(call))
        sequence_losses(model, *labelled(), chunk_tokens=10).sum().backward()
        assert len(seen) == calls


def test_chunks_hold_so_many_bytes(monkeypatch):
    _, model = both_models("mamba")
    monkeypatch.setattr(losses, "CHUNK_BYTES", 40 * VOCABULARY)
    seen = []
    model.lm_head.register_forward_hook(lambda head, given, logits: seen.append(logits.nbytes))
    with torch.no_grad():
        sequence_losses(model, *labelled())
        assert max(seen) == 40 * VOCABULARY
        del seen[:]
        with torch.autocast("cpu", torch.bfloat16):
            greedy_hits(model, *labelled())
        assert max(seen) == 40 * VOCABULARY


def test_an_adapted_head_gets_its_gradients():
    """A head with dropout on its input, beside a tied one."""
    for tied in (True, False):
        _, model = both_models("mamba", tie_word_embeddings=tied)
        options = {} if tied else {"dropout": 0.3}
        vimtune.inject(model, "lora", targets="lm_head,out_proj" if tied else "lm_head", rank=2, **options)
        disturb(model).train()
        results = []
        for compute in (plain_losses, sequence_losses):
            model.zero_grad()
            torch.manual_seed(0)
            losses = compute(model, *labelled())
            losses.sum().backward()
            check_gradients(model)
            results.append([losses, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        if tied:
            assert_near(results[1], results[0])


@pytest.mark.parametrize(
    ("method", "options", "rewound"),
    [("full", {}, False), ("lora", {}, False), ("lora", {"dropout": 0.3}, True)],
)
def test_the_generator_is_rewound_where_the_head_draws(monkeypatch, method, options, rewound):
    """Nowhere else, because a CUDA graph cannot rewind it."""
    _, model = both_models("mamba", tie_word_embeddings=False)
    vimtune.inject(
        model, method, **({"targets": "lm_head", "rank": 2} if method == "lora" else {}), **options
    )
    asked, checkpoint = [], losses.checkpoint

    def note(*args, preserve_rng_state, **others):
        asked.append(preserve_rng_state)
        return checkpoint(*args, preserve_rng_state=preserve_rng_state, **others)

    monkeypatch.setattr(losses, "checkpoint", note)
    sequence_losses(model.train(), *labelled()).sum().backward()
    assert asked == [rewound]


def test_nothing_labelled():
    _, model = both_models("mamba")
    ids = tokens(2, 5)
    nothing = torch.full_like(ids, -100)
    assert sequence_losses(model, ids, nothing).tolist() == [0, 0]
    assert greedy_hits(model, ids, nothing).tolist() == [True, True]


def test_greedy_hits():
    _, model = both_models("mamba2")
    ids = model.generate(tokens(3, 6), attention_mask=torch.ones(3, 6), max_new_tokens=5, eos_token_id=None)
    labels = ids.clone()
    labels[:, :6] = -100
    assert greedy_hits(model, ids, labels, chunk_tokens=4).tolist() == [True] * 3
    ids[1, -1] = labels[1, -1] = (labels[1, -1] + 1) % VOCABULARY
    assert greedy_hits(model, ids, labels, chunk_tokens=4).tolist() == [True, False, True]


def test_shapes_that_do_not_fit():
    _, model = both_models("mamba")
    with pytest.raises(ValueError, match=r"must both be \(B, L\); got \(3, 21\) and \(3, 20\)"):
        sequence_losses(model, tokens(), tokens()[:, 1:])


# --- the pooled head


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_is_not_pooled(family, pooling):
    _, model = both_models(family)
    classifier = pooled_classifier(model, 5, pooling)
    assert classifier.backbone is model.backbone
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:], mask[2, 1:] = 0, 0
    logits = classifier(ids, mask)
    for row in range(3):
        assert_near(logits[row], classifier(ids[row : row + 1, : mask[row].sum()])[0])
    with pytest.raises(ValueError, match="pooling = 'first': expected one of last, mean"):
        pooled_classifier(model, 5, "first")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pooled_head_belongs_to_the_adapter(family, tmp_path):
    build = lambda: pooled_classifier(both_models(family)[1], 5)  # noqa: E731
    torch.manual_seed(0)
    model = vimtune.inject(build(), "lora", rank=2, num_classes=7)
    disturb(model)
    assert {"head.weight.value", "head.bias.value"} <= adapter_state_dict(model).keys()
    model(tokens()).square().sum().backward()
    check_gradients(model)
    expected = model.eval()(tokens())
    assert expected.shape == (3, 7)
    vimtune.save_adapter(model, tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    twin = build()
    vimtune.load_adapter(twin, tmp_path / "adapter.safetensors")
    assert_near(twin.eval()(tokens()), expected)
    assert_near(vimtune.merge(model)(tokens()), expected)
