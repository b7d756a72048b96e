"""What the differences between methods say to the questions that the comparisons were made for.

A question is answered by comparisons of two methods each, in the order in which they are asked. A method may
be a pattern such as "*+*", which stands for every method of the file that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import evidence
from evidence import NONE, Run, Scores
from markdown_tables import write_table

DECIDED = 2.0
"""Standard errors from which on a difference is taken for one."""


@dataclass(frozen=True)
class Question:
    """A question, with the comparisons that answer it."""

    text: str
    """What is asked."""
    comparisons: tuple[tuple[str, str, str], ...]
    """Name of a file, a method, and that with which it is compared."""


def _of_prodial(
    text: str, rows_at_budget: str, row_of_ablation: str, *others: tuple[str, str, str]
) -> Question:
    """Whether ProDiaL, as it is by default and as it was before, is better than another method; with `others`
    that answer the same."""
    return Question(
        text,
        (
            *(("native", name, rows_at_budget) for name in ("prodial", "prodial_free")),
            *(("budget", name, rows_at_budget) for name in ("prodial", "prodial_free")),
            *(("ablation", name, row_of_ablation) for name in ("exp", "free")),
            *others,
        ),
    )


FORMS = (
    *("free", "third", "slow", "slower", "unscaled", "unscaled_slow", "block1_slow", "block16_slow"),
    *("decayed", "diagonal", "rank32_slow"),
)
"""Rows of the ablation that are ProDiaL in another form."""

QUESTIONS = (
    _of_prodial(
        "Does ProDiaL beat LoRA?",
        "lora",
        "lora",
        # There LoRA is called by its places.
        ("compositions", "prodial_block1", "projectors"),
        ("compositions", "prodial_block1_unscaled", "projectors"),
    ),
    _of_prodial("Does ProDiaL beat DoRA?", "dora", "dora"),
    _of_prodial("Does our ProDiaL beat the formula of the published code?", "prodial_paper", "paper"),
    Question(
        "Which form of ProDiaL beats its default?",
        (
            ("native", "prodial_free", "prodial"),
            ("budget", "prodial_free", "prodial"),
            *(("ablation", name, "exp") for name in FORMS),
        ),
    ),
    Question(
        "Is it better to tune the projectors than the scan, with the same budget?",
        tuple(("compositions", "projectors", name) for name in ("scan", "x_proj", "dt_proj", "A")),
    ),
    Question(
        "Is it better to tune the projectors than any other group of parameters?",
        tuple(
            ("components", "projectors", name)
            for name in ("ssm", "convolution", "D", "norms", "embedding", "linear")
        ),
    ),
    Question(
        "Which compositions pay, against LoRA at the projectors with the whole budget?",
        (("compositions", "*+*", "projectors"),),
    ),
)
"""What is asked of the files of results."""


def verdicts() -> str:
    """A section with a table for each question of which something is known; empty where nothing is."""
    tables = [
        part
        for question in QUESTIONS
        if (rows := list(_rows(question)))
        for part in (f"### {question.text}", write_table(HEADING, rows))
    ]
    return "\n\n".join(["## What holds", EXPLANATION, *tables]) if tables else ""


HEADING = ["compared", "in", "difference in points", "in standard errors", "better on", "answer"]
EXPLANATION = (
    "Means of the differences over the data sets, ± their standard error; the tables below have each data "
    "set. A method is called better or worse where its mean difference is two standard errors or more, which "
    "happens by chance to about one of 14 comparisons with three seeds and five data sets. The images are "
    "copies of few pixels, so that differences on images of full size may be others."
)


def _rows(question: Question) -> Iterator[list[str]]:
    for stem, pattern, against in question.comparisons:
        scores = evidence.scores_of(stem)
        if scores is None:
            continue
        differences = evidence.differences(stem)
        found = {
            method: lines
            for method in scores.by_method
            if fnmatchcase(method, pattern)
            and method != against
            and (lines := _between(differences, method, against))
        }
        for method in sorted(found, key=lambda method: -float(_whole(found[method])["difference"])):
            yield _row(scores, method, against, found[method])


def _between(lines: list[Run], method: str, against: str) -> list[Run]:
    """Those of a file's lines that are about two methods, on each data set and as a mean; turned round where
    the file has them the other way."""
    own = [line for line in lines if (line["method"], line["against"]) == (method, against)]
    return own or [
        {**line, "method": method, "against": against, "difference": str(-float(line["difference"]))}
        for line in lines
        if (line["method"], line["against"]) == (against, method)
    ]


def _whole(lines: list[Run]) -> Run:
    """The mean over all data sets; where there is none, the only data set, or the first one."""
    return next((line for line in lines if not line["data"]), lines[0])


def _row(scores: Scores, method: str, against: str, lines: list[Run]) -> list[str]:
    single = [line for line in lines if line["data"]]
    better = sum(float(line["difference"]) > 0 for line in single)
    names = [f"`{method}` - `{against}`", scores.link]
    line = _whole(lines)
    if line["data"] and len(scores.data) > 1:
        return [*names, NONE, NONE, f"{better} of {len(single)}", "open: not run on all data sets"]
    return [
        *names,
        evidence.show_difference(line),
        evidence.in_errors(line),
        f"{better} of {len(single)}",
        _answer(line),
    ]


def _answer(line: Run) -> str:
    if not line["standard_error"]:
        return "open: one run each"
    difference, error = float(line["difference"]), float(line["standard_error"])
    if abs(difference) < DECIDED * error or difference == 0:
        return "no difference to be told"
    return "**better**" if difference > 0 else "**worse**"
