"""The processes of a run, and the few collectives that it needs.

The launcher describes the processes in environment variables (`launch.py`); without them
the run is one process and every collective here is the identity. Gradients are summed by one flat
all-reduce per optimizer step rather than by DistributedDataParallel: what an adapter trains is
small, micro-batches then communicate once, a process whose share of a batch is empty still
takes part, and the passes stay what is recorded as a CUDA graph on one GPU. A model that is shared out among
the processes has ways of its own (`sharding.py`).

What the hosts tell each other travels between the hosts, by gloo, also where NCCL connects the GPUs: nobody
waits for a GPU in order to know how many images the others have.

No process waits for ever. Before they join, all of them wait `JOIN_TIMEOUT` for each other and tell whether
they can start. While the run is set up, a process that fails says why where the others exchange their next
values; what the main process does before the others, such as a download, may take `MAIN_TIMEOUT`. Later, a
process that died ends the others at their next collective: at once with gloo, whose connection breaks; with
NCCL when the launcher stops them (torchrun does so within 30 seconds); and after `TIMEOUT` where only its
machine has fallen silent.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vimtune.runtime.device import resolve_device
from vimtune.runtime.launch import Launch, read_launch
from vimtune.text import printable, quote, shorten

JOIN_TIMEOUT = timedelta(minutes=5)
"""How long the processes wait for the last one to start."""
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others in a collective."""
MAIN_TIMEOUT = timedelta(hours=12)
"""How long the others wait for what the main process does alone; they notice when it ends."""


class ProcessesError(ValueError):
    """Another process failed, or the processes do not fit together; raised in every one of them."""


class PeerLostError(ValueError):
    """Another process has ended, or does not answer any more."""

    def __init__(self, more: str = "") -> None:
        """`more` goes on with the sentence."""
        super().__init__(f"another process of the run has ended or does not answer any more{more}")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1
    """How many of the processes are on this machine."""
    store: dist.Store | None = None
    """Where the processes leave each other notes; None where others brought them together."""
    _turns: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)
    """Numbers the blocks of `main_first`."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes, on the device it came from."""
        if self.world_size == 1:
            return tensor
        between_hosts = tensor.device.type == "cpu" and "cpu:" in dist.get_backend_config()
        total = tensor.to(tensor.device if between_hosts else self.device, copy=True)
        _meet(dist.all_reduce, total)
        return total.to(tensor.device)

    def all(self, flag: bool) -> bool:
        """Whether `flag` is true in every process."""
        return int(self.sum(torch.tensor(int(flag)))) == self.world_size

    def sum_gradients_(self, parameters: Sequence[Tensor]) -> None:
        """Sum `.grad` of `parameters` over all processes; a missing gradient counts as zero."""
        if self.world_size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        _meet(dist.all_reduce, flat)
        pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
        # Few launches for all tensors: one for each would take longer than the sum itself.
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank.

        Raises:
            ProcessesError: another process has failed in a block of `failing_together`.
        """
        return [value] if self.world_size == 1 else self._exchange(value, None)

    def from_main(self, value: Any) -> Any:
        """The main process's `value`, in every process."""
        return self.gather(value)[0]

    def demand_same(self, values: Mapping[str, Any]) -> None:
        """Compare `values` with those of the other processes.

        Raises:
            ProcessesError: they differ; the message names the first difference.
        """
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, 1):
            for name in [*first, *(name for name in other if name not in first)]:
                if first.get(name) != other.get(name):
                    raise ProcessesError(
                        f"the processes of a run must work on the same: {name} is {quote(first.get(name))} "
                        f"in process 0 and {quote(other.get(name))} in process {rank}. Give all of them the "
                        "same recipe, data and weights"
                    )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let an error in one process end all: its message reaches the others at their next `gather`.

        For blocks whose only collectives are those of this class that exchange values, not tensors.
        """
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except (ProcessesError, PeerLostError):  # the others know
            raise
        except (ValueError, OSError) as error:
            self._exchange(None, str(error))
        else:
            self.gather(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process run the block before the others (for downloads and caches)."""
        note = f"main process through block {next(self._turns)}"
        if not self.is_main:
            if self.store is not None:
                _meet(_wait_for, self.store, note)
            self.gather(None)
        with self.failing_together():
            try:
                yield
            finally:
                if self.is_main and self.store is not None:
                    self.store.set(note, "")
        if self.is_main:
            self.gather(None)

    def _exchange(self, value: Any, error: str | None) -> list[Any]:
        answers: list[Any] = [None] * self.world_size
        _meet(dist.all_gather_object, answers, (value, error))
        _raise_first([error for _, error in answers])
        return [value for value, _ in answers]


def _raise_first(errors: Sequence[str | None]) -> None:
    for rank, error in enumerate(errors):
        if error is not None:
            raise ProcessesError(f"process {rank}: {error}")


def _wait_for(store: dist.Store, note: str) -> None:
    """Wait for a note, longer than a collective does.

    It is asked for again and again: one long question would keep those of torch's own threads waiting.

    Raises:
        RuntimeError: the process with the store has ended, or there is no note after `MAIN_TIMEOUT`.
    """
    deadline = time.monotonic() + MAIN_TIMEOUT.total_seconds()
    while not store.check([note]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {note} within {MAIN_TIMEOUT}")
        time.sleep(0.05)


def _meet(collective: Callable[..., Any], *arguments: Any) -> None:
    """Run a collective; what it raises when a process is missing becomes a `PeerLostError`."""
    try:
        collective(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLostError from error


@contextmanager
def open_processes(device_name: str, prepare: Callable[[], None] = lambda: None) -> Iterator[Processes]:
    """Join the processes announced by the environment, if any, and choose this process's device.

    `prepare` runs before and may refuse the run; then no process of it starts.

    Raises:
        ValueError: from `prepare`, or no such device.
        ProcessesError: another process cannot start, or did not within `JOIN_TIMEOUT`.
    """
    launch = read_launch()
    joins = launch.world_size > 1 and not dist.is_initialized()
    refusal: ValueError | None = None
    device, store = torch.device("cpu"), None
    try:
        prepare()
        device = resolve_device(device_name, launch.local_rank, launch.local_size, launch.own_gpu)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except ValueError as error:
        if not joins:
            raise
        refusal = error
    if joins:
        store = _join(launch, device, refusal)
    notes = logging.getLogger("vimtune")
    level = notes.level
    if launch.rank > 0:  # one process tells what all of them do; warnings pass
        notes.setLevel(max(logging.WARNING, level))
    try:
        yield Processes(launch.rank, launch.world_size, device, launch.local_size, store)
    finally:
        notes.setLevel(level)
        if joins:
            dist.destroy_process_group()


def _join(launch: Launch, device: torch.device, refusal: ValueError | None) -> dist.Store:
    """Form the group of processes, unless one of them has a `refusal`: then raise it in all of them.

    The roll call goes through the store that torch uses to bring the processes together: it needs neither
    a device nor a group yet.

    Returns:
        The store.
    """
    rank, world_size = launch.rank, launch.world_size
    try:
        store, _, _ = next(rendezvous(launch.meeting, rank=rank, world_size=world_size, timeout=JOIN_TIMEOUT))
        store.set(f"vimtune/refusal/{rank}", "" if refusal is None else str(refusal))
        answers = [store.get(f"vimtune/refusal/{other}").decode() for other in range(world_size)]
        store.set(f"vimtune/heard/{rank}", "")
        if any(answers) and rank == 0:  # whose end closes the store
            store.wait([f"vimtune/heard/{other}" for other in range(world_size)], JOIN_TIMEOUT)
    except (RuntimeError, ValueError) as error:  # not there in time, or no address to meet at
        if refusal is not None:
            raise refusal from error
        raise ProcessesError(
            f"process {rank} of {world_size} did not meet the others within "
            f"{JOIN_TIMEOUT.total_seconds() / 60:g} minutes ({_reason(error)})"
        ) from error
    _raise_first([answer or None for answer in answers])
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("vimtune/group", store),
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=device if on_gpu else None,  # connects the GPUs now, so that a failure shows here
        )
    except RuntimeError as error:
        raise ProcessesError(
            f"process {rank} of {world_size} on {device} cannot be connected with the others "
            f"({_reason(error)})"
        ) from error
    return PrefixStore("vimtune/notes", store)


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return shorten(printable(str(error).partition("\n")[0]))
