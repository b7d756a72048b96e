"""What an evaluation of images says beyond its scores."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.data import ImageDataset
from vimtune.tasks.classes.details import HELD_OUT, ClassDetails, Examples, Temperature, temperature_of
from vimtune.tasks.images.scoring import ImageEvaluation
from vimtune.tasks.job import Evaluation


def image_details(
    dataset: ImageDataset,
    evaluation: Evaluation,
    held_out: Evaluation | None,
    no_temperature: str,
    notes: Sequence[str] = (),
) -> ClassDetails:
    """The details of an evaluation.

    Args:
        dataset: the images that were scored.
        evaluation: of these.
        held_out: of the validation split, to which a temperature is fitted.
        no_temperature: why there is none.
        notes: what a reader has to know of the images.
    """
    assert isinstance(evaluation, ImageEvaluation)
    temperature = Temperature(None, no_temperature)
    if held_out is not None:
        assert isinstance(held_out, ImageEvaluation)
        temperature = temperature_of(held_out.answers, HELD_OUT, "images", dataset.split)
    examples = Examples("path", "images", dataset.describe, dataset.load)
    whole = len(dataset)
    if unread := whole - evaluation.count:
        notes = [*notes, f"Left out because they cannot be decoded: {unread:,} of {whole:,} images."]
    return ClassDetails(evaluation.answers, dataset.classes, dataset.split, examples, temperature, notes)
