"""Batches of a data set: deterministic for any number of workers and processes, resumable at any batch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from vimtune.data.base import ImageDataset
from vimtune.data.batch_sampler import BatchSampler
from vimtune.data.errors import CorruptImageError, ImageReadError, TooManyCorruptError, WorkerError
from vimtune.data.samples import Batch, Samples, collate
from vimtune.data.transforms import Transform
from vimtune.data.workers import death_noticed_later, prepare_worker, worker_context
from vimtune.text import printable, shorten

logger = logging.getLogger(__name__)

_MAX_CORRUPT_SHARE = 0.5
"""Share of the images of an epoch that may be left out as corrupt."""
_ENOUGH_TO_JUDGE = 100
"""Number of images after which that share counts before the epoch has ended."""
_WORKER_TROUBLE = (
    r"DataLoader worker \(pid|Pin memory thread exited|shared memory|ancdata|Too many open files"
)
"""What torch says when a worker has died or a batch cannot be sent, as opposed to errors in its code."""


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
        self,
        samples: Samples,
        batches: BatchSampler,
        loader: DataLoader[Any],
        on_corrupt: str,
        img_size: tuple[int, int],
    ) -> None:
        self.num_skipped = 0
        self.skipped_paths: set[str] = set()
        self._samples = samples
        self._batches = batches
        self._loader = loader
        self._on_corrupt = on_corrupt
        self._img_size = img_size
        self._ahead: _Ahead | None = None

    @property
    def dataset(self) -> ImageDataset:
        """The data set that is read."""
        return self._samples.dataset

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iterations yield: the batches of `epoch` from `start_batch` on."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(
                f"position epoch={epoch}, start_batch={start_batch} is outside this loader: epochs count "
                f"from 0, batches from 0 to {len(self)}."
            )
        self._batches.epoch = epoch
        self._batches.start_batch = start_batch

    def read_ahead(self) -> None:
        """Let the workers begin now with the batches that the next iteration is to yield.

        An iteration that starts at another position begins anew. Without workers nothing happens, and what
        fails here is told when the batches are asked for.
        """
        if self._loader.num_workers > 0 and not self._is_ahead():
            self._ahead = _Ahead(self._batches.epoch, self._batches.start_batch, self._start())

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
        """End the workers. Those that live on until Python exits are waited for `GRACE_SECONDS` there."""
        self._ahead = None
        iterator = self._loader._iterator
        if iterator is not None:  # DataLoader has no method of its own for this.
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None

    def _read(self) -> Iterator[Batch]:
        """The batches as the workers make them; what happens to the workers becomes a `WorkerError`."""
        if self._loader.num_workers == 0:
            yield from self._loader
            return
        self.read_ahead()
        assert self._ahead is not None, "there are workers"
        batches, self._ahead = self._ahead.batches, None
        try:
            if isinstance(batches, Exception):
                raise batches
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

    def _is_ahead(self) -> bool:
        """Whether the workers are at the batches of the current position already."""
        position = self._batches.epoch, self._batches.start_batch
        return self._ahead is not None and self._ahead[:2] == position

    def _start(self) -> Iterator[Batch] | Exception:
        """Set the workers going from the current position; an error waits until the batches are read."""
        try:
            with death_noticed_later():
                return iter(self._loader)
        except (RuntimeError, OSError, EOFError) as error:
            return error

    def _leave_out(self, error: CorruptImageError | ImageReadError) -> None:
        if self._on_corrupt == "error" or isinstance(error, ImageReadError):
            # It is made anew, because `error` would keep its own frames alive.
            raise type(error)(error.path, error.reason)
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


class _Ahead(NamedTuple):
    """Batches that the workers have begun with before they are read."""

    epoch: int
    start_batch: int
    batches: Iterator[Batch] | Exception


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
        num_workers: processes that decode; they stay alive between epochs. 0 decodes in this process, which
            keeps what it has decoded as long as that is little (`Samples.keep_few`).
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
    _check_settings(dataset, batch_size, drop_last, num_workers, rank, world_size, on_corrupt)
    samples = Samples(dataset, transform, seed)
    if cache:
        samples.fill_cache()
    elif num_workers == 0:
        samples.keep_few()
    batches = BatchSampler(len(dataset), batch_size, shuffle, drop_last, seed, rank, world_size)
    generator = torch.Generator()  # This keeps DataLoader away from torch's global generator.
    generator.manual_seed(seed)
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        persistent_workers=num_workers > 0,
        multiprocessing_context=worker_context(num_workers),
        generator=generator,
    )
    return ImageLoader(samples, batches, loader, on_corrupt, transform.img_size)


def _check_settings(
    dataset: ImageDataset,
    batch_size: int,
    drop_last: bool,
    num_workers: int,
    rank: int,
    world_size: int,
    on_corrupt: str,
) -> None:
    """Refuse values out of range, and settings that give no batch.

    Raises:
        ValueError: what is wrong, and what was expected.
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
