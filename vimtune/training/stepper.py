"""The optimizer step, from the batches of a window to changed weights.

`Stepper` holds the step itself, which reads top to bottom in `_compute_gradients` and `_update`. Its two
kinds differ in when the host looks at the numbers of a step, and in nothing that changes the result:

- `PlainStepper` reads them before it changes the weights.
- `OverlappedStepper` never lets the device wait for that: it launches the update, and where it can the passes
  of the next step as well, before it reads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from vimtune import adapters
from vimtune.runtime.distributed import Processes
from vimtune.tasks.job import Batch, InputError
from vimtune.training.gradients import GradientWatch, scale_and_clip
from vimtune.training.guard import NonFiniteError
from vimtune.training.interrupt import Stopping, StopRequest
from vimtune.training.optim import CosineSchedule, set_learning_rate, skip_unless_finite, skips_by_itself
from vimtune.training.passes import Passes
from vimtune.training.prefetch import Readback, WindowReader
from vimtune.training.trained import Trained

WATCHED_STEPS = 5
"""Optimizer steps after which a trained tensor that never had a gradient is reported."""
NOT_READ = -(2**40)
"""What a process whose data cannot be read adds to the count of a step."""


@dataclass(frozen=True)
class Step:
    """An optimizer step, launched if not yet done."""

    number: int
    """Its number in the run, from 0 on."""
    window: list[Batch]
    """This process's share of its batches."""
    count: int
    """What the step counts in the task's unit, over all processes."""
    lr: float
    """Learning rate of the first group of parameters."""
    numbers: Readback
    """Summed loss, wishes to stop, and gradient norm before clipping; of all processes together."""


class Stepper(ABC):
    """Takes the optimizer steps of a run."""

    def __init__(
        self,
        passes: Passes,
        trained: Trained,
        windows: WindowReader,
        schedule: CosineSchedule,
        processes: Processes,
        stop: StopRequest,
        *,
        first_step: int,
        usual_count: int,
        clip_grad: float,
        amp: str,
        warn: Callable[[str], None],
    ) -> None:
        """Prepare the steps of a run.

        Args:
            passes: forward and backward of a batch.
            trained: what a step changes.
            windows: groups batches by optimizer step.
            schedule: the learning rate over the steps.
            processes: those of the run.
            stop: whether somebody wants the run to stop.
            first_step: number of steps that were done before.
            usual_count: what a step counts as a rule, by which `passes` divides losses.
            clip_grad: largest norm of the gradient; 0 leaves it as it is.
            amp: name of the precision, for messages.
            warn: told of tensors that get no gradient.
        """
        self.passes, self.trained, self.windows = passes, trained, windows
        self.number = self.first_step = first_step
        self._schedule, self._processes, self._stop = schedule, processes, stop
        self._usual_count, self._clip_grad, self._amp, self._warn = usual_count, clip_grad, amp, warn
        # A resumed run has been watched before.
        self._watch = GradientWatch(trained.parameters, 0 if first_step > 0 else WATCHED_STEPS)

    def steps(self, batches: Iterable[Batch], epoch: int) -> Iterator[Step]:
        """Take the steps of an epoch; yield each of them when its numbers have arrived and are finite.

        Args:
            batches: what is left of the epoch.
            epoch: its number, from 0 on, for messages.

        Raises:
            Stopping: the data of this or of another process cannot be read.
            NonFiniteError: loss or gradient of a step are not finite; the step has changed nothing.
        """
        try:
            yield from self._steps(self.windows.read(batches), epoch)
        except InputError as error:
            # The other processes learn of it where they count the step.
            self._processes.sum(torch.tensor(NOT_READ))
            raise Stopping(error.in_run) from error

    @abstractmethod
    def _steps(self, windows: Iterator[list[Batch]], epoch: int) -> Iterator[Step]:
        """Take a step with each of `windows`."""

    def _compute_gradients(self, window: list[Batch]) -> Step:
        """Launch forward and backward of the batches of a step: clipped gradients, over all processes."""
        number, trained, processes = self.number, self.trained, self._processes
        lr = set_learning_rate(trained.optimizer, self._schedule, number)
        own_count = sum(batch.count for batch in window)
        # Several processes wait for each other here, while the device still works on the step before.
        count = int(processes.sum(torch.tensor(own_count)))
        if count < 0:  # another process could not read its data
            raise Stopping
        if count == 0:  # all that was in the window is corrupt and left out
            return Step(number, window, 0, lr, Readback(torch.zeros(3)))

        # Losses are sums, so parts of any size add up to the whole.
        self.passes.gradients.start(empty=own_count == 0)
        total = torch.zeros((), device=processes.device)
        with trained.placement.meeting():
            for part in trained.placement.parts(window):
                if part.own:
                    total += self.passes.run(part.batch, number, part.number)
                else:
                    self.passes.accompany(part.batch, number, part.number)
        if number == self.first_step and own_count > 0:
            adapters.check_gradients(trained.model)

        # Over all processes: gradients, loss, wish to stop. Then from a sum to a mean over what there really
        # was.
        trained.placement.sum_gradients_(list(trained.parameters.values()))
        wish = torch.full_like(total, self._stop.requested)
        sums = processes.sum(torch.stack([total, wish]))
        trained.scaler.unscale_(trained.optimizer)
        norm = scale_and_clip(trained.parameters.values(), self._usual_count / count, self._clip_grad)
        if unmoved := ", ".join(self._watch.look()):
            self._warn(f"gradient exactly zero in all of the first {WATCHED_STEPS} steps: {unmoved}")
        return Step(number, window, count, lr, Readback(torch.cat([sums, norm[None]])))

    def _update(self, step: Step) -> None:
        """Change the weights."""
        self.number += 1
        if step.count == 0:
            return
        self.trained.scaler.step(self.trained.optimizer)
        self.trained.scaler.update()
        if self.trained.average is not None:
            self.trained.average.update(step.number)

    def _require_finite(self, step: Step, epoch: int) -> None:
        """Wait for the numbers of a step, and name the place where inf or NaN begins if they have any."""
        loss_sum, _, norm = step.numbers.read()
        if math.isfinite(loss_sum) and (math.isfinite(norm) or self._scale_is_sought()):
            return
        place, placement = None, self.trained.placement
        for part in placement.parts(step.window):
            place = self.passes.find_nonfinite(part.batch, step.number, part.number, placement.any)
            if placement.any(place is not None):
                break
        places = [found for found in self._processes.gather(place) if found is not None]
        what = "gradient" if math.isfinite(loss_sum) else "loss"
        hint = "set --clip-grad" if self._amp == "none" else "use --amp none"
        raise NonFiniteError(
            f"non-finite {what} in epoch {epoch + 1}, step {step.number + 1} "
            f"(lr {step.lr:.2e}, amp {self._amp}). "
            f"It first arises in {places[0] if places else 'no place that a replay of the batch shows'}. "
            f"No update was made with it; lower --lr or {hint}"
        )

    def _scale_is_sought(self) -> bool:
        """Whether fp16 gradients may still overflow: those steps are skipped and the scale is lowered."""
        scaler = self.trained.scaler
        return scaler.is_enabled() and scaler.get_scale() >= 1.0


class PlainStepper(Stepper):
    """Reads the numbers of a step before it changes the weights."""

    def _steps(self, windows: Iterator[list[Batch]], epoch: int) -> Iterator[Step]:
        for window in windows:
            step = self._compute_gradients(window)
            if not self._stop.requested:
                self.windows.fetch_ahead()
            self._require_finite(step, epoch)
            self._update(step)
            yield step
            del window, step  # or they would keep their batches on the device while others are computed with


class OverlappedStepper(Stepper):
    """Launches the update, and the passes of the next step, before it reads the numbers of a step.

    Nothing is changed by numbers that are not finite: the optimizer's kernels skip such an update by
    themselves (`skips_by_itself`), and whatever the numbers say, the passes of the next step change nothing
    but gradients. Several processes launch them early if all of them can, because they meet in them.
    """

    def _steps(self, windows: Iterator[list[Batch]], epoch: int) -> Iterator[Step]:
        unread: Step | None = None
        for window in windows:
            step = self._compute_gradients(window)
            if unread is not None:
                self._require_finite(unread, epoch)
                yield unread
                unread = None
            follows = not self._stop.requested and self.windows.fetch_ahead()
            skip_unless_finite(self.trained.optimizer, step.numbers.values)
            self._update(step)
            if self._processes.all(follows):
                unread = step
            else:
                self._require_finite(step, epoch)
                yield step
            del window, step


def stepper_class(trained: Trained) -> type[Stepper]:
    """The kind of stepper for an optimizer and its scaler. fp16 decides by other rules what is skipped."""
    by_itself = skips_by_itself(trained.optimizer) and not trained.scaler.is_enabled()
    return OverlappedStepper if by_itself else PlainStepper
