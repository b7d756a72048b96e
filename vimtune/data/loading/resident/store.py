"""Decoded images in one buffer on a device: how they come there, and how a batch of them is read.

N images in the store, P pixels in all of them, B images in a batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vimtune.data.base import ImageDataset
from vimtune.data.errors import CorruptImageError, DatasetError, ImageReadError
from vimtune.data.loading.workers import (
    death_noticed_later,
    naming_worker_trouble,
    prepare_worker,
    worker_context,
)
from vimtune.data.resize import PILLOW_FILTERS
from vimtune.data.transforms import CHANGES, as_rgb, evaluation_crop, is_random
from vimtune.machine import free_memory
from vimtune.preprocessing import Preprocessing
from vimtune.text import counted

logger = logging.getLogger(__name__)

SHARE = 0.25
"""Share of a device's free memory that the images of one split may take; twice that while they come in."""
_SAMPLE = 32
"""Images whose mean size tells how much all of them will take."""
_AT_A_TIME = 16
"""Images that a worker sends together; a few such pieces of each worker wait in shared memory."""
_LONGEST = 2
"""The longer side of a stored image is at most so many times what the shorter one may be."""


class DoesNotFitError(DatasetError):
    """The images take more of the device's memory than they may."""


class ImageStore:
    """The images of a data set on one device, each of its own size, in one buffer."""

    def __init__(
        self,
        pixels: Tensor,
        sizes: np.ndarray,
        failures: dict[int, CorruptImageError | ImageReadError],
    ) -> None:
        """A store of what was decoded.

        Args:
            pixels: uint8 (P, 3) on the device: the rows of one image after those of another.
            sizes: int64 (N, 2), height and width of each; 0 of those that could not be read.
            failures: why images could not be read, by their indices.
        """
        self.device = pixels.device
        self.failures = failures
        self.largest: tuple[int, int] = (int(sizes[:, 0].max()), int(sizes[:, 1].max()))
        """The greatest height and the greatest width."""
        self._pixels = pixels
        areas = sizes.prod(1)
        table = torch.from_numpy(np.stack([areas.cumsum() - areas, sizes[:, 0], sizes[:, 1]])).to(
            pixels.device
        )
        self._starts, self._heights, self._widths = table.unbind()

    def read(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images side by side.

        Args:
            images: int64 (B,), indices of images that could be read.

        Returns:
            Pixels uint8 (B, H, W, 3) of the size `largest`, where the last row and column of a smaller image
            are repeated; and the images' own heights and widths, int64 (B,) each.
        """
        heights, widths = self._heights[images], self._widths[images]
        rows = torch.arange(self.largest[0], device=self.device)
        columns = torch.arange(self.largest[1], device=self.device)
        rows = torch.minimum(rows, heights[:, None] - 1) * widths[:, None] + self._starts[images][:, None]
        columns = torch.minimum(columns, widths[:, None] - 1)
        places = rows[:, :, None] + columns[:, None]
        # Faster than by brackets, which look for each byte anew.
        pixels = self._pixels.index_select(0, places.view(-1)).view(*places.shape, 3)
        return pixels, heights, widths


def fill_store(
    dataset: ImageDataset, preprocessing: Preprocessing, device: torch.device, num_workers: int
) -> ImageStore:
    """Decode all images of a data set and put them on a device; says what it took.

    Raises:
        DoesNotFitError: they take more than `SHARE` of the free memory. Most often a sample shows it before
            all are decoded.
        WorkerError: a process that decodes died.
    """
    started = time.monotonic()
    free = room_on(device)
    allowed = int(SHARE * free)
    kept = _KEPT.find(dataset, preprocessing)
    if kept is None:
        _require_room(_expected_bytes(dataset, preprocessing), allowed, free, dataset, device)
    taken = 0
    pixels: list[Tensor] = []
    sizes: list[np.ndarray] = []
    failures: dict[int, CorruptImageError | ImageReadError] = {}
    pieces: list[_Piece] = []
    for piece in _decode(_Decoded(dataset, preprocessing), num_workers) if kept is None else kept:
        taken += piece.pixels.nbytes
        _require_room(taken, allowed, free, dataset, device)
        if kept is None and taken <= _KEPT.limit:
            pieces.append(piece)
        # Copied at once, because the shared memory through which it comes is often small.
        pixels.append(piece.pixels.to(device, copy=True))
        sizes.append(piece.sizes)
        failures |= piece.failures
    if kept is None and taken <= _KEPT.limit and not failures:
        _KEPT.put(dataset, preprocessing, pieces)
    store = ImageStore(torch.cat(pixels), np.concatenate(sizes), failures)
    logger.info(
        "%s: %s on %s as uint8 and augmented there (%.1f MB of %.1f GB free; up to %d x %d px; "
        "decoded in %.1f s)",
        dataset.split,
        counted(len(dataset) - len(failures), "images"),
        device,
        taken / 1e6,
        free / 1e9,
        *store.largest,
        time.monotonic() - started,
    )
    return store


def room_on(device: torch.device) -> int:
    """Bytes that are free on a device; those of the host where the device shares its memory."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return free_memory()


def _expected_bytes(dataset: ImageDataset, preprocessing: Preprocessing) -> int:
    """About how much all images will take, as the mean of a few over the whole data set says."""
    sizes = []
    for index in np.linspace(0, len(dataset) - 1, min(_SAMPLE, len(dataset))).astype(int).tolist():
        try:
            sizes.append(stored_pixels(dataset.load(index), preprocessing).nbytes)
        except (CorruptImageError, ImageReadError):
            continue  # It is reported when its turn comes.
    return round(sum(sizes) / max(1, len(sizes)) * len(dataset))


def _require_room(needed: int, allowed: int, free: int, dataset: ImageDataset, device: torch.device) -> None:
    if needed > allowed:
        raise DoesNotFitError(
            f"the {len(dataset)} images of {dataset.split!r} take about {needed / 1e9:.2f} GB, and they may "
            f"take {allowed / 1e9:.2f} of {free / 1e9:.2f} GB that are free on {device}: use --cache host or "
            "none"
        )


def stored_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """What is stored of a decoded image: uint8 (height, width, 3).

    What is not random is done once, by the code of the host, so that an image of an evaluation is the same to
    the bit with and without a cache. Of training images to be cropped at random the whole image is stored; a
    large one is first reduced, as far as even the smallest crop that the preset allows still has a pixel for
    each pixel of the model's input.
    """
    if not is_random(preprocessing):
        return evaluation_crop(image, preprocessing)
    shorter = math.ceil(max(preprocessing.img_size) / math.sqrt(CHANGES[preprocessing.preset].crop_scale[0]))
    factor = min(1.0, shorter / min(image.size), _LONGEST * shorter / max(image.size))
    if factor < 1:
        reduced = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        image = image.resize(reduced, PILLOW_FILTERS[preprocessing.interpolation])
    return np.array(as_rgb(image))


class _Piece(NamedTuple):
    """Some images of a data set, decoded."""

    pixels: Tensor
    """uint8 (P, 3), the pixels of one image after those of another."""
    sizes: np.ndarray
    """int64 (n, 2), height and width of each."""
    failures: dict[int, CorruptImageError | ImageReadError]
    """Why images could not be read, by their indices."""


class _Kept:
    """What has been decoded in this process, for further stores with the same images; nothing until
    `keep_decoded` gives it room. Data sets that were used last stay: a comparison makes all runs on one data
    set before it goes to the next."""

    def __init__(self) -> None:
        self.limit = 0
        """Bytes that all images may take."""
        self._pieces: dict[tuple[str, str], _Piece] = {}
        """Those of each data set, the one that was used last at the end."""

    def find(self, dataset: ImageDataset, preprocessing: Preprocessing) -> list[_Piece] | None:
        """The images of a data set, if they are here."""
        if not self._pieces:
            return None  # A fingerprint takes a while.
        key = self._key(dataset, preprocessing)
        piece = self._pieces.pop(key, None)
        if piece is None:
            return None
        self._pieces[key] = piece
        return [piece]

    def put(self, dataset: ImageDataset, preprocessing: Preprocessing, pieces: Sequence[_Piece]) -> None:
        """Keep the images of a data set, which take no more than `limit`, and give up for them those that
        were not used for longest."""
        pixels = torch.cat([piece.pixels for piece in pieces])  # a copy: pieces may lie in shared memory
        sizes = np.concatenate([piece.sizes for piece in pieces])
        self._pieces[self._key(dataset, preprocessing)] = _Piece(pixels, sizes, {})
        while sum(piece.pixels.nbytes for piece in self._pieces.values()) > self.limit:
            del self._pieces[next(iter(self._pieces))]

    @staticmethod
    def _key(dataset: ImageDataset, preprocessing: Preprocessing) -> tuple[str, str]:
        return dataset.fingerprint(), repr(preprocessing)


_KEPT = _Kept()


def keep_decoded(limit: int) -> None:
    """From now on keep the images that stores of this process have decoded, for others with the same images.

    They are known by the fingerprint of their data set. For a process that makes one run after the other.

    Args:
        limit: bytes that they may take; for more, those that were not used for longest are given up.
    """
    _KEPT.limit = limit


class _Decoded(Dataset[tuple[int, Any]]):
    """The images as they are stored, decoded in the process that asks for them."""

    def __init__(self, dataset: ImageDataset, preprocessing: Preprocessing) -> None:
        self._dataset, self._preprocessing = dataset, preprocessing

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | CorruptImageError | ImageReadError]:
        """The index, with the pixels uint8 (height, width, 3) or why there are none."""
        try:
            return index, stored_pixels(self._dataset.load(index), self._preprocessing)
        except (CorruptImageError, ImageReadError) as error:
            return index, error  # as a value, because DataLoader cannot raise every error again


def _pack(images: list[tuple[int, np.ndarray | CorruptImageError | ImageReadError]]) -> _Piece:
    """Put images one after the other, in the worker."""
    failures = {index: found for index, found in images if not isinstance(found, np.ndarray)}
    good = [found for _, found in images if isinstance(found, np.ndarray)]
    pixels = np.concatenate([np.empty((0, 3), np.uint8), *(found.reshape(-1, 3) for found in good)])
    sizes = [found.shape[:2] if isinstance(found, np.ndarray) else (0, 0) for _, found in images]
    return _Piece(torch.from_numpy(pixels), np.array(sizes, np.int64), failures)


def _decode(images: _Decoded, num_workers: int) -> Iterator[_Piece]:
    """All images in their order, decoded by so many processes."""
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_size=_AT_A_TIME,
        num_workers=num_workers,
        collate_fn=_pack,
        worker_init_fn=prepare_worker,
        multiprocessing_context=worker_context(num_workers),
        generator=torch.Generator(),  # keeps DataLoader away from torch's global generator
    )
    if num_workers == 0:
        yield from loader
        return
    with naming_worker_trouble():
        with death_noticed_later():
            pieces = iter(loader)
        yield from pieces
