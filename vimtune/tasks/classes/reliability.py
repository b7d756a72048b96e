"""The calibration on a page: how often answers are right, by how sure the model was of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from vimtune.metrics.calibration import Bin, calibration_error
from vimtune.pages.section import Picture, Section
from vimtune.pages.style import picture_style
from vimtune.tasks.classes.calibration import Calibration


@dataclass(frozen=True)
class Wording:
    """What the probabilities of a page are of."""

    calibrated: str
    """When a model is calibrated, and what is put into intervals: whole sentences."""
    judged: str
    """What has a probability, such as "answer"; its plural has an s."""
    share: str
    """What there is a share of, such as "right answers"."""
    below: str
    """What it means that a share lies below the probability."""
    temperature: str
    """What dividing by the temperature does: a whole sentence."""


CLASSES = Wording(
    "A model is calibrated if, of the answers that it gives with probability 80 %, 80 % are right. Answers "
    "are put into {bins} intervals of probability",
    "answer",
    "right answers",
    "the model is too sure",
    "To divide the logits by the temperature before the softmax changes no answer.",
)
"""Every example has one class, and the probability is that of the answer."""
LABELS = Wording(
    "A model is calibrated if, of the labels to which it gives a probability of 80 %, 80 % are there. The "
    "probability of every label of every image is put into one of {bins} intervals",
    "label",
    "labels that are there",
    "the probabilities are too high",
    "Each label of each image counts as a question with the answers yes and no. Where most labels are rare, "
    "most probabilities are near 0, and a small error says little. To divide the logits by the temperature "
    "before the sigmoid moves no probability to the other side of a half.",
)
"""An image has any number of labels, and each of them has a probability."""


def calibration_section(found: Calibration, wording: Wording) -> Section:
    """The section of a page, with the picture."""
    lines = {"as it is": found.bins}
    value, error = found.temperature.value, calibration_error(found.bins)
    findings = [f"The expected calibration error (ECE) is {error:.2f} %."]
    if found.calibrated_bins is None or value is None:
        findings.append(f"There is no temperature: {found.temperature.origin}.")
    else:
        lines["with the temperature"] = found.calibrated_bins
        other = calibration_error(found.calibrated_bins)
        if other < error:
            meaning = f"the model is {'too sure' if value > 1 else 'not sure enough'} as it is."
        else:
            meaning = "here it does not help."
        findings.append(
            f"The temperature is {value:.3f}, {found.temperature.origin}. With it the error is "
            f"{other:.2f} %: {meaning}"
        )
    share, judged = wording.share, wording.judged
    return Section(
        title="Calibration",
        explanation=f"{wording.calibrated.format(bins=len(found.bins))}; in each, "
        f"probability and share of {share} have a distance, and the ECE is its mean, weighted by the "
        f"{judged}s (Guo et al. 2017). "
        f"{wording.temperature}",
        findings=findings,
        numbers={},
        pictures=[
            Picture(
                f"Share of {share} by their probability. Below the dotted line {wording.below}. "
                f"The bars count the {judged}s.",
                draw_reliability(lines, wording),
            )
        ],
    )


def draw_reliability(found: Mapping[str, Sequence[Bin]], wording: Wording) -> Figure:
    """Share of right answers, or of labels that are there, over their mean probability, and below it how many
    probabilities there are.

    Args:
        found: intervals of probability by the name of their line. The first one has the bars below.
        wording: what the probabilities are of.
    """
    with picture_style():
        figure = Figure(figsize=(4.8, 5.2))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        upper.plot([0, 100], [0, 100], color="0.6", linestyle=":", label="calibrated")
        for name, bins in found.items():
            filled = [own for own in bins if own.count]
            confidence, accuracy = ([100 * x for x in xs] for xs in _points(filled))
            upper.plot(confidence, accuracy, marker="o", markersize=4, label=name)
        upper.set(ylabel=f"{wording.share} (%)", xlim=(0, 100), ylim=(0, 100))
        upper.legend(loc="best")
        first = next(iter(found.values()))
        middles = [50 * (own.low + own.high) for own in first]
        lower.bar(middles, [own.count for own in first], width=90 / max(1, len(first)), color="tab:blue")
        lower.set(xlabel=f"probability of the {wording.judged} (%)", ylabel=f"{wording.judged}s")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
        figure.subplots_adjust(left=0.16, right=0.97, top=0.98, bottom=0.1, hspace=0.08)
        return figure


def _points(bins: Sequence[Bin]) -> tuple[list[float], list[float]]:
    """Mean probabilities, and shares of right answers."""
    return [own.confidence for own in bins], [own.accuracy for own in bins]
