"""What stands in for a recorder of CUDA graphs on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vimtune.training.graph import CaptureError


class RepeatingRecorder:
    """Replays by doing the recorded call again; like a graph it needs the gradients where they were."""

    def __init__(self, device: torch.device) -> None:
        self.num_warm = self.num_replays = 0
        self.recorded: list[int] = []
        """Rows of the batches that were recorded."""

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        self.num_warm += 1
        return work()

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        parameters = work.func.__self__.gradients.parameters
        places = [p.grad.data_ptr() for p in parameters]
        loss = torch.full((), math.nan)
        self.recorded.append(len(next(iter(work.args[0].values()))))

        def replay() -> None:
            assert [p.grad.data_ptr() for p in parameters] == places
            loss.copy_(work())
            self.num_replays += 1

        return loss, replay


class FailingRecorder(RepeatingRecorder):
    """Cannot record anything."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        raise CaptureError("operation not permitted when stream is capturing")
