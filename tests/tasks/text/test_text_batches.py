"""Batches of texts: whole, in an order by seed and epoch, divided over processes, with little padding."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vimtune.data.text import ARC_CHALLENGE, ARC_EASY, HELLASWAG, WINOGRANDE, Example, open_text
from vimtune.tasks.text.batches import EVEN_PADDING, MOST_PADDING, TextBatches, collate
from vimtune.tasks.text.heads import ClassHead, LikelihoodHead, RatingHead
from vimtune.tasks.text.scoring import IGNORED
from vimtune.tasks.text.tokens import Item, Row


def items_of(lengths, scored=1):
    return [Item((Row(tuple(range(1, 1 + n)), scored, slot),), slot % 2) for slot, n in enumerate(lengths)]


def made_up_lengths(number, seed=0):
    """Lengths as those of real questions: many short ones, few long ones."""
    draw = random.Random(seed)
    return [2 + int(draw.lognormvariate(3.3, 0.5)) for _ in range(number)]


def batches(items, head=None, **options):
    options = {"batch_size": 8, "shuffle": True, **options}
    return TextBatches(
        "train", "made up", "hash", len(items), items, (head or LikelihoodHead()).batch, **options
    )


def slots(loader):
    return [batch.tensors["slots"].tolist() for batch in loader]


def loaded(items, **options):
    """The items of every batch."""
    options = {"batch_size": 8, "shuffle": True, **options}
    return TextBatches("train", "made up", "hash", len(items), items, list, **options)


def padding(items, **options):
    """Share of the tokens of all batches that are padding."""
    found = [[len(row.tokens) for item in batch for row in item.rows] for batch in loaded(items, **options)]
    return 1 - sum(map(sum, found)) / sum(max(lengths) * len(lengths) for lengths in found)


def test_rows_are_padded_on_the_right_and_padding_is_no_label():
    tensors = collate([Row((5, 6, 7), 2, 4), Row((8, 9), 1, 0)])
    assert tensors["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert tensors["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert tensors["slots"].tolist() == [4, 0]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("number", [1, 8, 53])
def test_an_epoch_has_every_item_once(number, shuffle):
    loader = batches(items_of([20] * number), shuffle=shuffle)
    found = slots(loader)
    assert len(found) == len(loader) == -(-number // 8)
    assert sorted(slot for batch in found for slot in batch) == list(range(number))
    assert sorted(map(len, found))[1:] == [8] * (len(found) - 1)


def test_the_order_depends_on_seed_and_epoch_alone():
    items = items_of(made_up_lengths(300))
    loader, again = batches(items, seed=5), batches(items, seed=5)
    first = slots(loader)
    loader.set_position(3)
    third = slots(loader)
    again.set_position(3)
    assert slots(again) == third != first != slots(batches(items, seed=6))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in third}


def test_an_epoch_goes_on_at_any_batch():
    loader = batches(items_of(made_up_lengths(60)))
    loader.set_position(2)
    whole = slots(loader)
    for start in (0, 3, len(loader)):
        loader.set_position(2, start)
        assert slots(loader) == whole[start:]
    for epoch, start in ((-1, 0), (0, -1), (0, len(loader) + 1)):
        with pytest.raises(ValueError, match="outside this loader"):
            loader.set_position(epoch, start)


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_processes_share_every_batch(world_size):
    items = items_of(made_up_lengths(21))
    shares = [slots(batches(items, rank=rank, world_size=world_size)) for rank in range(world_size)]
    together = [[slot for part in parts for slot in part] for parts in zip(*shares, strict=True)]
    assert together == slots(batches(items))


def test_in_an_evaluation_the_longest_come_first():
    lengths = [
        batch.tensors["input_ids"].shape[1] for batch in batches(items_of([3, 9, 5] * 20), shuffle=False)
    ]
    assert lengths == sorted(lengths, reverse=True)


def test_without_buckets_much_is_padding():
    lengths = torch.tensor(made_up_lengths(2000)).view(-1, 16)
    assert 1 - lengths.sum() / (lengths.amax(1).sum() * 16) > 2 * MOST_PADDING


@given(
    seed=st.integers(0, 2**32),
    count=st.sampled_from([1, 30, 400]),
    batch_size=st.integers(1, 128),
    middle=st.floats(0.5, 5),
    spread=st.floats(0, 1.5),
)
@settings(max_examples=40, deadline=None)
def test_little_is_padding_whatever_the_lengths_are(seed, count, batch_size, middle, spread):
    """Every item is in one batch, and each epoch has as many batches."""
    draw = random.Random(seed)
    lengths = [2 + int(draw.lognormvariate(middle, spread)) for _ in range(count)]
    items = [Item((Row(range(length), 1, slot),)) for slot, length in enumerate(lengths)]
    for shuffle in (True, False):
        loader = loaded(items, batch_size=batch_size, shuffle=shuffle)
        for epoch in range(2 if shuffle else 1):
            loader.set_position(epoch)
            found = list(loader)
            assert sum(len(b) * max(i.length for i in b) for b in found) * (1 - MOST_PADDING) <= sum(lengths)
            assert sorted(item.rows[0].slot for batch in found for item in batch) == list(range(count))
            assert max(map(len, found)) <= batch_size and len(found) == len(loader)


def test_batches_are_divided_only_where_the_lengths_of_items_differ():
    """The choices of one item have to be compared, so they stay together however long they are."""
    uneven = [Item((Row((1,), 0, 2 * n), Row((1,) * 9, 0, 2 * n + 1))) for n in range(20)]
    assert len(loaded(uneven)) == 3
    assert len(loaded(items_of([4] * 14 + [40, 44]))) == 3  # instead of two, one with the long ones


@pytest.mark.parametrize("form", [ARC_EASY, ARC_CHALLENGE, WINOGRANDE, HELLASWAG], ids=lambda form: form.name)
def test_little_of_real_texts_is_padding(form, shared_dir):
    folder = shared_dir / "data" / "text" / form.name.partition("-")[0].lower()
    if not folder.is_dir():
        pytest.skip(f"no real texts: {folder} does not exist")
    examples = open_text(form, "test", folder=folder).examples[:1000]
    # A token has some four and a half characters.
    answers = items_of([2 + int(len(e.prompt + e.completion) / 4.5) for e in examples])
    choices = [
        Item(tuple(Row((1,) * (2 + int(len(c + t) / 4.5)), 0) for c, t in pairs))
        for pairs in (zip(e.contexts, e.continuations, strict=True) for e in examples)
    ]
    rows = [Item((row,)) for item in choices for row in item.rows]
    alone = padding(choices, batch_size=1)  # what no order of the examples takes away
    bound = max(MOST_PADDING, alone + EVEN_PADDING)
    for batch_size in (8, 64, 128):
        assert padding(answers, batch_size=batch_size) <= MOST_PADDING
        assert padding(choices, batch_size=batch_size) <= bound
        assert padding(rows, batch_size=batch_size, shuffle=False) <= MOST_PADDING


def test_what_each_head_counts():
    rows = [Row((1, 2, 3), 2, 0), Row((1, 2), 1, 1), Row((4,), 0, 2)]
    likelihood = LikelihoodHead().batch([Item((row,)) for row in rows])
    assert likelihood.count == 3 and set(likelihood.tensors) == {"input_ids", "labels", "slots"}
    classes = ClassHead(3).batch([Item((row,), 2) for row in rows])
    assert classes.count == 3 and classes.tensors["answers"].tolist() == [2, 2, 2]
    rated = RatingHead().batch([Item(tuple(rows[:2]), 1), Item(tuple(rows[2:]), 0)])
    assert rated.count == 2 and rated.tensors["choices"].tolist() == [[0, 1], [2, -1]]
    assert LikelihoodHead().batch([]).count == RatingHead().batch([]).count == 0


class Lengths:
    """A model whose outputs (B, C) are the lengths of its rows, and those times 10, and so on."""

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, input_ids, attention_mask):
        return attention_mask.sum(1, keepdim=True).float() ** torch.arange(1, self.outputs + 1)


def test_ratings_are_compared_among_the_choices_of_an_example():
    items = [
        Item((Row((1, 2), 0), Row((1,), 0), Row((1, 2, 3), 0)), 2),
        Item((Row((1,), 0), Row((1, 2), 0)), 0),
    ]
    loss = RatingHead().loss(Lengths(1), RatingHead().batch(items).tensors)
    expected = [torch.tensor([2.0, 1, 3]).log_softmax(0)[2], torch.tensor([1.0, 2]).log_softmax(0)[0]]
    assert torch.allclose(loss, -sum(expected))


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluations_of_heads_come_from_any_batches_and_processes(world_size):
    examples = [Example.question("x", "ab", answer) for answer in (0, 1, 1)]
    for head in (ClassHead(2), RatingHead()):
        rows = [Row((1,) * n, 0, slot) for slot, n in enumerate([2, 3, 1, 2, 3, 1])]
        if isinstance(head, ClassHead):
            items = [Item((rows[slot],)) for slot in (0, 2, 4)]
        else:
            items = [Item((row,)) for row in rows]
        tally = head.tally(examples, items, True)
        for rank in range(world_size):
            part = head.tally(examples, items, True)
            for batch in batches(items, head, batch_size=2, rank=rank, world_size=world_size):
                if batch.count:
                    part.add(Lengths(head.outputs), batch.tensors)
            for name, total in tally.totals.items():
                total += part.totals[name]
        found = tally.evaluation()
        by_class, rated = [(2, 4), (1, 1), (3, 9)], [(2, 3), (1, 2), (3, 1)]
        values = by_class if isinstance(head, ClassHead) else rated
        assert [judged.log_likelihoods for judged in found.judged] == values
        hits = [max(range(2), key=lambda i: v[i]) == e.answer for v, e in zip(values, examples, strict=True)]
        assert found.scores == {"acc": pytest.approx(100 * sum(hits) / 3), "acc_norm": None}
        losses = [
            -torch.tensor(v).double().log_softmax(0)[e.answer] for v, e in zip(values, examples, strict=True)
        ]
        assert found.loss == pytest.approx(float(sum(losses)) / 3) and found.count == 3
