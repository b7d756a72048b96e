"""Weights of classes in the loss. C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vimtune.tasks.images.settings import EVENED
from vimtune.text import name_some, quote, suggest


def class_weights(
    chosen: str | Mapping[str, float], labels: Sequence[int], classes: Sequence[str]
) -> Tensor | None:
    """The weight of each class in a loss that is a mean over images, (C,) fp32; None where all are 1.

    Over the training images the weights are 1 on average, so that the learning rate means the same.
    "balanced" gives a class the weight N / (K n): N images, n of them of the class, and K classes that have
    any.

    Args:
        chosen: the value of the key `class_weights`.
        labels: the class of every training image.
        classes: C names.

    Raises:
        ValueError: a class that is weighted does not exist.
    """
    if chosen == "none":
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=len(classes)).double()
    if chosen == EVENED:
        weights = 1.0 / counts.clamp(min=1.0)
    else:
        assert isinstance(chosen, Mapping)
        weights = torch.ones(len(classes), dtype=torch.float64)
        for name, weight in chosen.items():
            if name not in classes:
                raise ValueError(
                    f"class_weights: there is no class {quote(name)}.{suggest(name, classes)} The data set "
                    f"has {name_some(classes, 20)}"
                )
            weights[classes.index(name)] = weight
    return (weights * counts.sum() / (weights * counts).sum()).float()
