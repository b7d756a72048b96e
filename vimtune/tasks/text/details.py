"""What an evaluation of texts says beyond its scores: where all texts have the same classes that of any
classifier, else its mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vimtune.data.text import TextSplit
from vimtune.pages.section import Section, Table
from vimtune.tasks.classes.answers import ClassAnswers, answers_of
from vimtune.tasks.classes.calibration import HELD_OUT, Temperature, temperature_of
from vimtune.tasks.classes.details import WORST, ClassDetails, Examples
from vimtune.tasks.classes.page import MAX_TEXT
from vimtune.tasks.details import Details
from vimtune.tasks.job import Evaluation
from vimtune.tasks.text.scoring import Judged, TextEvaluation
from vimtune.text import counted, shorten


def text_details(
    split: TextSplit,
    evaluation: Evaluation,
    held_out: Evaluation | None,
    held_out_note: str,
    notes: Sequence[str] = (),
) -> Details:
    """The details of an evaluation.

    Args:
        split: the texts that were scored.
        evaluation: of these.
        held_out: of the validation split, to which a temperature is fitted where texts have classes.
        held_out_note: why there is none, or what was left out of it.
        notes: what a reader has to know of the texts.
    """
    assert isinstance(evaluation, TextEvaluation)
    if split.classes:
        temperature = Temperature(None, held_out_note)
        if held_out is not None:
            questions, count = class_answers(held_out).questions, counted(held_out.count, "texts")
            temperature = temperature_of(questions, HELD_OUT, count, split.name, held_out_note)
        examples = Examples(
            "text", "texts", lambda index: split.examples[index].contexts[0], share="accuracy"
        )
        answers = class_answers(evaluation)
        return ClassDetails(answers, split.classes, split.name, examples, temperature, notes=notes)
    if any(len(example.choices) < 2 for example in split.examples):
        return Details(notes=notes)
    return ChoiceDetails(split, evaluation.judged, notes=notes)


def class_answers(evaluation: Evaluation) -> ClassAnswers:
    """The answers to texts that have the same classes. What a head says of them, or their log-likelihoods,
    are the logits."""
    assert isinstance(evaluation, TextEvaluation)
    logits = torch.tensor([judged.log_likelihoods for judged in evaluation.judged])
    return answers_of(logits, torch.tensor([judged.answer for judged in evaluation.judged]))


@dataclass(frozen=True)
class ChoiceDetails(Details):
    """The wrong answers to questions of which each has its own choices."""

    split: TextSplit
    """The questions."""
    judged: Sequence[Judged]
    """What was said of each."""

    def mistake_columns(self) -> tuple[str, ...]:
        """The question, the two choices, and how far they lie apart."""
        return ("text", "true", "predicted", "margin")

    def mistakes(self) -> list[dict[str, Any]]:
        """Every wrong answer: the question, the right choice, the likeliest one, and by how much the latter's
        log-likelihood is higher."""
        wrong = [
            (
                example.contexts[0],
                example.choices[own.answer],
                example.choices[own.predicted],
                own.log_likelihoods[own.predicted] - own.log_likelihoods[own.answer],
            )
            for example, own in zip(self.split.examples, self.judged, strict=True)
            if own.predicted != own.answer
        ]
        rows = [dict(zip(self.mistake_columns(), values, strict=True)) for values in wrong]
        return sorted(rows, key=lambda row: -row["margin"])

    def sections(self, drawn: Path | None = None) -> dict[str, Section]:
        """ "mistakes": the worst ones."""
        del drawn
        wrong = self.mistakes()
        names = ("text", "predicted", "true")
        rows = [
            [*(shorten(row[n], MAX_TEXT) for n in names), f"{row['margin']:.2f}"] for row in wrong[:WORST]
        ]
        return {
            "mistakes": Section(
                title="The worst mistakes",
                explanation="Questions whose likeliest choice is wrong, those first in which its "
                "log-likelihood lies highest above that of the right one.",
                findings=[
                    f"{len(wrong):,} of {len(self.judged):,} questions have a wrong answer.",
                    *self.notes,
                ],
                numbers={},
                tables=[Table("The worst mistakes", ["text", "answer", "is", "margin"], rows)]
                if rows
                else [],
            )
        }
