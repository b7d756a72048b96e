"""Between host and device while the device works: batches go there, a few numbers come back.

On a GPU both are copies beside the computation: the batches of the next optimizer step travel on a
stream of their own during the current one, and the host takes the current step's numbers from
page-locked memory as soon as they are there, whatever the device still has to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor

from vimtune.tasks.job import Batch, Tensors


class WindowReader:
    """Puts the batches of a loader on the device, grouped by optimizer step.

    On a GPU `fetch_ahead` reads and sends the next window before it is asked for; without that call,
    and on any other device, each window is read when its turn comes. A fetched window that is never
    requested is discarded: the position of a run counts the windows that it was given.
    Copies run beside the computation if the loader's batches are in page-locked memory.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        """`size` batches make a window, which is one optimizer step."""
        self.device, self.size = device, size
        self.ahead = device.type == "cuda"
        # One for the whole run: memory that is freed stays with the stream it was made for.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: Iterator[Batch] = iter(())
        self._fetched: list[Batch] | Exception | None = None

    def read(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Yield the windows of `batches`, on the device; the last one may be shorter.

        An error of the loader is raised when its window is asked for.
        """
        self._batches, self._fetched = iter(batches), None
        while True:
            fetched = self._fetch() if self._fetched is None else self._fetched
            self._fetched = None
            if isinstance(fetched, Exception):
                raise fetched
            if not fetched:
                return
            self._receive(fetched)
            yield fetched

    def fetch_ahead(self) -> bool:
        """Read the next window now and start to copy it, unless the device is not worth it.

        Returns:
            Whether a next window lies ready: neither the end nor an error of the loader.
        """
        if self.ahead and self._fetched is None:
            self._fetched = self._fetch()
        return bool(self._fetched) and not isinstance(self._fetched, Exception)

    def _fetch(self) -> list[Batch] | Exception:
        try:
            window = list(islice(self._batches, self.size))
        except Exception as error:  # the current step has nothing to do with it
            return error
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return [batch.to(self.device) for batch in window]

    def _receive(self, window: list[Batch]) -> None:
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in (tensor for batch in window for tensor in batch.tensors.values()):
            tensor.record_stream(current)  # not to be reused for a copy before the computation is through


class Arriving:
    """Tensors on their way from the device; what is launched after them does not delay them."""

    def __init__(self, tensors: Tensors) -> None:
        """Copy `tensors`, which may be written over by what is launched next."""
        # To page-locked memory, if they come from an NVIDIA GPU. Of another device nothing would say when
        # they have arrived.
        self._copies = {
            name: tensor.to("cpu", non_blocking=tensor.is_cuda, copy=True) for name, tensor in tensors.items()
        }
        self._arrived = None
        for tensor in tensors.values():
            if tensor.is_cuda and self._arrived is None:
                self._arrived = torch.cuda.Event()
                self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensors:
        """Wait for the tensors."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copies


class Readback:
    """A few numbers on their way from the device."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        """The numbers where they were computed, a tensor of one dimension."""
        self._arriving = Arriving({"values": values})

    def read(self) -> list[float]:
        """Wait for the numbers."""
        numbers: list[float] = self._arriving.read()["values"].tolist()
        return numbers
