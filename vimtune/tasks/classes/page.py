"""The page of an evaluation of a classifier: scores, mistakes, confusions, classes, calibration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from vimtune.metrics.classes import macro_f1
from vimtune.pages.section import Photo, Picture, Section, Table
from vimtune.tasks.classes.confusion import CONFUSION_PICTURE, confusion_title, draw_confusion_matrix
from vimtune.tasks.classes.details import CONFUSED, MAX_NAME, WORST, ClassDetails
from vimtune.tasks.classes.reliability import CLASSES, calibration_section
from vimtune.text import shorten

MAX_TEXT = 200
"""Characters of a text in the table of mistakes."""


def class_sections(details: ClassDetails, drawn: Path | None) -> dict[str, Section]:
    """The page below its facts; the arguments are those of `Details.sections`."""
    return {
        "scores": _score_section(details),
        "mistakes": _mistake_section(details),
        "confusions": _confusion_section(details, drawn),
        "classes": _class_section(details),
        "calibration": calibration_section(details.calibration, CLASSES),
    }


def _score_section(details: ClassDetails) -> Section:
    count, right = len(details.answers), int(details.answers.right.sum())
    share = 100.0 * right / max(1, count)
    f1 = macro_f1(details.by_class)
    of = "" if f1 is None else f" Macro F1 is {f1:.2f} %."
    plural, name = details.examples.plural, details.examples.share
    return Section(
        title="Scores",
        explanation=f"{name.capitalize()} is the share of right answers. F1 of a class is the harmonic mean "
        "of its precision and its recall, and macro F1 the mean over the classes, in which a small class "
        "counts as much as a large one. Classes that nothing is of and nothing was taken for do not count.",
        findings=[f"Of {count:,} {plural} {right:,} are right: {name} is {share:.2f} %.{of}", *details.notes],
        numbers={},
    )


def _mistake_section(details: ClassDetails) -> Section:
    worst = [(details.mistake(place), int(details.answers.indices[place])) for place in details.wrong[:WORST]]
    load, key = details.examples.load, details.examples.key
    photos, rows = [], []
    for row, index in worst:
        said = f"{shorten(row['predicted'], MAX_NAME)} {100 * row['probability']:.0f}\N{NO-BREAK SPACE}%"
        share = 100 * row["true_probability"]
        true = f"{shorten(row['true'], MAX_NAME)} {share:.1f}\N{NO-BREAK SPACE}%"
        if load is not None:
            photos.append(Photo(partial(load, index), [said, f"is {true}"], row[key]))
        else:
            rows.append([shorten(row[key], MAX_TEXT), said, true])
    count, plural = len(details.wrong), details.examples.plural
    table = Table("The worst mistakes", ["text", "answer", "is"], rows)
    return Section(
        title="The worst mistakes",
        explanation="Wrong answers, those first in which the true class has the lowest probability. "
        "Below each stand the answer with its probability, and the true class with the probability that "
        "the model gave it. Such a list shows wrong labels, too.",
        findings=[
            f"{count:,} of {len(details.answers):,} {plural} have a wrong answer"
            + (f"; {len(worst)} of them are shown." if len(worst) < count else ".")
        ],
        numbers={},
        photos=photos,
        tables=[table] if rows else [],
    )


def _confusion_section(details: ClassDetails, drawn: Path | None) -> Section:
    confusion, plural = details.answers.confusion, details.examples.plural
    title = confusion_title(confusion, details.split, plural)
    if drawn is None:
        figure: Any = draw_confusion_matrix(confusion, details.classes, title, "class by class")
    else:
        figure = drawn / CONFUSION_PICTURE
    first = next(iter(details.confused), None)
    return Section(
        title="What is taken for what",
        explanation=f"Rows are true classes, columns are answers; a cell has the share of the {plural} "
        "of its row. All that is right lies on the diagonal.",
        findings=["Nothing is taken for anything else."]
        if first is None
        else [
            f"Most often {details.short_name(first.true)} is taken for "
            f"{details.short_name(first.answer)}: {first.count} of {first.of} times."
        ],
        numbers={},
        pictures=[Picture("The confusion matrix.", figure)],
        tables=[
            Table(
                f"The most confused pairs, at most {CONFUSED}",
                ["true class", "answer", plural, "of"],
                [
                    [
                        details.short_name(pair.true),
                        details.short_name(pair.answer),
                        f"{pair.count:,}",
                        f"{pair.of:,}",
                    ]
                    for pair in details.confused
                ],
            )
        ]
        if details.confused
        else [],
    )


def _class_section(details: ClassDetails) -> Section:
    numbered = enumerate(zip(details.classes, details.by_class, strict=True))
    rows = sorted(numbered, key=lambda row: (row[1][1].f1 is None, row[1][1].f1 or 0.0))
    empty, plural = sum(own.examples == 0 for own in details.by_class), details.examples.plural
    weakest = [f"{shorten(name, MAX_NAME)} ({_percent(own.f1)})" for _, (name, own) in rows[:3]]
    return Section(
        title="Class by class",
        explanation=f"Precision is the share that is right of the {plural} that were taken "
        "for a class, recall the share that is right of those that are of it.",
        findings=[
            f"The lowest F1 have {', '.join(weakest)}.",
            *([f"Of {len(rows):,} classes {empty:,} have no {plural}."] if empty else []),
        ],
        numbers={},
        tables=[
            Table(
                "The weakest class first",
                ["class", "number", plural, "answers", "precision", "recall", "F1"],
                [
                    [
                        shorten(name, MAX_NAME),
                        str(number),
                        f"{own.examples:,}",
                        f"{own.answers:,}",
                        *map(_percent, (own.precision, own.recall, own.f1)),
                    ]
                    for number, (name, own) in rows
                ],
            )
        ],
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
