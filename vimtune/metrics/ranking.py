"""Metrics of an order of images by how probable a class is. N images, C classes."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the steps of precision over recall, as in scikit-learn: the sum of (R_k - R_(k-1)) P_k.

    P_k and R_k are precision and recall when all images count as found whose score is at least the k-th
    largest value; images of equal scores are found together.

    Args:
        scores: (N, C), larger for what is more probable.
        positive: bool (N, C), whether an image is of a class.

    Returns:
        float64 (C,), from 0 to 1; not a number for a class of which there is no image.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    ranked, found = scores.gather(0, order), positive.gather(0, order).double()
    ranks = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)[:, None]
    precisions = found.cumsum(0) / ranks
    # Images of equal scores have the precision of the last one of them.
    is_last = torch.ones_like(positive)
    is_last[:-1] = ranked[:-1] != ranked[1:]
    places = torch.where(is_last, ranks.long() - 1, len(scores))
    last = places.flip(0).cummin(0).values.flip(0)
    return (precisions.gather(0, last) * found).sum(0) / found.sum(0)
