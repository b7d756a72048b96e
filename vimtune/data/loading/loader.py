"""Batches of a data set: deterministic for any number of workers and processes, resumable at any batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from vimtune.data.base import ImageDataset
from vimtune.data.device.augmentation import Augmentation
from vimtune.data.loading.batch_sampler import BatchSampler
from vimtune.data.loading.cache_places import Agreement, cache_place
from vimtune.data.loading.cropped import CroppedSamples
from vimtune.data.loading.image_loader import ImageLoader
from vimtune.data.loading.resident.loader import ResidentLoader
from vimtune.data.loading.resident.store import DoesNotFitError, fill_store
from vimtune.data.loading.samples import Batch, Samples, TransformedSamples
from vimtune.data.loading.workers import (
    death_noticed_later,
    naming_worker_trouble,
    prepare_worker,
    worker_context,
)
from vimtune.data.transforms import Transform, is_random

logger = logging.getLogger(__name__)


class WorkerLoader(ImageLoader):
    """Reads batches that processes decode and transform, or this process where there are none."""

    def __init__(
        self,
        samples: Samples,
        batches: BatchSampler,
        loader: DataLoader[Any],
        on_corrupt: str,
    ) -> None:
        super().__init__(samples.dataset, batches, on_corrupt)
        self._samples = samples
        self._loader = loader
        self._ahead: _Ahead | None = None

    def read_ahead(self) -> None:
        """Let the workers begin now with the batches that the next iteration is to yield.

        An iteration that starts at another position begins anew. Without workers nothing happens, and what
        fails here is told when the batches are asked for.
        """
        if self._loader.num_workers > 0 and not self._is_ahead():
            self._ahead = _Ahead(self._batches.epoch, self._batches.start_batch, self._start())

    def finish(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a model takes of what the workers make; see `Samples.finish`."""
        return self._samples.finish(parts)

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
            with naming_worker_trouble():
                if isinstance(batches, Exception):
                    raise batches
                yield from batches
        finally:
            # The error holds this frame. If the frame held the error, only the garbage collector would free
            # both with the loader, and it does so in an order in which the workers are never told to end.
            del batches

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
    cache: str | bool = "none",
    once: bool = False,
    device: torch.device | None = None,
    agree: Agreement = bool,
    on_corrupt: str = "error",
    pin_memory: bool = False,
    balanced: bool = False,
) -> ImageLoader:
    """Build a loader.

    The order is a pure function of (seed, epoch), the randomness of an image one of (seed, epoch, index):
    neither workers nor ranks nor the batch at which iteration starts change them.

    Args:
        batch_size: images per batch over all ranks together.
        shuffle: a new permutation each epoch; False keeps the order of the data set.
        drop_last: leave out the last batch when it is smaller.
        num_workers: processes that decode; they stay alive between epochs. 0 decodes in this process, which
            keeps what it has decoded as long as that is little (`Samples.keep_few`) and read again.
        rank: which share of each batch is ours.
        world_size: how many shares there are.
        cache: where decoded images are kept, one of `CACHES`; every rank keeps its own. "host": every image
            is decoded once, now, and stays in memory (uint8, full size). The workers are forked and read the
            same pages. At most half of the free memory is used; what does not fit is decoded each time,
            with the same result. "device": the same on `device`, all of it, and batches are made there; the
            augmentation is that of `vimtune.data.device`, whichever library `transform` names.
            "auto": "device" if that is a GPU and they fit, else "none".
        once: the images are read a single time, so none is kept; with "device" they are if they fit, because
            a process that goes on to another run finds them there.
        device: where batches are wanted; None for the host. Only a cache on the device puts them there.
        agree: decides for "auto" where there are several ranks; by default each decides for itself.
        on_corrupt: "error" raises `CorruptImageError`, "skip" leaves such images out of their batch, unless
            they are more than half of an epoch, or of what was read of it after the first 100 images.
        pin_memory: put batches in page-locked memory for faster copies to a GPU.
        balanced: show every class equally often in an epoch, which is as long as without; needs `shuffle`.

    Raises:
        ValueError: a value out of range, or settings that give no batch at all.
        DoesNotFitError: the images do not fit on the device on which they are to be kept.
    """
    _check_settings(dataset, batch_size, drop_last, num_workers, rank, world_size, on_corrupt)
    place = cache_place(cache)
    if once:
        place = "auto" if place == "device" else "none"
    device = device or torch.device("cpu")
    labels = dataset.targets if balanced else None
    batches = BatchSampler(len(dataset), batch_size, shuffle, drop_last, seed, rank, world_size, labels)
    store = None
    if place == "device" or (place == "auto" and _is_gpu(device)):
        try:
            store = fill_store(dataset, transform.preprocessing, device, num_workers)
        except DoesNotFitError as error:
            if place == "device":
                raise
            logger.info("decoded images are not kept: %s", error)
        if place == "auto" and not agree(store is not None):
            store = None
    if store is not None:
        augmentation = Augmentation(transform.preprocessing)
        return ResidentLoader(dataset, store, augmentation, batches, seed, on_corrupt)
    samples = samples_for(dataset, transform, seed, device)
    if isinstance(samples, CroppedSamples):
        logger.info("%s: cropped where images are decoded, and augmented on %s", dataset.split, device)
    if place == "host":
        samples.fill_cache()
    elif num_workers == 0 and not once:
        samples.keep_few()
    generator = torch.Generator()  # This keeps DataLoader away from torch's global generator.
    generator.manual_seed(seed)
    loader: DataLoader[Any] = DataLoader(
        samples,
        sampler=batches,
        batch_size=None,  # The samples are batches already.
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        persistent_workers=num_workers > 0,
        multiprocessing_context=worker_context(num_workers),
        generator=generator,
    )
    return WorkerLoader(samples, batches, loader, on_corrupt)


def samples_for(dataset: ImageDataset, transform: Transform, seed: int, device: torch.device) -> Samples:
    """The samples that a data set becomes on the way to a device.

    What follows the random crops is done by a GPU, where it costs next to nothing and is the same as with the
    images kept there; on a CPU by the library of `transform`.
    """
    if _is_gpu(device) and is_random(transform.preprocessing):
        return CroppedSamples(dataset, Augmentation(transform.preprocessing), seed)
    return TransformedSamples(dataset, transform, seed)


def _as_it_is(batch: Any) -> Any:
    """A batch as the samples have made it; the function has a name because workers may have to pickle it."""
    return batch


def _is_gpu(device: torch.device) -> bool:
    """Whether a device is worth being augmented on."""
    return device.type == "cuda"


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
