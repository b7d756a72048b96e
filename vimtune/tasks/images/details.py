"""What an evaluation of images says beyond its scores."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.data import ImageDataset
from vimtune.tasks.classes.calibration import HELD_OUT, Temperature, temperature_of
from vimtune.tasks.classes.details import ClassDetails, Examples
from vimtune.tasks.images.scoring import ImageEvaluation
from vimtune.tasks.job import Evaluation
from vimtune.text import counted


def unread_notes(dataset: ImageDataset, evaluation: Evaluation) -> list[str]:
    """What has to be said of the images of a data set that an evaluation of it has left out."""
    whole = len(dataset)
    unread = whole - evaluation.count
    return [f"Left out because they cannot be decoded: {unread:,} of {whole:,} images."] if unread else []


def image_details(
    dataset: ImageDataset,
    evaluation: Evaluation,
    held_out: Evaluation | None,
    held_out_note: str,
    notes: Sequence[str] = (),
) -> ClassDetails:
    """The details of an evaluation.

    Args:
        dataset: the images that were scored.
        evaluation: of these.
        held_out: of the validation split, to which a temperature is fitted.
        held_out_note: why there is none, or what was left out of it.
        notes: what a reader has to know of the images.
    """
    assert isinstance(evaluation, ImageEvaluation)
    temperature = Temperature(None, held_out_note)
    if held_out is not None:
        assert isinstance(held_out, ImageEvaluation)
        questions = held_out.answers.questions
        count = counted(held_out.count, "images")
        temperature = temperature_of(questions, HELD_OUT, count, dataset.split, held_out_note)
    examples = Examples("path", "images", dataset.describe, dataset.load)
    notes = [*notes, *unread_notes(dataset, evaluation)]
    answers = evaluation.answers
    return ClassDetails(answers, dataset.classes, dataset.split, examples, temperature, notes=notes)
