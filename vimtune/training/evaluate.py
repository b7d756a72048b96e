"""The evaluation of a model on a split: a task's tally, summed over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from vimtune.tasks.job import Batch, Evaluation, Forward, Tally, Tensors
from vimtune.training.distributed import Processes
from vimtune.training.guard import NonFiniteError, find_nonfinite, is_finite
from vimtune.training.inputs import InputError
from vimtune.training.precision import Autocast, in_precision
from vimtune.training.sharding import Placement, Replicated


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

    Returns:
        None, in every process, when `should_stop` became true in any of them, or when the data of another
        process cannot be read.

    Raises:
        InputError: the data of this process cannot be read.
        NonFiniteError: the model's outputs have inf or NaN; the message says where that begins.
        ValueError: there was nothing to score.
    """
    placement = placement or Replicated(Processes())
    processes = placement.processes
    forward = in_precision(model, autocast)

    stopped = False
    failure: InputError | None = None
    was_training = model.training
    model.eval()
    try:
        shares, batch = iter(batches), None
        while True:
            try:
                batch = next(shares, None)
            except InputError as error:  # raised below, after the others have been told to stop
                failure = error
            stopped = placement.any(failure is not None or should_stop())
            if stopped or batch is None:
                break
            with placement.meeting():
                for part in placement.parts([batch]):
                    tensors = part.batch.to(device).tensors
                    with nullcontext() if part.own else _uncounted(tally):
                        tally.add(_checked(forward, model, tensors, placement), tensors)
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


@contextmanager
def _uncounted(tally: Tally) -> Iterator[None]:
    """Take back what `tally` counts within the block."""
    before = {name: total.clone() for name, total in tally.totals.items()}
    yield
    for name, total in tally.totals.items():
        total.copy_(before[name])


def _checked(forward: Forward, model: nn.Module, tensors: Tensors, placement: Placement) -> Forward:
    """`forward` that refuses outputs for the batch `tensors` that are not finite."""

    def checked(*inputs: Any, **named: Any) -> Any:
        outputs = forward(*inputs, **named)
        if placement.any(not is_finite(outputs)):
            place = find_nonfinite(
                model, tensors, lambda: forward(*inputs, **named), backward=False, anywhere=placement.any
            )
            raise NonFiniteError(
                "the model's outputs are not finite in evaluation; first in "
                f"{place or 'what another process computes'}"
            )
        return outputs

    return checked
