"""Say which labels images have, where an image may have several or none. B batch, C classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

from torch import Tensor

from vimtune.tasks.answers import Answer, TagPrediction
from vimtune.tasks.images.inputs import Picture, Unreadable, asked_about
from vimtune.tasks.images.predictor import ImagePredictor
from vimtune.tasks.images.settings import TagPredictOptions
from vimtune.tasks.predictor import check_counts


class TagPredictor(ImagePredictor):
    """A model with an adapter that judges every class by itself, ready for images."""

    kind: ClassVar[type[Answer]] = TagPrediction

    def predict(
        self,
        inputs: Picture | Iterable[Picture],
        *,
        top_k: int = 3,
        batch_size: int = 32,
        temperature: float = 1.0,
        on_corrupt: Callable[[Unreadable], None] | None = None,
        threshold: float = 0.5,
    ) -> Iterator[TagPrediction]:
        """Name the labels of images, in order; see `ImagePredictor.predict` for the other arguments.

        Args:
            inputs: one image or several.
            top_k: classes per image that are named with their probability, whether it has them or not.
            batch_size: images that go through the model together.
            temperature: what the logits are divided by.
            on_corrupt: called for an image that cannot be decoded or read.
            threshold: an image has the labels whose probability is at least this, from 0 to 1.

        Raises:
            ValueError: what `ImagePredictor.predict` raises, or a threshold that is no number from 0 to 1.
        """
        check_counts(top_k=top_k, batch_size=batch_size)
        options = TagPredictOptions(threshold=threshold, temperature=temperature)
        batches = self._judge(self._read(asked_about(inputs), batch_size, on_corrupt), options.temperature)
        return (
            TagPrediction(**vars(best), labels=self._labels(own, options.threshold))
            for names, found in batches
            for best, own in zip(self._rank(names, found, top_k), found, strict=True)
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, C) -> probabilities (B, C), one for each class by itself."""
        return logits.sigmoid()

    def _labels(self, probabilities: Tensor, threshold: float) -> list[str]:
        """The names of the classes whose probability among those of an image, (C,), reaches the threshold."""
        order = probabilities.argsort(descending=True, stable=True).tolist()
        return [self.classes[index] for index in order if float(probabilities[index]) >= threshold]
