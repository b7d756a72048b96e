"""The model's answers over a loader, and the scores computed from them.

B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.train.distributed import Processes
from vimtune.train.guard import NonFiniteError, find_nonfinite
from vimtune.train.reading import InputError

Autocast = Callable[[], AbstractContextManager]


TOP = 5
"""Answers among which the right one counts for the second score."""


@dataclass(frozen=True)
class Evaluation:
    """Scores over all images of a split; `confusion[true, predicted]` counts images, (C, C)."""

    confusion: Tensor
    top5_hits: int
    loss: float

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Percent."""
        return 100.0 * int(self.confusion.diag().sum()) / max(1, self.num_images)

    @property
    def top5(self) -> float | None:
        """Percent; None for five classes or fewer, where every answer would be among the best five."""
        return 100.0 * self.top5_hits / max(1, self.num_images) if len(self.confusion) > TOP else None

    @property
    def per_class(self) -> list[float | None]:
        """Percent right of each class's images, None for a class without any."""
        right, total = self.confusion.diag().tolist(), self.confusion.sum(1).tolist()
        return [100.0 * r / t if t else None for r, t in zip(right, total, strict=True)]


@torch.no_grad()
def iterate_logits(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, autocast: Autocast
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield fp32 logits (B, C) and labels (B,), on `device`, of each non-empty batch."""

    def forward(images: Tensor) -> Tensor:
        with autocast():
            return model(images).float()

    was_training = model.training
    model.eval()
    try:
        for images, labels in batches:
            if len(images) == 0:
                continue
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = forward(images)
            if not bool(torch.isfinite(logits).all()):
                place = find_nonfinite(model, images, forward, backward=False)
                raise NonFiniteError(f"the model's outputs are not finite in evaluation; first in {place}")
            yield logits, labels
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    device: torch.device,
    autocast: Autocast,
    processes: Processes | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Score `model` on this process's share of the images and add up the shares of all processes.

    Among classes of equal logits the one of lowest index comes first, on every device.

    Returns:
        None, in every process, when `should_stop` became true in any of them, or when the images of
        another process cannot be read.

    Raises:
        InputError: the images of this process cannot be read.
        ValueError: there was no image to score.
    """
    processes = processes or Processes()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    hits, loss, stopped = 0, 0.0, False
    failure: InputError | None = None
    try:
        for logits, labels in iterate_logits(model, batches, device, autocast):
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            predicted, ranks = rank_answers(logits, labels)
            hits += int((ranks < TOP).sum())
            pairs = (labels * num_classes + predicted).cpu()
            confusion += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
            if should_stop():
                stopped = True
                break
    except InputError as error:  # raised below, after the others have been told to stop
        failure, stopped = error, True
    counts = processes.sum(torch.cat([confusion.flatten(), torch.tensor([hits, int(stopped)])]))
    loss = float(processes.sum(torch.tensor(loss, dtype=torch.float64)))
    *_, hits, stopped = counts.tolist()
    if failure is not None:
        raise failure
    if stopped:
        return None
    confusion = counts[:-2].view(num_classes, num_classes)
    if not (num_images := int(confusion.sum())):
        raise ValueError("there is no image to score: the split is empty, or all of its images are corrupt")
    return Evaluation(confusion, hits, loss / num_images)


def rank_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The best class of each image, and how many classes come before the right one.

    Among classes of equal logits the one of lowest index comes first; in bf16 such ties are common.

    Args:
        logits: (B, C).
        labels: (B,), the right classes.

    Returns:
        Two int64 tensors (B,).
    """
    index = torch.arange(logits.shape[1], device=logits.device)
    highest = logits.amax(1, keepdim=True)
    predicted = torch.where(logits == highest, index, logits.shape[1]).amin(1)
    own = logits.gather(1, labels[:, None])
    before = (logits > own) | ((logits == own) & (index < labels[:, None]))
    return predicted, before.sum(1)
