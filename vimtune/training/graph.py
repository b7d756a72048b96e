"""The passes of batches as replays of CUDA graphs, one for each shape of a batch: forward and backward in
training, forward in evaluations.

Started one by one from Python, the kernels of a small model take longer to launch than to run; a
replay launches all of them at once. What is replayed is what runs eagerly: same kernels, same
results. Random numbers included: torch hands seed and offset of its default generator to a graph
before each replay, so after `torch.manual_seed` a replay draws what the eager batch would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vimtune.recipe.components import OptimisationSettings
from vimtune.tasks.job import Tensors
from vimtune.text import counted

Result = TypeVar("Result", Tensor, Tensors)
"""What the pass of a batch gives: the loss of a batch of training, or the answers of one of an evaluation."""


class CaptureError(RuntimeError):
    """A batch that no graph can hold, and why."""


def refusals(settings: OptimisationSettings, device: torch.device) -> list[str]:
    """Reasons why the batches of a run are not replayed; empty when they are."""
    reasons = []
    if settings.cuda_graph == "off":
        reasons.append("cuda_graph is off")
    if device.type != "cuda":
        reasons.append(f"the device is {device.type}")
    if settings.shard:
        reasons.append("the processes share the model (shard)")
    if settings.compile:
        reasons.append("torch.compile makes kernels and graphs of its own")
    if settings.grad_checkpointing:
        reasons.append("grad_checkpointing rewinds the random generator, which a replay cannot")
    if torch.is_anomaly_enabled():
        reasons.append("anomaly detection looks at values in between")
    return reasons


class Recorder(Protocol):
    """Where the work of a batch runs before it is recorded, and how it is recorded."""

    broken: bool
    """Whether what was recorded must not be replayed any more: a failed recording has taken the generator of
    random numbers away from it."""

    def run(self, work: Callable[[], Result]) -> Result:
        """Do the work now."""

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record the work without doing it: its result, and a function that does it again.

        Raises:
            CaptureError: the work cannot be recorded; nothing was done.
        """


class CudaRecorder:
    """Records on a stream of its own, as a capture has to; work before it runs there too, so that
    libraries have their handles and workspaces on that stream.

    All graphs compute in one pool of memory. They can, because they are replayed one after the other and
    nobody reads what one of them has computed once another one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.broken = False
        self.kept = 0
        """Bytes that the pool holds."""

    def run(self, work: Callable[[], Result]) -> Result:
        """Do the work now, on the stream of the recorder; see `Recorder.run`."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            result = work()
        caller.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Record the work as a CUDA graph; see `Recorder.record`."""
        torch.cuda.empty_cache()  # what is reserved from here on, the pool keeps
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.device.index]
        drawn = generator.clone_state()
        # torch.cuda.graph leaves its stream current when the capture fails; the outer block does not.
        # Other threads, which pin batches or watch collectives, may use the device meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with torch.cuda.stream(self.stream), recording:
                result = work()
        except RuntimeError as error:  # the only class torch has for what a capture does not allow
            # The generator may take itself to be recording still. Graphs that were recorded before stay with
            # its old state, which nobody seeds from here on.
            generator.graphsafe_set_state(drawn)
            self.broken = True
            raise CaptureError(_first_cause(error)) from error
        grown = torch.cuda.memory_reserved(self.device) - before
        self.kept += grown
        free, _ = torch.cuda.mem_get_info(self.device)
        if grown > 0 and self.kept > free:  # batches of other shapes need up to as much again
            graph.reset()
            raise CaptureError(
                f"the graphs keep {self.kept / 2**30:.1f} GiB of GPU memory and leave {free / 2**30:.1f} GiB "
                "to batches of other sizes"
            )
        return result, graph.replay


class BatchGraphs(Generic[Result]):
    """Runs batches, those of shapes that keep coming as replays.

    The first shape of a batch that has come up `warmup` times before is recorded: the full batch, or
    the only one of a small data set. Where more than one shape is worth it, each of the others is recorded
    when it comes for the second time, until there are `limit` graphs. Batches of any other shape, such as
    the last of an epoch or one with corrupt images left out, always run eagerly. In training both kinds add
    to the same gradients and may meet in one optimizer step. The graphs know where weights and gradients lie:
    they have to be changed in place and never replaced.
    """

    def __init__(
        self, recorder: Recorder, parameters: Iterable[nn.Parameter], *, warmup: int, limit: int = 1
    ) -> None:
        """Prepare to record.

        Args:
            recorder: records the passes.
            parameters: what the passes give gradients to; none in evaluations.
            warmup: how often the first shape to be recorded has run before, at least once.
            limit: how many shapes are recorded at most.
        """
        self.recorder = recorder
        self.parameters = list(parameters)
        self.warmup, self.limit = warmup, limit
        self.num_batches = self.num_replays = 0
        self._seen: dict[_Shape, _Seen] = {}
        self._recorded: dict[_Shape, _Recorded[Result]] = {}

    def __call__(self, run: Callable[[Tensors], Result], tensors: Tensors) -> Result:
        """What `run(tensors)` gives, valid until the next call; `run` always does the same.

        Raises:
            CaptureError: recording failed; the batch was not run. From here on all batches run eagerly:
                graphs that were recorded before may no longer draw from the generator that is seeded (see
                `CudaRecorder.record`).
        """
        self.num_batches += 1
        if self.recorder.broken:  # perhaps by others who record with it
            self._give_up()
        shape = _shape(tensors)
        if shape not in self._recorded:
            if len(self._recorded) >= self.limit:
                return run(tensors)
            if shape not in self._seen:
                self._seen[shape] = _Seen(tensors)
            seen = self._seen[shape]
            if seen.times < (1 if self._recorded else self.warmup):
                seen.times += 1
                return self.recorder.run(partial(run, tensors))
            try:
                for due in self._due(shape):
                    self._recorded[due] = self._record(run, self._seen.pop(due))
            except CaptureError:
                self._give_up()
                raise
        recorded = self._recorded[shape]
        for name, tensor in tensors.items():
            recorded.tensors[name].copy_(tensor)
        recorded.replay()
        self.num_replays += 1
        return recorded.result

    @property
    def summary(self) -> str:
        """What was recorded and how often it was replayed, in a few words."""
        shapes = counted(len(self._recorded), "shapes")
        return f"{shapes} of batches recorded, {self.num_replays:,} of {self.num_batches:,} batches replayed"

    def _give_up(self) -> None:
        """Run all batches eagerly from here on."""
        self._recorded.clear()
        self.limit = 0

    def _due(self, shape: _Shape) -> list[_Shape]:
        """What is recorded now that `shape` has come again: before it the largest shape that has come so far,
        if it is larger than all recorded ones, because in the memory of a large graph the smaller ones find
        room, while a larger one would need its own beside theirs."""
        largest = max(self._seen, key=_size)
        others = [shape, *self._recorded]
        if _size(largest) > max(map(_size, others)) and len(self._recorded) + 2 <= self.limit:
            return [largest, shape]
        return [shape]

    def _record(self, run: Callable[[Tensors], Result], like: _Seen) -> _Recorded[Result]:
        """Record the pass of a batch like one that was seen."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        tensors = {name: torch.empty_like(t, device=like.devices[name]) for name, t in like.tensors.items()}
        result, replay = self.recorder.record(partial(run, tensors))
        return _Recorded(tensors, result, replay)


class _Seen:
    """A shape that has come and is not recorded."""

    def __init__(self, tensors: Tensors) -> None:
        self.times = 0
        """How many batches of it have run."""
        self.tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
        """Tensors of its sizes and types, without any memory."""
        self.devices = {name: tensor.device for name, tensor in tensors.items()}
        """Where they lie."""


@dataclass(frozen=True)
class _Recorded(Generic[Result]):
    """A graph, and the tensors that it reads and writes."""

    tensors: Tensors
    result: Result
    replay: Callable[[], None]


_Shape = tuple[tuple[str, torch.Size], ...]


def _shape(tensors: Tensors) -> _Shape:
    """Names and shapes of the tensors of a batch."""
    return tuple((name, tensor.shape) for name, tensor in tensors.items())


def _size(shape: _Shape) -> int:
    """How many numbers a batch of a shape holds."""
    return sum(size.numel() for _, size in shape)


def _first_cause(error: BaseException) -> str:
    """What went wrong first: ending a failed capture raises an error of its own that says little."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
