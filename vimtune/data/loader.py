"""Batches of a data set: deterministic for any number of workers and processes, resumable at any batch."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from vimtune.data.base import ImageDataset
from vimtune.data.errors import CorruptImageError, ImageReadError, TooManyCorruptError, WorkerError
from vimtune.data.transforms import Transform
from vimtune.text import printable, shorten

logger = logging.getLogger(__name__)

_CACHE_SHARE = 0.5  # share of the free memory that the cache may take
_GRACE_SECONDS = 10
_MAX_CORRUPT_SHARE = 0.5
_ENOUGH_TO_JUDGE = 100  # images after which the share of corrupt ones counts before the epoch has ended
# What torch says when a worker has died or a batch cannot be sent, as opposed to an error in a worker's code.
_WORKER_TROUBLE = (
    r"DataLoader worker \(pid|Pin memory thread exited|shared memory|ancdata|Too many open files"
)


class ImageLoader:
    """Iterates over one epoch of this rank's batches. Made by `create_loader`.

    Iterating yields `(images, labels)`: float32 (b, 3, H, W) and int64 (b,). A global batch is split
    contiguously over the ranks, so `b` may differ by one between ranks where it does not divide; it may be 0
    in the last batch of an epoch that is not dropped, or where all images of a rank's share were skipped.
    Every rank sees the same number of batches.

    Iterating raises, besides what the data set's `load` and the transform do:
        CorruptImageError: an image is corrupt, and such are not to be left out.
        TooManyCorruptError: more than half of the images are left out.
        ImageReadError: the system cannot read an image.
        WorkerError: a worker died.

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
        whole = self._batches.start_batch == 0
        seen = left_out = 0
        last: CorruptImageError | ImageReadError | None = None
        for images, labels, failures in self._read():
            for last in failures:
                self._leave_out(last)
            seen += len(labels) + len(failures)
            left_out += len(failures)
            if seen >= _ENOUGH_TO_JUDGE:
                self._judge(left_out, seen, last)
            yield torch.empty(0, 3, *self._img_size) if images is None else images, labels
        if whole:
            self._judge(left_out, seen, last)

    def close(self) -> None:
        """End the workers. Those that live on until Python exits are waited for `_GRACE_SECONDS` there."""
        iterator = self._loader._iterator
        if iterator is not None:  # DataLoader has no method of its own for this
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None

    def _read(self) -> Iterator[_Batch]:
        """The batches as the workers make them; what happens to the workers becomes a `WorkerError`."""
        if self._loader.num_workers == 0:
            yield from self._loader
            return
        try:
            with _death_noticed_later():
                batches = iter(self._loader)
            yield from batches
        except (RuntimeError, OSError, EOFError) as error:
            text = str(error).strip() or type(error).__name__
            plumbing = not isinstance(error, RuntimeError) and not text.startswith("Caught ")
            if not plumbing and not re.search(_WORKER_TROUBLE, text):
                raise
            reason = printable(shorten(text.splitlines()[-1]))
            raise WorkerError(
                f"the processes that prepare images failed ({reason}). Most often memory, shared memory or "
                f"open files ran out: use fewer --num-workers, a smaller --batch-size, or no --cache."
            ) from error

    def _leave_out(self, error: CorruptImageError | ImageReadError) -> None:
        if self._on_corrupt == "error" or isinstance(error, ImageReadError):
            raise type(error)(error.path, error.reason)  # anew: `error` would keep its own frames alive
        self.num_skipped += 1
        if error.path not in self.skipped_paths:
            self.skipped_paths.add(error.path)
            logger.warning("left out corrupt image %s: %s", printable(error.path), error.reason)

    def _judge(self, left_out: int, seen: int, last: CorruptImageError | ImageReadError | None) -> None:
        if last is not None and left_out > _MAX_CORRUPT_SHARE * seen:
            raise TooManyCorruptError(
                f"{left_out} of the {seen} images of {self.dataset.split!r} that were read in this epoch are "
                f"corrupt, more than {_MAX_CORRUPT_SHARE:.0%}; the last of them: {printable(last.path)} "
                f"({last.reason})"
            )


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
        on_corrupt: "error" raises `CorruptImageError`, "skip" leaves such images out of their batch, unless
            they are more than half of an epoch, or of what was read of it after the first 100 images.
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
    """An image that could not be read; a value, as DataLoader cannot raise each error of a worker again."""

    error: CorruptImageError | ImageReadError


class _Batch(NamedTuple):
    """What a worker sends. `images` is None where no image could be read."""

    images: torch.Tensor | None
    labels: torch.Tensor
    failures: list[CorruptImageError | ImageReadError]


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
        except (CorruptImageError, ImageReadError) as error:
            return _Failed(error)
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


def _collate(samples: list[tuple[torch.Tensor, int] | _Failed]) -> _Batch:
    failures = [sample.error for sample in samples if isinstance(sample, _Failed)]
    good = [sample for sample in samples if not isinstance(sample, _Failed)]
    images = torch.stack([image for image, _ in good]) if good else None
    return _Batch(images, torch.tensor([label for _, label in good], dtype=torch.int64), failures)


@contextmanager
def _death_noticed_later() -> Iterator[None]:
    """Take back the signal handler that DataLoader installs inside.

    It would raise the death of a worker wherever the main process is, such as amid the saving of a run.
    Without it DataLoader notices when the next batch is asked for.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    former = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not former and former is not None:
        signal.signal(signal.SIGCHLD, former)


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
