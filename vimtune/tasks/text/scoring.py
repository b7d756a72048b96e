"""Scores of language tasks: which choice is the likeliest, as lm-evaluation-harness 0.4.13 decides it.

Shape letters: B rows, L tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vimtune.data.text import Example
from vimtune.ops.cross_entropy import IGNORED
from vimtune.tasks.job import Evaluation, Forward, Tally, Tensors
from vimtune.tasks.text.tokens import slots_of


def row_losses(forward: Forward, tensors: Tensors) -> Tensor:
    """Minus the log-likelihood of the labelled tokens of each row, (B,) in fp32.

    The model computes it, within its own forward pass and in chunks of tokens: the logits of all tokens would
    be many times as large as everything else.

    Args:
        forward: calls a `SequenceScorer`.
        tensors: "input_ids" (B, L) and "labels" (B, L), which are `IGNORED` where nothing is predicted; the
            token at t is predicted from those before it. "places" (T,) are the numbers of the predicted
            tokens when those of all rows are counted together, and any number of zeros.
    """
    losses: Tensor = forward(tensors["input_ids"], labels=tensors["labels"], places=tensors["places"])
    return losses


def head_outputs(forward: Forward, tensors: Tensors) -> Tensor:
    """What a classification head says of each row, (B, C) in fp32.

    Args:
        forward: calls the model.
        tensors: "input_ids" (B, L), and "attention_mask" (B, L), which is 0 for padding.
    """
    outputs: Tensor = forward(tensors["input_ids"], attention_mask=tensors["attention_mask"])
    return outputs.float()


@dataclass(frozen=True)
class Judged:
    """What a model says about the choices of one example."""

    log_likelihoods: tuple[float, ...]
    """Of each choice. A model with a classification head gives its scores instead."""
    answer: int
    """Index of the right choice."""
    predicted: int
    """Index of the likeliest one; of equal ones the first."""
    predicted_per_character: int | None
    """The same where likelihoods are divided by the numbers of characters; None where they are not."""


@dataclass(frozen=True)
class TextEvaluation(Evaluation):
    """Scores over all examples of a split."""

    judged: tuple[Judged, ...]
    """Example by example, in the order of the split."""


def best(values: Sequence[float]) -> int:
    """Index of the largest value; of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)


def per_character(log_likelihoods: Sequence[float], choices: Sequence[str]) -> list[float]:
    """Log-likelihoods divided by the characters of the choices; a choice without any comes last."""
    lengths = map(len, choices)
    return [
        value / length if length else -float("inf")
        for value, length in zip(log_likelihoods, lengths, strict=True)
    ]


def judge(example: Example, values: Sequence[float], characters: bool) -> Judged:
    """The verdict on one example.

    Args:
        example: the question.
        values: the log-likelihood of each choice.
        characters: whether likelihoods per character are compared as well.
    """
    second = best(per_character(values, example.choices)) if characters else None
    return Judged(tuple(values), example.answer, best(values), second)


def _accuracy(hits: Sequence[bool]) -> float:
    """Percent of the examples that were answered right."""
    return 100.0 * sum(hits) / max(1, len(hits))


class ChoiceTally(Tally):
    """Notes what a model says about every choice of a split, wherever it is computed.

    Rows are noted by slot, so that the choices of one example may be in different batches and processes:
    batches are then made of rows of one length.
    """

    def __init__(self, examples: Sequence[Example], expected: Sequence[int], characters: bool) -> None:
        """An empty tally.

        Args:
            examples: those of the split.
            expected: how many rows belong to each of the slots (`slots_of`); every one is counted once.
            characters: whether likelihoods per character are compared as well.
        """
        self.examples, self.characters = examples, characters
        self.slots = slots_of(examples)
        self._expected = torch.tensor(expected)
        count = len(expected)
        self.totals = {
            "values": torch.zeros(count, dtype=torch.float64),
            "tokens": torch.zeros(count, dtype=torch.int64),
            "rows": torch.zeros(count, dtype=torch.int64),
        }

    def count(self, judged: Tensors) -> None:
        """Add each of "values" (B,) to its slot, one of "slots" (B,)."""
        slots = judged["slots"]
        self.totals["values"].index_add_(0, slots, judged["values"].double())
        self.totals["rows"].index_add_(0, slots, torch.ones_like(slots))

    def judged(self) -> tuple[Judged, ...]:
        """The verdict on every example."""
        assert torch.equal(self.totals["rows"], self._expected), "an evaluation scores every row exactly once"
        values = self.totals["values"].tolist()
        return tuple(
            judge(example, values[slots.start : slots.stop], self.characters)
            for example, slots in zip(self.examples, self.slots, strict=True)
        )

    def scores(self, judged: Sequence[Judged]) -> dict[str, float | None]:
        """Accuracies in percent; None for those that these data do not have."""
        if any(len(each.log_likelihoods) == 1 for each in judged):
            return {"acc": None, "acc_norm": None}  # with one choice there is nothing to choose
        norm = [each.predicted_per_character == each.answer for each in judged]
        return {
            "acc": _accuracy([each.predicted == each.answer for each in judged]),
            "acc_norm": _accuracy(norm) if self.characters else None,
        }


class LikelihoodTally(ChoiceTally):
    """Sums the log-likelihoods of the tokens of every choice."""

    def judge(self, forward: Forward, tensors: Tensors) -> Tensors:
        """Score the rows that `row_losses` reads; "slots" (B,) say where they belong."""
        tokens = (tensors["labels"] != IGNORED).sum(1)
        values = -row_losses(forward, tensors).detach()
        return {"values": values, "tokens": tokens, "slots": tensors["slots"]}

    def count(self, judged: Tensors) -> None:
        """Add log-likelihoods, and the number of tokens that they are made of."""
        super().count(judged)
        self.totals["tokens"].index_add_(0, judged["slots"], judged["tokens"])

    def evaluation(self) -> TextEvaluation:
        """Accuracies, and the loss of the right answers per token."""
        judged = self.judged()
        right = [slots[example.answer] for slots, example in zip(self.slots, self.examples, strict=True)]
        loss = -float(self.totals["values"][right].sum())
        tokens = int(self.totals["tokens"][right].sum())
        return TextEvaluation(loss / max(1, tokens), self.scores(judged), len(judged), judged)


class HeadTally(ChoiceTally):
    """Notes what a classification head says of every choice."""

    def judge(self, forward: Forward, tensors: Tensors) -> Tensors:
        """Score the rows of a batch: outputs (B, C).

        Args:
            forward: calls the model.
            tensors: those that `head_outputs` reads, and "slots" (B,): where the first output of each row
                belongs. The others follow it.
        """
        outputs = head_outputs(forward, tensors)
        slots = tensors["slots"][:, None] + torch.arange(outputs.shape[1], device=outputs.device)
        return {"values": outputs.detach().flatten(), "slots": slots.flatten()}

    def evaluation(self) -> TextEvaluation:
        """Accuracy, and the cross entropy of the right choice per example."""
        judged = self.judged()
        values = [torch.tensor(each.log_likelihoods, dtype=torch.float64) for each in judged]
        loss = -sum(float(v.log_softmax(0)[each.answer]) for v, each in zip(values, judged, strict=True))
        return TextEvaluation(loss / max(1, len(judged)), self.scores(judged), len(judged), judged)
