"""Batches of an image data set in the form in which the trainer wants them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vimtune.data import CorruptImageError, DatasetError, ImageLoader, ImageReadError, TooManyCorruptError
from vimtune.data.loading.worker_count import AS_ASKED, HERE, WorkerCount
from vimtune.tasks.job import Batch, InputError, Loader
from vimtune.text import printable, shorten


@dataclass(frozen=True)
class _Unfinished(Batch):
    """A batch of an `ImageLoader` before its images are finished, which happens where they arrive."""

    finish: Callable[[Mapping[str, Tensor]], Tensor]
    """Makes what a model takes of the tensors; see `ImageLoader.finish`."""
    kept: Collection[str]
    """The names of the tensors that the finished batch has beside its images."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, with images (b, 3, H, W) as a model takes them."""
        moved = super().to(device).tensors
        kept = {name: moved[name] for name in self.kept}
        return Batch({"images": self.finish(moved), **kept}, self.count)


class ImageBatches(Loader):
    """The batches of an `ImageLoader`, as tensors "images" and "labels" (b,).

    The images are those of `ImageLoader.unfinished` until `Batch.to` makes of them what a model takes. Where
    images are scored, "places" (b,) are their numbers in the split.
    """

    def __init__(self, loader: ImageLoader, workers: WorkerCount = HERE, *, numbered: bool = False) -> None:
        """Batches.

        Args:
            loader: makes them.
            workers: how many processes the loader has, and why.
            numbered: whether batches have "places".
        """
        self._loader, self._numbered = loader, numbered
        self.num_workers = workers.number
        if workers.reason != AS_ASKED:
            self.reading = f"images {loader.work} by {workers}"
        self.dataset = loader.dataset
        self.split, self.source = loader.dataset.split, loader.dataset.source
        self.num_examples = len(loader.dataset)

    def fingerprint(self) -> str:
        """A hash that changes when the images of the split do."""
        return self.dataset.fingerprint()

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch and the first batch of the next iteration."""
        self._loader.set_position(epoch, start_batch)

    def read_ahead(self) -> None:
        """Have the first images of the next iteration prepared while something else is done."""
        self._loader.read_ahead()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's share of the batches.

        Raises:
            InputError: a file or the system refuses to be read, or a process that reads has died.
            TooManyCorruptError: what was trained since the last state is not worth a new one.
        """
        try:
            for parts, labels, numbers in self._loader.unfinished():
                kept = {"labels": labels}
                if self._numbered:
                    places = torch.from_numpy(numbers)
                    kept["places"] = places.pin_memory() if labels.is_pinned() else places
                yield _Unfinished(parts | kept, len(labels), self._loader.finish, tuple(kept))
        except TooManyCorruptError:
            raise
        except CorruptImageError as error:
            skip = f"{_one_line(error)}. Leave such images out with --on-corrupt skip"
            raise InputError(
                f"{skip}, or replace or remove the file",
                in_run=f"{skip}, with which a run can be continued, too; or replace or remove the file and "
                "begin anew",
            ) from error
        except ImageReadError as error:
            raise InputError(
                f"{_one_line(error)}. This is an error of the system, not of the image"
            ) from error
        except (DatasetError, OSError) as error:
            raise InputError(_one_line(error)) from error

    def left_out(self) -> Collection[str]:
        """Paths of the corrupt images that this process has met and left out."""
        return self._loader.skipped_paths

    def close(self) -> None:
        """End the processes that prepare images."""
        self._loader.close()


def _one_line(error: Exception) -> str:
    """The message of an error.

    Of an error that a worker process sent, with its trace, it is the last line.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(printable(lines[-1] if lines[0].startswith("Caught ") else lines[0]), 400)
