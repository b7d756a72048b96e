"""Single samples of a data set: decoded, transformed, and put together to batches in the workers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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


class Batch(NamedTuple):
    """What a loader reads, in a worker where it has any."""

    images: torch.Tensor
    """What `ImageLoader.finish` takes: pixels, or what a model takes already."""
    labels: torch.Tensor
    """What `targets_of` gives for them."""
    failures: list[FailedSample]
    """The images that could not be read and are not among `images`."""


class Samples(Dataset["tuple[torch.Tensor, torch.Tensor] | FailedSample"]):
    """Decodes and transforms single images, in the process that asks for them."""

    def __init__(self, dataset: ImageDataset, transform: Transform, seed: int) -> None:
        self.dataset = dataset
        self._transform = transform
        self._seed = seed
        self._cached: dict[int, np.ndarray[Any, Any]] = {}
        self._room = 0

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

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, torch.Tensor] | FailedSample:
        """The pixels of an image, uint8 (H, W, 3), and its row of `targets_of`, or the error with which it
        could not be read."""
        pixels = self._cached.get(key.image)
        try:
            image = self.dataset.load(key.image) if pixels is None else Image.fromarray(pixels)
        except (CorruptImageError, ImageReadError) as error:
            return FailedSample(key.image, error)
        if pixels is None and self._room > 0:
            pixels = np.asarray(image)
            self._room -= pixels.nbytes
            if self._room >= 0:
                self._cached[key.image] = pixels
        draw = key.image + key.turn * len(self.dataset)
        tensor = self._transform.pixels(image, sample_seed(self._seed, key.epoch, draw))
        return tensor, targets_of(self.dataset, [key.image])[0]

    def collate(self, samples: list[tuple[torch.Tensor, torch.Tensor] | FailedSample]) -> Batch:
        """Stack the samples of a batch, pixels uint8 (b, H, W, 3), and put the failed ones aside."""
        failures = [sample for sample in samples if isinstance(sample, FailedSample)]
        good = [sample for sample in samples if not isinstance(sample, FailedSample)]
        if not good:
            nothing = torch.empty(0, *self._transform.img_size, 3, dtype=torch.uint8)
            return Batch(nothing, targets_of(self.dataset, []), failures)
        # In a worker torch's own function stacks straight into the shared memory in which batches travel.
        images, labels = default_collate(good)
        return Batch(images, labels, failures)

    def finish(self, pixels: torch.Tensor) -> torch.Tensor:
        """What a model takes, float32 (b, 3, H, W), of the pixels of a batch, on their device."""
        return self._transform.normalise(pixels)
