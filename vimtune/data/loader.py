"""Batches of a data set: deterministic for any number of workers and processes, resumable at any batch."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from vimtune.data.base import ImageDataset
from vimtune.data.errors import CorruptImageError
from vimtune.data.transforms import Transform

logger = logging.getLogger(__name__)

_CACHE_SHARE = 0.5  # of the memory that is free when the cache is filled
_GRACE_SECONDS = 10


class ImageLoader:
    """Iterates over one epoch of this rank's batches. Made by `create_loader`.

    Iterating yields `(images, labels)`: float32 (b, 3, H, W) and int64 (b,). A global batch is split
    contiguously over the ranks, so `b` may differ by one between ranks where it does not divide; it may be 0
    in the last batch of an epoch that is not dropped, or where all images of a rank's share were skipped.
    Every rank sees the same number of batches.

    Attributes:
        num_skipped: corrupt images left out so far, each occurrence counted.
        skipped_paths: which images were left out.
    """

    def __init__(
        self, items: _Items, batches: _Batches, loader: DataLoader, on_corrupt: str, img_size: tuple[int, int]
    ) -> None:
        self.num_skipped = 0
        self.skipped_paths: set[str] = set()
        self._items = items
        self._batches = batches
        self._loader = loader
        self._on_corrupt = on_corrupt
        self._img_size = img_size

    @property
    def dataset(self) -> ImageDataset:
        """The data set that is read."""
        return self._items.dataset

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iterations yield: the batches of `epoch` from `start_batch` on."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(
                f"position epoch={epoch}, start_batch={start_batch} is outside this loader: epochs count "
                f"from 0, batches from 0 to {len(self)}."
            )
        self._batches.epoch = epoch
        self._batches.start_batch = start_batch

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self._batches.num_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels, corrupt in self._loader:
            for path, reason in corrupt:
                self._leave_out(path, reason)
            if images is None:
                images = torch.empty(0, 3, *self._img_size)
            yield images, labels

    def _leave_out(self, path: str, reason: str) -> None:
        if self._on_corrupt == "error":
            raise CorruptImageError(path, reason)
        self.num_skipped += 1
        if path not in self.skipped_paths:
            self.skipped_paths.add(path)
            logger.warning("left out corrupt image %s: %s", path, reason)


def create_loader(
    dataset: ImageDataset,
    transform: Transform,
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    num_workers: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    cache: bool = False,
    on_corrupt: str = "error",
    pin_memory: bool = False,
) -> ImageLoader:
    """Build a loader.

    The order is a pure function of (seed, epoch), the randomness of an image one of (seed, epoch, index):
    neither workers nor ranks nor the batch at which iteration starts change them.

    Args:
        batch_size: images per batch over all ranks together.
        shuffle: a new permutation each epoch; False keeps the order of the data set.
        drop_last: leave out the last batch when it is smaller.
        num_workers: processes that decode; they stay alive between epochs. 0 decodes in this process.
        rank, world_size: which share of each batch is ours.
        cache: decode every image once, now, and keep it in memory (uint8, full size). The workers are forked
            and read the same pages. At most half of the free memory is used; what does not fit is decoded
            each time, with the same result. Every rank keeps its own cache.
        on_corrupt: "error" raises `CorruptImageError`, "skip" leaves such images out of their batch.
        pin_memory: put batches in page-locked memory for faster copies to a GPU.

    Raises:
        ValueError: a value out of range, or settings that give no batch at all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must be 0 or more.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie in 0..{world_size - 1} (world_size={world_size}).")
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f"on_corrupt={on_corrupt!r} must be 'error' or 'skip'.")
    if len(dataset) == 0:
        raise ValueError(f"the data set is empty: {dataset.source}.")
    if drop_last and len(dataset) < batch_size:
        raise ValueError(
            f"no batch left: {len(dataset)} images ({dataset.source}), batch_size={batch_size} and "
            f"drop_last. Use batch_size <= {len(dataset)}, or keep the last batch."
        )
    if drop_last and batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared evenly by {world_size} processes; "
            f"use a multiple of {world_size}."
        )
    items = _Items(dataset, transform, seed)
    if cache:
        items.fill_cache()
    batches = _Batches(len(dataset), batch_size, shuffle, drop_last, seed, rank, world_size)
    generator = torch.Generator()  # keeps DataLoader away from torch's global generator
    generator.manual_seed(seed)
    loader: DataLoader = DataLoader(
        items,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
        persistent_workers=num_workers > 0,
        multiprocessing_context=_context(num_workers),
        generator=generator,
    )
    return ImageLoader(items, batches, loader, on_corrupt, transform.img_size)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Seed of one image's augmentation in one epoch: 63 well-mixed bits."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Key(NamedTuple):
    """What a worker needs to make one sample. Carrying the epoch lets workers outlive it."""

    epoch: int
    image: int


class _Failed(NamedTuple):
    path: str
    reason: str


class _Items(Dataset):
    """Decodes and transforms single images, in whichever process asks."""

    def __init__(self, dataset: ImageDataset, transform: Transform, seed: int) -> None:
        self.dataset = dataset
        self._transform = transform
        self._seed = seed
        self._cached: dict[int, np.ndarray] = {}

    def fill_cache(self) -> None:
        budget = _free_memory() * _CACHE_SHARE
        used = 0
        for index in range(len(self.dataset)):
            try:
                pixels = np.asarray(self.dataset.load(index))
            except CorruptImageError:
                continue  # reported when its turn comes
            used += pixels.nbytes
            if used > budget:
                break
            self._cached[index] = pixels
        logger.info(
            "cached %d of %d decoded images (%.0f MB)",
            len(self._cached),
            len(self.dataset),
            min(used, budget) / 1e6,
        )

    def __getitem__(self, key: _Key) -> tuple[torch.Tensor, int] | _Failed:
        pixels = self._cached.get(key.image)
        try:
            image = self.dataset.load(key.image) if pixels is None else Image.fromarray(pixels)
        except CorruptImageError as error:
            return _Failed(self.dataset.describe(key.image), error.reason)
        tensor = self._transform(image, sample_seed(self._seed, key.epoch, key.image))
        return tensor, self.dataset.label(key.image)


class _Batches(Sampler[list[_Key]]):
    """Yields this rank's share of each batch of the current position."""

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._num_images = num_images
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.num_batches = num_images // batch_size if drop_last else -(-num_images // batch_size)
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        return self.num_batches - self.start_batch

    def __iter__(self) -> Iterator[list[_Key]]:
        epoch = self.epoch
        order = np.arange(self._num_images)
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._num_images)
        for batch in range(self.start_batch, self.num_batches):
            whole = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            first = self._rank * len(whole) // self._world_size
            last = (self._rank + 1) * len(whole) // self._world_size
            yield [_Key(epoch, int(index)) for index in whole[first:last]]


def _collate(
    samples: list[tuple[torch.Tensor, int] | _Failed],
) -> tuple[torch.Tensor | None, torch.Tensor, list[tuple[str, str]]]:
    corrupt = [(sample.path, sample.reason) for sample in samples if isinstance(sample, _Failed)]
    good = [sample for sample in samples if not isinstance(sample, _Failed)]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), corrupt


def _prepare_worker(worker: int) -> None:
    del worker
    # Ctrl-C is the main process's business: it stops the workers after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die_later)
    if "cv2" in sys.modules:
        import cv2

        cv2.setNumThreads(0)  # one core per worker; OpenCV's thread pool does not survive a fork


def _die_later(signum: int, frame: Any) -> None:
    """Schedulers send SIGTERM to the whole process group: the main process needs its workers to
    finish the step and save, so they live on for a moment."""
    signal.alarm(_GRACE_SECONDS)


def _context(num_workers: int) -> Any:
    """Fork where the system can, whatever Python's default: workers then share the cache's pages."""
    can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return multiprocessing.get_context("fork") if num_workers and can_fork else None


def _free_memory() -> int:
    """Bytes of memory available now; unlimited where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        names = getattr(os, "sysconf_names", {})
        if "SC_PAGE_SIZE" in names and "SC_PHYS_PAGES" in names:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        return sys.maxsize
