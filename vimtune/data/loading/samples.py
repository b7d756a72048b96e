"""Samples of a data set: decoded, prepared, and put together to batches in the workers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from vimtune.data.base import ImageDataset
from vimtune.data.errors import CorruptImageError, ImageReadError
from vimtune.data.transforms import Transform
from vimtune.machine import free_memory
from vimtune.text import counted

logger = logging.getLogger(__name__)

_AT_A_TIME = 8
"""Images that a worker decodes before it prepares them: to draw numbers for each of them takes longer."""
_BYTES_AT_A_TIME = 16 * 2**20
"""Bytes of decoded images from which on fewer are prepared together."""
_CACHE_SHARE = 0.5
"""Share of the free memory that the cache may take."""
_KEPT = 128 * 2**20
"""Bytes of decoded images that are kept without being asked for."""
_KEPT_SHARE = 0.1
"""Share of the free memory that they may take."""


def sample_seed(seed: int, epoch: int, draw: int) -> int:
    """Seed of the augmentation of a draw of one epoch (see `BatchSampler`), which is the index of an image
    where none comes twice: a number of 63 well-mixed bits."""
    return int(np.random.SeedSequence([seed, epoch, draw]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Key(NamedTuple):
    """Which sample a worker is to make. It says the epoch, so that workers can live longer than one."""

    epoch: int
    """Number of the epoch, from 0."""
    image: int
    """Index of the image in the data set."""
    turn: int = 0
    """How often it came before in the epoch, which changes its augmentation."""

    def draw(self, num_images: int) -> int:
        """The number of the draw in a data set of so many images; see `BatchSampler`."""
        return self.image + self.turn * num_images


class FailedSample(NamedTuple):
    """An image that could not be read.

    It is passed on as a value, because DataLoader cannot raise every error of a worker again.
    """

    image: int
    """Index of the image in the data set."""
    error: CorruptImageError | ImageReadError
    """Why it could not be read; the error has the name of the image."""


def targets_of(dataset: ImageDataset, indices: Sequence[int]) -> torch.Tensor:
    """What a model is to answer to images: int64 (b,), their classes; where they may have several labels
    float32 (b, C), 1 for each label that an image has."""
    if dataset.tags is None:
        return torch.tensor([dataset.label(index) for index in indices], dtype=torch.int64)
    answers = torch.zeros(len(indices), len(dataset.classes))
    for row, index in enumerate(indices):
        answers[row, list(dataset.tags[index])] = 1.0
    return answers


def _num_bytes(image: Image.Image) -> int:
    return 3 * image.width * image.height


class Batch(NamedTuple):
    """What a loader reads, in a worker where it has any."""

    parts: dict[str, torch.Tensor]
    """What `ImageLoader.finish` takes: "images", and what else that needs."""
    labels: torch.Tensor
    """What `targets_of` gives for them."""
    failures: list[FailedSample]
    """The images that could not be read and are not among the others."""


class Samples(Dataset[Batch], ABC):
    """Decodes and prepares images, a batch at a time, in the process that asks for them."""

    def __init__(self, dataset: ImageDataset, img_size: tuple[int, int]) -> None:
        """Samples of `dataset` with images of `img_size`, height and width."""
        self.dataset, self.img_size = dataset, img_size
        self._cached: dict[int, np.ndarray[Any, Any]] = {}
        self._room = 0

    @abstractmethod
    def prepare(self, images: Sequence[Image.Image], keys: Sequence[Key]) -> list[dict[str, torch.Tensor]]:
        """What of decoded images is sent, such as "images", uint8 (H, W, 3); each has names of its own."""

    @abstractmethod
    def finish(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a model takes, float32 (b, 3, H, W), of what `prepare` has made of a batch, stacked, on the
        device where it is."""

    def nothing(self) -> dict[str, torch.Tensor]:
        """What `prepare` makes of no image, stacked."""
        return {"images": torch.empty(0, *self.img_size, 3, dtype=torch.uint8)}

    def fill_cache(self) -> None:
        """Decode the images and keep them, in their order, until half of the free memory is used."""
        budget = free_memory() * _CACHE_SHARE
        used = 0
        for index in range(len(self.dataset)):
            try:
                pixels = np.asarray(self.dataset.load(index))
            except CorruptImageError:
                continue  # It is reported when its turn comes.
            used += pixels.nbytes
            if used > budget:
                break
            self._cached[index] = pixels
        logger.info(
            "cached %d of %s (%.0f MB)",
            len(self._cached),
            counted(len(self.dataset), "decoded images"),
            min(used, budget) / 1e6,
        )

    def keep_few(self) -> None:
        """Keep images as they come, until a little memory is used: a small data set is decoded once.

        For samples that one process makes; in several each would keep images of its own.
        """
        self._room = min(_KEPT, int(_KEPT_SHARE * free_memory()))

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        """A batch, without the images that could not be read."""
        failures: list[FailedSample] = []
        made: list[dict[str, torch.Tensor]] = []
        good: list[int] = []
        for images, read in self._decoded(keys, failures):
            made += self.prepare(images, read)
            good += [key.image for key in read]
        labels = targets_of(self.dataset, good)
        # In a worker torch's own function stacks straight into the shared memory in which batches travel.
        return Batch(default_collate(made) if made else self.nothing(), labels, failures)

    def _decoded(
        self, keys: Sequence[Key], failures: list[FailedSample]
    ) -> Iterator[tuple[list[Image.Image], list[Key]]]:
        """A few of the images at a time, with their keys; `failures` gets those that cannot be read."""
        images: list[Image.Image] = []
        read: list[Key] = []
        for key in keys:
            try:
                images.append(self._decode(key.image))
            except (CorruptImageError, ImageReadError) as error:
                # It is made anew, because `error` would keep this frame alive, with all its images.
                failures.append(FailedSample(key.image, type(error)(error.path, error.reason)))
                continue
            read.append(key)
            if len(images) == _AT_A_TIME or sum(_num_bytes(image) for image in images) >= _BYTES_AT_A_TIME:
                yield images, read
                images.clear()  # The caller has a variable for them, too.
                read = []
        if images:
            yield images, read

    def _decode(self, index: int) -> Image.Image:
        pixels = self._cached.get(index)
        if pixels is not None:
            return Image.fromarray(pixels)
        image = self.dataset.load(index)
        if self._room > 0:
            pixels = np.asarray(image)
            self._room -= pixels.nbytes
            if self._room >= 0:
                self._cached[index] = pixels
        return image


class TransformedSamples(Samples):
    """Images that go through a `Transform` up to the normalisation."""

    def __init__(self, dataset: ImageDataset, transform: Transform, seed: int) -> None:
        super().__init__(dataset, transform.img_size)
        self._transform, self._seed = transform, seed

    def prepare(self, images: Sequence[Image.Image], keys: Sequence[Key]) -> list[dict[str, torch.Tensor]]:
        """Pixels, uint8 (H, W, 3)."""
        number = len(self.dataset)
        seeds = [sample_seed(self._seed, key.epoch, key.draw(number)) for key in keys]
        return [
            {"images": self._transform.pixels(image, seed)} for image, seed in zip(images, seeds, strict=True)
        ]

    def finish(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Normalise the pixels of a batch."""
        return self._transform.normalise(parts["images"])
