"""Forward and backward of the training batches: seeded by step, replayed as CUDA graphs where possible."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vimtune.runtime.precision import Autocast, in_precision
from vimtune.runtime.seeds import derive_seed, seed_generators
from vimtune.tasks.job import Batch, Job, Tensors
from vimtune.training.gradients import Gradients
from vimtune.training.graph import BatchGraphs, CaptureError
from vimtune.training.guard import find_nonfinite


class Passes:
    """Runs the batches of a job forward and backward.

    What a pass draws at random depends on the seed of the run, the number of the step, the number of the
    batch in its step, and the rank of the process, and on nothing that happened before. Therefore a pass can
    be repeated, and a resumed run draws what an uninterrupted one would.
    """

    def __init__(
        self,
        job: Job,
        gradients: Gradients,
        scaler: torch.amp.GradScaler,
        *,
        autocast: Autocast,
        compiled: bool,
        seed: int,
        rank: int,
        device: torch.device,
        divisor: int,
        graphs: BatchGraphs[Tensor] | None,
        warn: Callable[[str], None],
    ) -> None:
        """Prepare the passes of a run.

        Args:
            job: model, loss and the preparation of batches.
            gradients: where the gradients of a step come together.
            scaler: scales losses for fp16, or leaves them as they are.
            autocast: opens the block in which the model runs.
            compiled: whether `torch.compile` compiles the model.
            seed: that of the run.
            rank: number of this process.
            device: where the model is.
            divisor: losses are divided by it before the backward pass.
            graphs: replays the passes; None runs them one operation after the other.
            warn: told when a graph could not be recorded.
        """
        self.gradients, self.graphs = gradients, graphs
        self._job, self._scaler, self._autocast = job, scaler, autocast
        self._seed, self._rank, self._device = seed, rank, device
        self._divisor, self._warn = divisor, warn
        self._forward = in_precision(torch.compile(job.forwarded) if compiled else job.forwarded, autocast)

    @property
    def replayed(self) -> bool:
        """Whether any batch was replayed."""
        return self.graphs is not None and self.graphs.num_replays > 0

    def run(self, batch: Batch, step: int, micro: int) -> Tensor:
        """Add the gradients of a batch to those of the step.

        Args:
            batch: this process's share of the batch; not empty.
            step: number of the optimizer step in the run.
            micro: number of the batch in the step.

        Returns:
            The loss, summed over what the task counts: a scalar, valid until the next call.
        """
        tensors = self._prepare(batch, step, micro)
        if self.graphs is not None:
            try:
                return self.graphs(self._forward_backward, tensors)
            except CaptureError as error:
                self._warn(f"the CUDA graph could not be recorded, batches run eagerly: {error}")
        return self._forward_backward(tensors)

    def loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        """The loss of the same pass, for the caller to differentiate; it is not scaled or replayed."""
        return self._job.loss(self._forward, self._prepare(batch, step, micro))

    def accompany(self, batch: Batch, step: int, micro: int) -> None:
        """Run the batch of another process along with it, and add nothing to the gradients of the step."""
        self.gradients.add(0.0 * self.loss(batch, step, micro))

    def find_nonfinite(
        self, batch: Batch, step: int, micro: int, anywhere: Callable[[bool], bool]
    ) -> str | None:
        """Repeat a pass and name the first place where inf or NaN arises in it; overwrites gradients.

        `anywhere` is that of `vimtune.training.guard.find_nonfinite`.
        """
        forward = in_precision(self._job.forwarded, self._autocast)

        def repeat() -> Tensor:
            return self._job.loss(forward, self._prepare(batch, step, micro))

        return find_nonfinite(self._job.model, batch.tensors, repeat, backward=True, anywhere=anywhere)

    def _prepare(self, batch: Batch, step: int, micro: int) -> Tensors:
        """Seed the generators for a pass and prepare its batch; the same at every call."""
        seed_generators(derive_seed(self._seed, "step", step, micro, self._rank), self._device)
        return self._job.prepare(batch.tensors, derive_seed(self._seed, "mix", step, micro))

    def _forward_backward(self, tensors: Tensors) -> Tensor:
        loss = self._job.loss(self._forward, tensors)
        self.gradients.add(self._scaler.scale(loss / self._divisor))
        return loss.detach()
