"""What every loader of images offers, wherever its batches come from."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from vimtune.data.base import ImageDataset
from vimtune.data.errors import CorruptImageError, ImageReadError, TooManyCorruptError
from vimtune.data.loading.batch_sampler import BatchSampler
from vimtune.data.loading.samples import Batch
from vimtune.text import printable

logger = logging.getLogger(__name__)

_MAX_CORRUPT_SHARE = 0.5
"""Share of the images of an epoch that may be left out as corrupt."""
_ENOUGH_TO_JUDGE = 100
"""Number of images after which that share counts before the epoch has ended."""


class ImageLoader(ABC):
    """Iterates over one epoch of this rank's batches. Made by `create_loader`.

    Iterating yields `(images, labels)`: float32 (b, 3, H, W) and what `targets_of` gives for them, such as
    int64 (b,). A global batch is split
    contiguously over the ranks, so `b` may differ by one between ranks where it does not divide; it may be 0
    in the last batch of an epoch that is not dropped, or where all images of a rank's share were skipped.
    Every rank sees the same number of batches.

    Iterating raises, besides what the data set's `load` and the transform do:
        CorruptImageError: an image is corrupt, and such are not to be left out.
        TooManyCorruptError: more than half of the images are left out.
        ImageReadError: the system cannot read an image.
        WorkerError: a worker died.

    Attributes:
        dataset: the data set that is read.
        num_skipped: corrupt images left out so far, each occurrence counted.
        skipped_paths: which images were left out.
        work: what processes do with images, if there are any.
    """

    work = "prepared"

    def __init__(self, dataset: ImageDataset, batches: BatchSampler, on_corrupt: str) -> None:
        self.dataset = dataset
        self.num_skipped = 0
        self.skipped_paths: set[str] = set()
        self._batches = batches
        self._on_corrupt = on_corrupt

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
        return ((self.finish(parts), labels) for parts, labels, _ in self._judged())

    def unfinished(
        self,
    ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray[Any, Any]]]:
        """Iterate over `(parts, labels, places)`, of which `finish` makes the images; places are those of the
        images in the data set, int64 (b,).

        Where workers make them, "images" among the parts are bytes, which reach a GPU in a quarter of the
        time that a model's input takes.
        """
        shares = self._batches.shares(self._batches.epoch, self._batches.start_batch)
        for share, (parts, labels, failures) in zip(shares, self._judged(), strict=True):
            read, missing = share % len(self.dataset), [sample.image for sample in failures]
            yield parts, labels, read[np.isin(read, missing, invert=True)].astype(np.int64)

    def _judged(self) -> Iterator[Batch]:
        """The batches with what is missing in them, which is counted and limited."""
        whole = self._batches.start_batch == 0
        seen = left_out = 0
        last: CorruptImageError | ImageReadError | None = None
        for batch in self._read():
            for _, last in batch.failures:
                self._leave_out(last)
            seen += len(batch.labels) + len(batch.failures)
            left_out += len(batch.failures)
            if seen >= _ENOUGH_TO_JUDGE:
                self._judge(left_out, seen, last)
            yield batch
        if whole:
            self._judge(left_out, seen, last)

    def finish(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a model takes, float32 (b, 3, H, W), of the parts of `unfinished`, on the device where they
        are."""
        return parts["images"]

    @abstractmethod
    def _read(self) -> Iterator[Batch]:
        """This rank's batches from the position on, with the images that are missing there."""

    def read_ahead(self) -> None:  # noqa: B027 - not every loader has processes
        """Let processes begin now with the batches that the next iteration is to yield, if there are any."""

    def close(self) -> None:  # noqa: B027 - not every loader has processes
        """End the processes that prepare images, if there are any."""

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
