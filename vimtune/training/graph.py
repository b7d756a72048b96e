"""Forward and backward of a batch as replays of one CUDA graph.

Started one by one from Python, the kernels of a small model take longer to launch than to run; a
replay launches all of them at once. What is replayed is what runs eagerly: same kernels, same
results. Random numbers included: torch hands seed and offset of its default generator to a graph
before each replay, so after `torch.manual_seed` a replay draws what the eager batch would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vimtune.recipe.components import OptimisationSettings
from vimtune.tasks.job import Tensors

BatchPass = Callable[[Tensors], Tensor]
"""Runs a batch: returns its loss and adds the gradients of the loss to those of the parameters."""


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

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work now."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record the work without doing it: its result, and a function that does it again.

        Raises:
            CaptureError: the work cannot be recorded; nothing was done.
        """


class CudaRecorder:
    """Records on a stream of its own, as a capture has to; work before it runs there too, so that
    libraries have their handles and workspaces on that stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work now, on the stream of the recorder; see `Recorder.run`."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            result = work()
        caller.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record the work as a CUDA graph; see `Recorder.record`."""
        torch.cuda.empty_cache()  # what is reserved from here on, the graph keeps
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.device.index]
        drawn = generator.clone_state()
        # torch.cuda.graph leaves its stream current when the capture fails; the outer block does not.
        # Other threads, which pin batches or watch collectives, may use the device meanwhile.
        recording = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self.stream), recording:
                result = work()
        except RuntimeError as error:  # the only class torch has for what a capture does not allow
            generator.graphsafe_set_state(drawn)  # the other one may take itself to be recording still
            raise CaptureError(_first_cause(error)) from error
        kept = torch.cuda.memory_reserved(self.device) - before
        free, _ = torch.cuda.mem_get_info(self.device)
        if kept > free:  # batches of other shapes need up to as much again
            graph.reset()
            raise CaptureError(
                f"the graph keeps {kept / 2**30:.1f} GiB of GPU memory and leaves {free / 2**30:.1f} GiB "
                "to batches of other sizes"
            )
        return result, graph.replay


class BatchGraph:
    """Runs batches, from the moment it has recorded one as replays.

    The first shape of a batch that has come up `warmup` times before is recorded: the full batch, or
    the only one of a small data set. Batches of other shapes, such as the last of an epoch or one
    with corrupt images left out, always run eagerly. Both kinds add to the same gradients and may
    meet in one optimizer step. The graph knows where the gradients lie: they have to be zeroed in
    place and never replaced.
    """

    def __init__(self, recorder: Recorder, parameters: Iterable[nn.Parameter], warmup: int) -> None:
        self.recorder = recorder
        self.parameters = list(parameters)
        self.warmup = warmup
        self.num_replays = 0
        self._seen: Counter[_Shape] = Counter()
        self._recorded: _Recorded | None = None

    def __call__(self, run: BatchPass, tensors: Tensors) -> Tensor:
        """The loss of `run(tensors)`, valid until the next call; `run` is always the same.

        Raises:
            CaptureError: recording failed; the batch was not run.
        """
        shape = _shape(tensors)
        if self._recorded is None:
            if self._seen[shape] < self.warmup:
                self._seen[shape] += 1
                return self.recorder.run(partial(run, tensors))
            self._recorded = self._record(run, tensors)
        recorded = self._recorded
        if shape != recorded.shape:
            return run(tensors)
        for name, tensor in tensors.items():
            recorded.tensors[name].copy_(tensor)
        recorded.replay()
        self.num_replays += 1
        return recorded.loss

    def _record(self, run: BatchPass, tensors: Tensors) -> _Recorded:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        tensors = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        loss, replay = self.recorder.record(partial(run, tensors))
        return _Recorded(_shape(tensors), tensors, loss, replay)


class _Recorded(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    shape: _Shape
    tensors: Tensors
    loss: Tensor
    replay: Callable[[], None]


_Shape = tuple[tuple[str, torch.Size], ...]


def _shape(tensors: Tensors) -> _Shape:
    """Names and shapes of the tensors of a batch."""
    return tuple((name, tensor.shape) for name, tensor in tensors.items())


def _first_cause(error: BaseException) -> str:
    """What went wrong first: ending a failed capture raises an error of its own that says little."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
