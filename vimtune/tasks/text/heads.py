"""The two kinds of models of language tasks: one that predicts tokens, and one with a classification head.

Each kind has its own sequences, loss and tally. Shape letters: B rows, L tokens, C classes or choices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.data.text import Example
from vimtune.ops.cross_entropy import IGNORED
from vimtune.tasks.job import Batch, Forward, Tensors
from vimtune.tasks.text.batches import AS_IT_IS, Size, collate
from vimtune.tasks.text.scoring import (
    ChoiceTally,
    HeadTally,
    LikelihoodTally,
    head_outputs,
    row_losses,
)
from vimtune.tasks.text.tokens import Encoder, Item, slots_of


class Head(ABC):
    """What is asked of a model, and how its answers are judged."""

    outputs: int | None = None
    """How many outputs the classification head has; None for a model that predicts tokens."""

    @abstractmethod
    def training_items(self, encoder: Encoder, examples: Sequence[Example]) -> list[Item]:
        """What is trained on."""

    @abstractmethod
    def scoring_items(self, encoder: Encoder, examples: Sequence[Example]) -> list[Item]:
        """What is scored."""

    @abstractmethod
    def batch(self, items: Sequence[Item], size: Size = AS_IT_IS) -> Batch:
        """The batch of some items, padded to `size`: neither its loss nor its count depends on that."""

    @abstractmethod
    def count(self, item: Item) -> int:
        """How much an item adds to the count of its batch."""

    @abstractmethod
    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """Loss of a training batch, a scalar, summed over what `batch` counts."""

    @abstractmethod
    def tally(self, examples: Sequence[Example], items: Sequence[Item], characters: bool) -> ChoiceTally:
        """An empty tally for the evaluation of `items`, the `scoring_items` of `examples`."""


class LikelihoodHead(Head):
    """The language model itself: the likeliest choice is its answer. Losses are counted by token."""

    def training_items(self, encoder: Encoder, examples: Sequence[Example]) -> list[Item]:
        """The prompts with their answers."""
        return [Item((row,)) for row in encoder.training(examples)]

    def scoring_items(self, encoder: Encoder, examples: Sequence[Example]) -> list[Item]:
        """Every choice after its context."""
        return [Item((row,)) for row in encoder.choices(examples)]

    def batch(self, items: Sequence[Item], size: Size = AS_IT_IS) -> Batch:
        """Tensors "input_ids", "labels" (B, L), "slots" (B,) and "places" (T,), where labels are; labelled
        tokens are counted."""
        tensors = collate([row for item in items for row in item.rows], size)
        del tensors["attention_mask"]  # what is padded on the right is seen by no token
        places = (tensors["labels"].flatten() != IGNORED).nonzero()[:, 0]
        tensors["places"] = F.pad(places, (0, max(0, size.scored - len(places))))
        return Batch(tensors, sum(map(self.count, items)))

    def count(self, item: Item) -> int:
        """Labelled tokens."""
        return sum(row.scored for row in item.rows)

    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """Minus the log-likelihood of the labelled tokens."""
        return row_losses(forward, tensors).sum()

    def tally(self, examples: Sequence[Example], items: Sequence[Item], characters: bool) -> ChoiceTally:
        """An empty tally of log-likelihoods."""
        return LikelihoodTally(examples, _rows_per_slot(examples, items), characters)


class ClassifierHead(Head):
    """A linear head on pooled features. Losses are counted by example."""

    def batch(self, items: Sequence[Item], size: Size = AS_IT_IS) -> Batch:
        """Tensors "input_ids", "attention_mask" (B, L), "slots" (B,) and "answers" (items,)."""
        tensors = collate([row for item in items for row in item.rows], size)
        del tensors["labels"]
        tensors["answers"] = torch.tensor([item.answer for item in items], dtype=torch.int64)
        return Batch(tensors, sum(map(self.count, items)))

    def count(self, item: Item) -> int:
        """One example."""
        return 1


class ClassHead(ClassifierHead):
    """One output for each class, where all examples have the same choices: what class has the text?"""

    def __init__(self, num_classes: int) -> None:
        self.outputs = num_classes

    def training_items(self, encoder: Encoder, examples: Sequence[Example]) -> list[Item]:
        """The texts."""
        rows = encoder.questions(examples)
        return [Item((row,), example.answer) for row, example in zip(rows, examples, strict=True)]

    def scoring_items(self, encoder: Encoder, examples: Sequence[Example]) -> list[Item]:
        """The texts."""
        return self.training_items(encoder, examples)

    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """Cross entropy of the classes. Rows that fill up a batch come last and have no answer."""
        answers = tensors["answers"]
        return F.cross_entropy(head_outputs(forward, tensors)[: len(answers)], answers, reduction="sum")

    def tally(self, examples: Sequence[Example], items: Sequence[Item], characters: bool) -> ChoiceTally:
        """An empty tally of outputs."""
        assert self.outputs is not None
        return HeadTally(examples, [1] * (len(examples) * self.outputs), characters=False)


class RatingHead(ClassifierHead):
    """One output: how well a choice fits its context. The choice that is rated highest is the answer."""

    outputs = 1

    def training_items(self, encoder: Encoder, examples: Sequence[Example]) -> list[Item]:
        """The choices of an example together."""
        rows = encoder.choices(examples)
        first = {row.slot: row for row in reversed(rows)}
        return [
            Item(tuple(first[slot] for slot in slots), example.answer)
            for slots, example in zip(slots_of(examples), examples, strict=True)
        ]

    def scoring_items(self, encoder: Encoder, examples: Sequence[Example]) -> list[Item]:
        """Every choice for itself."""
        return [Item((row,)) for item in self.training_items(encoder, examples) for row in item.rows]

    def batch(self, items: Sequence[Item], size: Size = AS_IT_IS) -> Batch:
        """Also "choices" (items, C): the row of each choice; -1 where an item has fewer."""
        batch = super().batch(items, size)
        most = max([size.choices, *(len(item.rows) for item in items)])
        choices = torch.full((len(items), most), -1)
        start = 0
        for number, item in enumerate(items):
            choices[number, : len(item.rows)] = torch.arange(start, start + len(item.rows))
            start += len(item.rows)
        return Batch({**batch.tensors, "choices": choices}, batch.count)

    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """Cross entropy of the choices."""
        choices = tensors["choices"]
        ratings = head_outputs(forward, tensors)[:, 0][choices.clamp(min=0)]
        ratings = ratings.masked_fill(choices < 0, -torch.inf)
        return F.cross_entropy(ratings, tensors["answers"], reduction="sum")

    def tally(self, examples: Sequence[Example], items: Sequence[Item], characters: bool) -> ChoiceTally:
        """An empty tally of ratings."""
        return HeadTally(examples, _rows_per_slot(examples, items), characters=False)


def _rows_per_slot(examples: Sequence[Example], items: Sequence[Item]) -> list[int]:
    """How many rows belong to the slot of each choice."""
    counts = Counter(row.slot for item in items for row in item.rows)
    return [counts[slot] for slots in slots_of(examples) for slot in slots]
