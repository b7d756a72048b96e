"""Learning from a teacher: the loss of a classifier that is to answer like another one. B batch, C classes.

Hinton et al. 2015 (arXiv 1503.02531) train a student on the probabilities of a teacher, both softened by a
temperature T, Touvron et al. 2021 (DeiT, arXiv 2012.12877) on its best class alone:

    loss = (1 - w) CE(student, labels) + w T^2 KL(softmax(teacher / T) || softmax(student / T))     "soft"
    loss = (1 - w) CE(student, labels) + w CE(student, argmax teacher)                              "hard"

The teacher sees the very images that the student sees, augmented and mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.data import Transform
from vimtune.runtime.precision import Autocast, in_precision
from vimtune.tasks.images.predictor import load_image_predictor
from vimtune.tasks.origin import adapter_path
from vimtune.text import quote

TEACHER = "teacher"
"""Key of the teacher's hash among the readers of a job."""


class Teacher:
    """A trained classifier whose answers are learned."""

    def __init__(self, model: nn.Module, own: Transform, students: Transform, autocast: Autocast) -> None:
        """Make a teacher for a student.

        Args:
            model: the classifier, on the device where both compute.
            own: how images become its input.
            students: how they become the student's, in which the teacher gets them.
            autocast: opens the block in which both compute.
        """
        self._forward = in_precision(model.eval().requires_grad_(False), autocast)
        self._scale, self._shift = (
            values.to(next(model.parameters()).device) for values in _renormalisation(students, own)
        )

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Answers in fp32, (B, C), to the student's input (B, 3, H, W)."""
        logits: Tensor = self._forward(images * self._scale + self._shift)
        return logits.float()


def _renormalisation(given: Transform, wanted: Transform) -> tuple[Tensor, Tensor]:
    """Factor and summand, (3, 1, 1), that turn images normalised by `given` into those of `wanted`."""
    mean, std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for transform in (given, wanted)
        for values in (transform.config["mean"], transform.config["std"])
    )
    return (std / new_std).float(), ((mean - new_mean) / new_std).float()


@dataclass(frozen=True)
class Distillation:
    """How a teacher takes part in the loss."""

    teacher: Teacher
    kind: Literal["soft", "hard"]
    """What is learned: the teacher's probabilities, or its best class."""
    weight: float
    """Share of the teacher in the loss, from above 0 to 1."""
    temperature: float
    """What the logits of both are divided by before they become probabilities; "hard" needs none."""

    def blend(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The loss with the teacher's part in it; all losses are sums over the images.

        Args:
            loss: that of the labels, a scalar.
            logits: the student's answers, (B, C).
            images: the student's input, (B, 3, H, W).
        """
        return (1 - self.weight) * loss + self.weight * self._distance(logits.float(), images)

    def _distance(self, logits: Tensor, images: Tensor) -> Tensor:
        """How far the student's answers are from the teacher's."""
        answers = self.teacher.logits(images)
        if self.kind == "hard":
            return F.cross_entropy(logits, answers.argmax(1), reduction="sum")
        student, teacher = (F.log_softmax(each / self.temperature, 1) for each in (logits, answers))
        return self.temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def load_teacher(
    path: str, classes: Sequence[str], students: Transform, device: torch.device, autocast: Autocast
) -> tuple[Teacher, str]:
    """The teacher in a file, and the SHA-256 of the file.

    Args:
        path: a run folder, an adapter file or a merged file, as `vimtune predict` takes them.
        classes: names of the student's classes.
        students: how images become the student's input.
        device: where both compute.
        autocast: opens the block in which both compute.

    Raises:
        ValueError: the file cannot be loaded, or it is about other classes or images of another size.
    """
    file = adapter_path(path)
    found = load_image_predictor(file, checkpoint=None, device=device, backend="auto", force=False)
    if found.classes != list(classes):
        raise ValueError(
            f"teacher = {quote(path)} answers with {len(found.classes)} classes which are not the "
            f"{len(classes)} of the data set: train it on the same data"
        )
    if found.transform.img_size != students.img_size:
        theirs, ours = (" x ".join(map(str, each.img_size)) for each in (found.transform, students))
        raise ValueError(f"teacher = {quote(path)} takes images of {theirs} pixels, and the student {ours}")
    teacher = Teacher(found.model, found.transform, students, autocast)
    return teacher, hashlib.sha256(file.read_bytes()).hexdigest()
