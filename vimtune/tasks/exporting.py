"""What a task says of a model that it has written for other programs."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 1e-4
"""Largest logit error of an exported file that rounding explains, relative to the largest logit, or to 1."""


class ExportError(ValueError):
    """The exported file does not compute what the model computes."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked."""

    model: str
    """Name of the model in the registry."""
    left_beside: str | None
    """Why the adapter is part of the graph instead of being merged into the weights; None if it is merged,
    or if there is none."""
    max_error: float
    """Largest absolute difference of a logit of the file and the model's."""
    max_logit: float
    """Largest absolute logit of the model."""
    inputs: str
    """What they were computed from, such as "4 random images"."""
    size: int
    """Bytes of the file."""
    weights: int
    """Bytes of the model's parameters, in fp32."""
    seconds: float
    """The file's time for one image on this CPU, in a batch of 1."""
    seconds_before: float
    """The model's own in PyTorch."""
