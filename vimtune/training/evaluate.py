"""The evaluation of a model on a split: a task's tally, summed over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from vimtune.tasks.job import Batch, Evaluation, Forward, Tally, Tensors
from vimtune.training.distributed import Processes
from vimtune.training.guard import NonFiniteError, find_nonfinite, is_finite
from vimtune.training.inputs import InputError
from vimtune.training.precision import Autocast, in_precision


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    tally: Tally,
    *,
    device: torch.device,
    autocast: Autocast,
    processes: Processes | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Score `model` on this process's share of a split and add up the shares of all processes.

    Args:
        model: in any mode; it is scored in evaluation mode and left in the mode it was in.
        batches: this process's share.
        tally: an empty tally of the task.
        device: where the model is.
        autocast: opens the block in which the model runs.
        processes: those of the run; one process by default.
        should_stop: asked after each batch.

    Returns:
        None, in every process, when `should_stop` became true in any of them, or when the data of another
        process cannot be read.

    Raises:
        InputError: the data of this process cannot be read.
        NonFiniteError: the model's outputs have inf or NaN; the message says where that begins.
        ValueError: there was nothing to score.
    """
    processes = processes or Processes()
    forward = in_precision(model, autocast)

    stopped = False
    failure: InputError | None = None
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if batch.count == 0:
                continue
            tensors = batch.to(device).tensors
            tally.add(_checked(forward, model, tensors), tensors)
            if should_stop():
                stopped = True
                break
    except InputError as error:  # raised below, after the others have been told to stop
        failure, stopped = error, True
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


def _checked(forward: Forward, model: nn.Module, tensors: Tensors) -> Forward:
    """`forward` that refuses outputs for the batch `tensors` that are not finite."""

    def checked(*inputs: Any, **named: Any) -> Any:
        outputs = forward(*inputs, **named)
        if not is_finite(outputs):
            place = find_nonfinite(model, tensors, lambda: forward(*inputs, **named), backward=False)
            raise NonFiniteError(f"the model's outputs are not finite in evaluation; first in {place}")
        return outputs

    return checked
