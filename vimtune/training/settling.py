"""Before the first step: methods that choose what to train, or where to start, see training batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from vimtune import adapters
from vimtune.runtime.distributed import Processes
from vimtune.tasks.job import Batch, InputError, Loader
from vimtune.training.interrupt import Stopping, StopRequest
from vimtune.training.passes import Passes
from vimtune.training.stepper import NOT_READ
from vimtune.training.trained import Trained


def settle(trained: Trained, loader: Loader, passes: Passes, processes: Processes, stop: StopRequest) -> None:
    """Let the methods of the adapter choose from training batches, if any of them wants to.

    The batches are those of the first epoch, then of the second, and so on. The gradient of each is that of
    its mean loss over all processes. Afterwards no gradients are left, and the average of weights starts
    anew.

    Raises:
        Stopping: the data of this or of another process cannot be read, or somebody wants the run to stop.
        ValueError: a method cannot choose.
    """
    if not adapters.settles(trained.model):
        return
    trained.set_training_mode()
    adapters.settle(trained.model, _training_passes(trained.model, loader, passes, processes, stop))
    for parameter in trained.parameters.values():
        parameter.grad = None
    if trained.average is not None:
        trained.average.restore(trained.parameters)


def _training_passes(
    model: nn.Module, loader: Loader, passes: Passes, processes: Processes, stop: StopRequest
) -> Iterator[Callable[[], float]]:
    """Functions that each run one training batch forward and backward and give its mean loss."""
    batches = _endless(loader)
    for number in itertools.count():
        try:
            batch = next(batches)
        except InputError as error:
            processes.sum(torch.tensor([NOT_READ, 0]))
            raise Stopping(error.in_run) from error
        count, wishes = processes.sum(torch.tensor([batch.count, int(stop.requested)])).tolist()
        if count < 0 or wishes > 0:  # another process could not read its data, or one is to stop
            raise Stopping
        if count > 0:
            yield partial(_run, model, batch.to(processes.device), count, number, passes, processes)


def _endless(loader: Loader) -> Iterator[Batch]:
    for epoch in itertools.count():
        loader.set_position(epoch)
        yield from loader


def _run(
    model: nn.Module, batch: Batch, count: int, number: int, passes: Passes, processes: Processes
) -> float:
    """Add the gradients of the mean loss of a batch, which counts `count` over all processes.

    They are those of the tensors that the adapter trains at this time, which may be others than those that
    the run will train.
    """
    trained = (item.parameter for item in adapters.adapter_parameters(model))
    parameters = [parameter for parameter in trained if parameter.requires_grad]
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss = torch.zeros((), device=processes.device)
    if batch.count > 0:
        own = passes.loss(batch, number, micro=0)
        (own / count).backward()
        loss = own.detach()
    processes.sum_gradients_(parameters)
    for parameter, earlier in zip(parameters, before, strict=True):
        if earlier is not None:
            parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)
    return float(processes.sum(loss)) / count
