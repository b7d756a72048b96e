"""Whether the probabilities of an evaluation are to be believed: its numbers, and lines of the final table.

A classifier has one question for each example, which class it is of, and what is looked at is the probability
of its answer. Where an image may have any number of labels, each label of each image is a question, and what
is looked at is the probability of the answer yes. M questions, K answers to choose from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from vimtune.metrics.calibration import (
    HIGHEST,
    LOWEST,
    Bin,
    calibration_error,
    fit_temperature,
    log_probabilities,
    mean_loss,
    reliability,
)
from vimtune.tasks.job import Evaluation, Outcome

HELD_OUT = "val"
"""The split to which temperatures are fitted: it is neither trained on nor the one whose scores are told."""
CONTINUED = "the run was continued after its best epoch (vimtune evaluate fits one)"
"""Why a run has no temperature, although it has kept such a split apart."""
NOT_APART = f"the run has kept no split {HELD_OUT!r} apart"
"""Why a run has none that trained on this split, or had none."""


@dataclass(frozen=True)
class Temperature:
    """The temperature of a classifier, and where it comes from."""

    value: float | None
    """None where there is nothing that it could be fitted to."""
    origin: str
    """Half a sentence: to what it was fitted, or why it was not."""


@dataclass(frozen=True)
class Questions:
    """What was asked, and how probable the answers are."""

    logits: Tensor
    """(M, K) fp32."""
    truth: Tensor
    """The right answers, (M,) int64."""
    judged: Tensor
    """The answers whose probability is looked at, (M,) int64."""

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """Those of the judged answers, (M,) double, where a temperature divides the logits."""
        return log_probabilities(self.logits, self.judged, temperature).exp()

    def bins(self, temperature: float = 1.0) -> list[Bin]:
        """The judged answers by their probability, where a temperature divides the logits."""
        return reliability(self.probabilities(temperature), self.judged == self.truth)


def selected(outcome: Outcome) -> tuple[Evaluation | None, str]:
    """What a run that has kept such a split apart fits a temperature to: its scores; None where they are
    those of an earlier epoch, and why."""
    return outcome.selection, CONTINUED if outcome.selection is None else ""


def without_seen(count: int, whole: int, plural: str) -> str:
    """What is said of the split to which a temperature is fitted where some of it was trained on: answers to
    that are surer than those to new examples, so that it is left out.

    Args:
        count: how many of them were trained on.
        whole: how many there are.
        plural: what they are called, such as "images".
    """
    if not count:
        return ""
    if count == whole:
        return f"the {plural} of {HELD_OUT!r} were trained on"
    return f"without {count:,} of them that were trained on"


def temperature_of(
    questions: Questions, split: str, examples: str, scored: str, note: str = ""
) -> Temperature:
    """The temperature that fits the examples of a split; none where all answers are right, for then the lower
    it is the better it fits, which says nothing of the answers to other examples.

    Args:
        questions: those about the examples, at least one.
        split: its name.
        examples: how many these are and what they are called, such as "6 images".
        scored: the split whose scores are told.
        note: what was left out of the examples; "" for nothing.
    """
    origin = f"fitted to the {examples} of {split!r}"
    if split == scored:
        which = "a part of those" if note else "which are the ones"
        origin += f", {which} that are scored here: expect a little less of others"
    left_out = f"; {note}" if note else ""
    origin += left_out
    value = fit_temperature(questions.logits, questions.truth)
    if value == LOWEST:
        found = f"the answers to the {examples} of {split!r} are all but right, and fit none"
        return Temperature(None, found + left_out)
    if value == HIGHEST:
        origin += "; it is the highest one that is searched, because the answers say less than chance"
    return Temperature(value, origin)


@dataclass(frozen=True)
class Calibration:
    """The calibration of a model on the examples that were scored."""

    questions: Questions
    """Those about these examples."""
    temperature: Temperature
    """What the logits would have to be divided by."""

    @cached_property
    def bins(self) -> list[Bin]:
        """Answers by their probability."""
        return self.questions.bins()

    @cached_property
    def calibrated_bins(self) -> list[Bin] | None:
        """The same with the temperature; None where there is none."""
        value = self.temperature.value
        return None if value is None else self.questions.bins(value)

    def scores(self) -> dict[str, float | None]:
        """The calibration error in percent; the temperature, and error and loss with it."""
        value, bins = self.temperature.value, self.calibrated_bins
        logits, truth = self.questions.logits, self.questions.truth
        return {
            "ece": calibration_error(self.bins),
            "temperature": value,
            "calibrated_ece": None if bins is None else calibration_error(bins),
            "calibrated_loss": None if value is None else mean_loss(logits, truth, value),
        }

    def rows(self, split: str) -> Iterator[tuple[str, str]]:
        """Lines of the final table about a split: the error, and the temperature."""
        error = f"{calibration_error(self.bins):.2f} %"
        if self.calibrated_bins is not None:
            error += f"; {calibration_error(self.calibrated_bins):.2f} % with the temperature"
        yield f"calibration error ({split})", error
        value = self.temperature.value
        yield "temperature", f"{'none' if value is None else f'{value:.3f}'}, {self.temperature.origin}"

    def numbers(self) -> dict[str, Any]:
        """Where the temperature comes from, and the reliability, as plain values."""
        plain = ("low", "high", "count", "confidence", "accuracy")
        return {
            "temperature_origin": self.temperature.origin,
            "reliability": [{name: getattr(own, name) for name in plain} for own in self.bins],
        }
