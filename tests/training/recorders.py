"""What stands in for a recorder of CUDA graphs on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vimtune.training.graph import CaptureError


class RepeatingRecorder:
    """Replays by doing the recorded call again; like a graph it needs the gradients where they were."""

    def __init__(self, device: torch.device) -> None:
        self.broken = False
        self.num_warm = self.num_replays = self.num_judged = 0
        """Batches that ran before, replayed ones of training, and those of evaluations."""
        self.recorded: list[int] = []
        """Rows of the batches of training that were recorded."""

    def run(self, work: Callable[[], Any]) -> Any:
        self.num_warm += 1
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        gradients = getattr(work.func.__self__, "gradients", None)
        return self._judging(work) if gradients is None else self._training(work, gradients.parameters)

    def _training(self, work: Callable[[], Tensor], parameters: Any) -> tuple[Tensor, Callable[[], None]]:
        places = [p.grad.data_ptr() for p in parameters]
        loss = torch.full((), math.nan)
        self.recorded.append(len(next(iter(work.args[0].values()))))

        def replay() -> None:
            assert [p.grad.data_ptr() for p in parameters] == places
            loss.copy_(work())
            self.num_replays += 1

        return loss, replay

    def _judging(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        for tensor in work.args[0].values():  # so far they have no values
            tensor.zero_()
        judged = {name: torch.zeros_like(tensor) for name, tensor in work().items()}

        def replay() -> None:
            for name, tensor in work().items():
                judged[name].copy_(tensor)
            self.num_judged += 1

        return judged, replay


class FailingRecorder(RepeatingRecorder):
    """Cannot record anything."""

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.broken = True
        raise CaptureError("operation not permitted when stream is capturing")
