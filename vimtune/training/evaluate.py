"""The evaluation of a model on a split: a task's tally, summed over batches and processes.

`evaluate` is that of a run, between its epochs; `evaluate_trial` that of a model which is not trained.

On a GPU the host counts a batch while the device computes the next one: it never waits for what it has just
launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.runtime.precision import Autocast, build_autocast, in_precision
from vimtune.tasks.job import Batch, Evaluation, InputError, Scoring, Tally, Tensors, Trial
from vimtune.training.graph import BatchGraphs, CaptureError
from vimtune.training.guard import NonFiniteError, find_nonfinite, finite_flag
from vimtune.training.prefetch import Arriving, WindowReader
from vimtune.training.sharding import Placement, Replicated

FINITE = "outputs are finite"
"""Name, beside those of a tally, of the flag that says so of a batch."""


class Replays(NamedTuple):
    """What replays the batches of evaluations."""

    graphs: BatchGraphs[Tensors]
    warn: Callable[[str], None]
    """Told when a graph could not be recorded."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    tally: Tally,
    *,
    device: torch.device,
    autocast: Autocast,
    placement: Placement | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    windows: WindowReader | None = None,
    replays: Replays | None = None,
) -> Evaluation | None:
    """Score `model` on this process's share of a split and add up the shares of all processes.

    Processes that share the model (`Sharded`) stop at the same batch.

    Args:
        model: in any mode; it is scored in evaluation mode and left in the mode it was in.
        batches: this process's share.
        tally: an empty tally of the task.
        device: where the model is.
        autocast: opens the block in which the model runs.
        placement: where the model lies, and the processes of the run; one process by default.
        should_stop: asked before each batch and after the last one.
        windows: brings batches to the device one by one; made here by default.
        replays: replays the passes. They are those of one model and one job in all its calls. None runs them
            one operation after the other.

    Returns:
        None, in every process, when `should_stop` became true in any of them, or when the data of another
        process cannot be read.

    Raises:
        InputError: the data of this process cannot be read.
        NonFiniteError: the model's outputs have inf or NaN; the message says where that begins.
        ValueError: there was nothing to score.
    """
    placement = placement or Replicated(Processes())
    windows = windows or WindowReader(device, 1)
    processes = placement.processes
    counting = _Counting(model, tally, placement, autocast, replays, late=device.type == "cuda")

    stopped = False
    failure: InputError | None = None
    was_training = model.training
    model.eval()
    try:
        shares, window = windows.read(batches), None
        while True:
            try:
                window = next(shares, None)
            except InputError as error:  # raised below, after the others have been told to stop
                failure = error
            stopped = placement.any(failure is not None or should_stop())
            if stopped or window is None:
                break
            with placement.meeting():
                for part in placement.parts(window):
                    counting.add(part.batch.tensors, part.own)
            windows.fetch_ahead()
        if not stopped:
            with placement.meeting():
                counting.finish()
    finally:
        model.train(was_training)
    stopped = bool(processes.sum(torch.tensor(int(stopped))))
    if failure is not None:
        raise failure
    if stopped:
        return None
    for total in tally.totals.values():
        total.copy_(processes.sum(total))
    evaluation = tally.evaluation()
    if evaluation.count == 0:
        raise ValueError("there is nothing to score: the split is empty, or all of it is corrupt")
    return evaluation


def evaluate_trial(
    trial: Trial, recipe: Recipe, processes: Processes
) -> tuple[Evaluation, Evaluation | None]:
    """Score the model of a trial on its split, and on the validation split where the trial has one.

    Args:
        trial: an open trial whose tallies are empty.
        recipe: that of the trial; its precision is the one in which the model runs.
        processes: those that share the examples. Each has the whole model.

    Returns:
        The evaluation of the trial's split, and that of the validation split, which is the same one where
        that is the trial's split. None in its place where the trial has no validation split.

    Raises:
        InputError: the data of one of the processes cannot be read; all of them raise it.
        NonFiniteError, ValueError: as `evaluate`.
    """

    def score(scoring: Scoring) -> Evaluation:
        found, failure = None, None
        try:
            found = evaluate(
                trial.model,
                scoring.loader,
                scoring.tally,
                device=processes.device,
                autocast=build_autocast(recipe.optimisation.amp, processes.device),
                placement=Replicated(processes),
            )
        except InputError as error:
            failure = error
        if found is None:  # in every process, as nothing but data that cannot be read ends it early
            texts = processes.gather(None if failure is None else str(failure))
            raise InputError(next(text for text in texts if text is not None)) from failure
        return found

    own = score(Scoring(trial.loader, trial.tally))
    if trial.held_out is None:
        return own, None
    return own, own if trial.held_out.tally is trial.tally else score(trial.held_out)


class _Launched(NamedTuple):
    """A batch that the device works on."""

    tensors: Tensors
    own: bool
    judged: Arriving


class _Counting:
    """Launches the passes of an evaluation and counts what comes of them, in their order."""

    def __init__(
        self,
        model: nn.Module,
        tally: Tally,
        placement: Placement,
        autocast: Autocast,
        replays: Replays | None,
        *,
        late: bool,
    ) -> None:
        """`late` counts a batch when the next one has been launched; the rest is as for `evaluate`."""
        self._model, self._tally, self._placement = model, tally, placement
        self._forward = in_precision(model, autocast)
        self._replays, self._late = replays, late
        self._launched: deque[_Launched] = deque()

    def add(self, tensors: Tensors, own: bool) -> None:
        """Launch a batch; one that is not `own` is run along with another process and not counted."""
        self._launched.append(_Launched(tensors, own, Arriving(self._run(tensors))))
        while len(self._launched) > self._late:
            self._count(self._launched.popleft())

    def finish(self) -> None:
        """Count what has been launched."""
        while self._launched:
            self._count(self._launched.popleft())

    def _run(self, tensors: Tensors) -> Tensors:
        if self._replays is not None:
            try:
                return self._replays.graphs(self._judge, tensors)
            except CaptureError as error:
                which = "all" if self._replays.graphs.recorder.broken else "its"
                self._replays.warn(
                    "the CUDA graph of an evaluation could not be recorded, "
                    f"{which} batches run eagerly: {error}"
                )
        return self._judge(tensors)

    def _judge(self, tensors: Tensors) -> Tensors:
        """What the tally takes, and the flag `FINITE`."""
        flags: list[Tensor] = []

        def watched(*inputs: Any, **named: Any) -> Any:
            outputs = self._forward(*inputs, **named)
            flags.append(finite_flag(outputs, next(iter(tensors.values())).device))
            return outputs

        judged = self._tally.judge(watched, tensors)
        return {**judged, FINITE: torch.stack(flags).all()}

    def _count(self, launched: _Launched) -> None:
        """Wait for the answers to a batch and count them.

        Raises:
            NonFiniteError: some are not finite.
        """
        judged = launched.judged.read()
        anywhere = self._placement.any
        if anywhere(not bool(judged.pop(FINITE))):
            run = partial(self._tally.judge, self._forward, launched.tensors)
            place = find_nonfinite(self._model, launched.tensors, run, backward=False, anywhere=anywhere)
            raise NonFiniteError(
                "the model's outputs are not finite in evaluation; first in "
                f"{place or 'what another process computes'}"
            )
        if launched.own:
            self._tally.count(judged)
