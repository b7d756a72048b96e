"""Batches of texts: whole, in an order by seed and epoch, divided over processes, with little padding."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from vimtune.data.text import ARC_CHALLENGE, ARC_EASY, WINOGRANDE, Example, open_text
from vimtune.language import create_language_model, pooled_classifier
from vimtune.ops.cross_entropy import IGNORED
from vimtune.tasks.text.batches import Size, TextBatches, collate
from vimtune.tasks.text.heads import ClassHead, LikelihoodHead, RatingHead
from vimtune.tasks.text.lengths import FEW_BATCHES, MOST_PADDING, MOST_SHAPES, group_by_length
from vimtune.tasks.text.models import SequenceScorer
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


def padding(items, head=None, **options):
    cells = sum(batch.tensors["input_ids"].numel() for batch in batches(items, head, **options))
    return 1 - sum(len(row.tokens) for item in items for row in item.rows) / cells


def test_rows_are_padded_on_the_right_and_padding_is_no_label():
    tensors = collate([Row((5, 6, 7), 2, 4), Row((8, 9), 1, 0)])
    assert tensors["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert tensors["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert tensors["slots"].tolist() == [4, 0]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("number", [1, 8, 53])
def test_an_epoch_has_every_item_once(number, shuffle):
    loader = batches(items_of(made_up_lengths(number)), shuffle=shuffle)
    found = slots(loader)
    assert len(found) == len(loader) >= -(-number // 8)
    assert sorted(slot for batch in found for slot in batch) == list(range(number))
    assert max(map(len, found)) <= 8
    loader.set_position(1)
    assert sorted(map(len, slots(loader))) == sorted(map(len, found))


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


@pytest.mark.parametrize("batch_size", [4, 16, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_little_is_padding(batch_size, shuffle):
    items = items_of(made_up_lengths(2000))
    assert padding(items, batch_size=batch_size, shuffle=shuffle) <= MOST_PADDING
    shuffled = torch.tensor(made_up_lengths(2000)).view(-1, batch_size) if 2000 % batch_size == 0 else None
    if shuffled is not None:  # without buckets it would be much more
        assert 1 - shuffled.sum() / (shuffled.amax(1).sum() * batch_size) > 2 * MOST_PADDING


@pytest.mark.parametrize("form", [ARC_EASY, ARC_CHALLENGE, WINOGRANDE], ids=lambda form: form.name)
def test_little_of_real_texts_is_padding(form, shared_dir):
    folder = shared_dir / "data" / "text" / form.name.partition("-")[0].lower()
    if not folder.is_dir():
        pytest.skip(f"no real texts: {folder} does not exist")
    for split, shuffle in (("train", True), ("test", False)):
        # A token has some four and a half characters.
        examples = open_text(form, split, folder=folder).examples
        texts = (
            [e.prompt + e.completion for e in examples]
            if shuffle
            else [c + t for e in examples for c, t in zip(e.contexts, e.continuations, strict=True)]
        )
        items = items_of([2 + int(len(text) / 4.5) for text in texts])
        for batch_size in (4, 128):
            assert padding(items, batch_size=batch_size, shuffle=shuffle) <= MOST_PADDING


# --- groups, and padding to few shapes ------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200), batch_size=st.integers(1, 40))
def test_groups_are_as_few_as_padding_allows(lengths, batch_size):
    groups = group_by_length(items_of(lengths), batch_size)
    assert sum(group.items for group in groups) == len(lengths)
    ordered = sorted(lengths, reverse=True)
    start = 0
    for group in groups:
        assert group.length == ordered[start] and group.rows == group.items
        assert group.batch_size <= batch_size and group.items % group.batch_size == 0
        start += group.items
    whole = -(-len(lengths) // batch_size)
    number = sum(group.items // group.batch_size for group in groups)
    assert number == whole or number > whole > FEW_BATCHES
    padded = sum(group.length * group.items for group in groups)
    assert len(groups) <= MOST_SHAPES or number > whole
    if whole > FEW_BATCHES and (len(groups) < MOST_SHAPES or number > whole):
        assert 1 - sum(lengths) / padded <= MOST_PADDING


def rated_items(lengths):
    """Items of one to four choices, mostly four, whose rows differ in length."""
    return [
        Item(
            tuple(Row(tuple(range(1, 1 + n + more)), 1, 4 * i + more) for more in range(4 - (i % 9 == 0))), 0
        )
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    "head", [LikelihoodHead(), ClassHead(2), RatingHead()], ids=lambda h: type(h).__name__
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_few_shapes_hold_the_same_batches(head, world_size):
    lengths = made_up_lengths(301)
    items = rated_items(lengths) if isinstance(head, RatingHead) else items_of(lengths)
    for rank in range(world_size):
        plain, padded = (batches(items, head, rank=rank, world_size=world_size) for _ in range(2))
        padded.pad_to_few_shapes()
        shapes = Counter()
        for epoch in range(3):
            plain.set_position(epoch)
            padded.set_position(epoch)
            for one, other in zip(plain, padded, strict=True):
                assert one.count == other.count
                if one.count:
                    assert_padded(one.tensors, other.tensors)
                    shapes[tuple(tensor.shape for tensor in other.tensors.values())] += 1
        usual = sum(number for _, number in shapes.most_common(MOST_SHAPES))
        assert usual >= 0.95 * shapes.total() and len(shapes) <= 2 * MOST_SHAPES


def assert_padded(plain, padded):
    """What one batch holds is where it was in the other, and nothing beside it counts."""
    rows, length = plain["input_ids"].shape
    outside = torch.ones_like(padded["input_ids"], dtype=torch.bool)
    outside[:rows, :length] = False
    for name, value in (("input_ids", 0), ("attention_mask", None), ("labels", IGNORED)):
        if name in plain:
            assert torch.equal(padded[name][:rows, :length], plain[name])
            if value is not None:
                assert (padded[name][outside] == value).all()
    if "attention_mask" in plain:
        assert (padded["attention_mask"][:rows, length:] == 0).all()
        assert (padded["attention_mask"][rows:].sum(1) == 1).all()
    if "places" in plain:
        scored = padded["labels"].flatten()[padded["places"]]
        assert torch.equal(scored[: len(plain["places"])], plain["labels"].flatten()[plain["places"]])
        assert (padded["places"][len(plain["places"]) :] == 0).all()
    if "choices" in plain:
        assert torch.equal(padded["choices"][:, : plain["choices"].shape[1]], plain["choices"])
        assert (padded["choices"][:, plain["choices"].shape[1] :] == -1).all()
    if "answers" in plain:
        assert torch.equal(padded["answers"], plain["answers"])


def test_the_largest_batch_comes_first():
    loader = batches(items_of(made_up_lengths(100)))
    loader.pad_to_few_shapes()
    cells = [batch.tensors["input_ids"].numel() for batch in loader]
    assert cells[0] == max(cells) and cells != sorted(cells, reverse=True)


@pytest.mark.parametrize("form", [ARC_EASY, ARC_CHALLENGE, WINOGRANDE], ids=lambda form: form.name)
def test_few_shapes_cost_little_padding(form, shared_dir):
    folder = shared_dir / "data" / "text" / form.name.partition("-")[0].lower()
    if not folder.is_dir():
        pytest.skip(f"no real texts: {folder} does not exist")
    examples = open_text(form, "train", folder=folder).examples
    items = items_of([2 + int(len(e.prompt + e.completion) / 4.5) for e in examples])
    for batch_size in (4, 64):
        loader = batches(items, batch_size=batch_size)
        loader.pad_to_few_shapes()
        shapes = [tuple(batch.tensors["input_ids"].shape) for batch in loader]
        assert len(set(shapes)) <= MOST_SHAPES
        tokens = sum(len(item.rows[0].tokens) for item in items)
        assert 1 - tokens / sum(rows * length for rows, length in shapes) <= MOST_PADDING


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_loss_and_gradients_do_not_depend_on_padding(family, pooling):
    rows = [Row((3, 4, 5, 6), 2, 0), Row((7, 8), 1, 1), Row((9, 1, 2), 1, 2)]
    language = create_language_model(f"{family}_tiny", pretrained=False)
    cases = [
        (LikelihoodHead(), SequenceScorer(language), [Item((row,)) for row in rows]),
        (ClassHead(3), pooled_classifier(language, 3, pooling), [Item((row,), 2) for row in rows]),
        (
            RatingHead(),
            pooled_classifier(language, 1, pooling),
            [Item(tuple(rows[:2]), 1), Item((rows[2],), 0)],
        ),
    ]
    for head, model, items in cases:
        results = []
        for size in (Size(), Size(rows=5, length=9, scored=8, choices=4)):
            model.zero_grad()
            loss = head.loss(model, head.batch(items, size).tensors)
            loss.backward()
            results.append(
                [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            )
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_what_each_head_counts():
    rows = [Row((1, 2, 3), 2, 0), Row((1, 2), 1, 1), Row((4,), 0, 2)]
    likelihood = LikelihoodHead().batch([Item((row,)) for row in rows])
    assert likelihood.count == 3 and set(likelihood.tensors) == {"input_ids", "labels", "slots", "places"}
    assert likelihood.tensors["places"].tolist() == [1, 2, 4]
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
