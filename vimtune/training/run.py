"""A training run: its epochs, the selection of the best one, what is saved, and the report at the end."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from vimtune import adapters
from vimtune.plugins import with_imports
from vimtune.recipe import Recipe
from vimtune.run_folder import RunFolder, writing
from vimtune.runtime.distributed import PeerLostError, Processes
from vimtune.runtime.precision import Autocast
from vimtune.tasks.base import Task
from vimtune.tasks.job import READERS, Batch, Evaluation, InputError, Job, Loader, Outcome
from vimtune.tasks.report import Report
from vimtune.text import counted
from vimtune.training.callbacks import Callback, Session, StepRecord
from vimtune.training.conclusion import conclude
from vimtune.training.evaluate import Replays, evaluate
from vimtune.training.few_steps import few_steps_warning
from vimtune.training.guard import NonFiniteError
from vimtune.training.identity import Facts, lasting
from vimtune.training.interrupt import Interrupted, Stopping, StopRequest
from vimtune.training.logs import Logs
from vimtune.training.memory import peak_memory
from vimtune.training.optim import CosineSchedule
from vimtune.training.prefetch import WindowReader
from vimtune.training.report import describe_method, shared_fields
from vimtune.training.saving import SavingTimes
from vimtune.training.settling import settle
from vimtune.training.state import (
    EpochRecord,
    Progress,
    RunState,
    ended,
    save_run_state,
    settle_best_adapter,
    steps_left,
    steps_used_up,
)
from vimtune.training.stepper import Step, Stepper
from vimtune.training.tracking import Tracker
from vimtune.training.trained import Trained


@dataclass
class Run:
    """One training run in this process, ready to begin or to go on."""

    recipe: Recipe
    task: Task
    job: Job
    processes: Processes
    trained: Trained
    stepper: Stepper
    schedule: CosineSchedule
    autocast: Autocast
    facts: Facts
    progress: Progress
    folder: RunFolder
    tracker: Tracker
    logs: Logs
    session: Session
    """What callbacks are given."""
    callbacks: Sequence[Callback]
    stop: StopRequest
    evaluated: WindowReader
    """Brings the batches of evaluations to the device."""
    replays: Replays | None
    """Replays the batches of evaluations."""
    total: int
    """How many numbers the plain model has."""
    head: int
    """How many of the trained numbers are those of the head."""
    last_evaluation: Evaluation | None = None
    """That of the epoch before, of the weights that the model had then."""
    best_evaluation: Evaluation | None = None
    """That of the best epoch, if it was in this session."""
    started: float = field(default_factory=time.monotonic)
    """When this session of the run began."""
    saving: SavingTimes = field(default_factory=SavingTimes)
    """Says when the state is saved."""

    def __post_init__(self) -> None:
        self.seconds_before = self.progress.seconds
        # Several processes talk about each step that callbacks are told of.
        self.told_of_steps = [one for one in self.callbacks if type(one).on_step is not Callback.on_step]

    def complete(self) -> Report:
        """Train the epochs that are left, then score the best adapter and write the report."""
        try:
            if self.progress.step == 0 and self.settles:
                settle(self.trained, self.job.train, self.stepper.passes, self.processes, self.stop)
            for callback in self.callbacks:
                callback.on_start(self.session)
            while not ended(self.recipe.optimisation, self.progress):
                self._train_epoch()
                self._end_epoch()
            if not self.saving.is_current:  # What is scored now is read from the files.
                self._save()
            if self.stepper.passes.graphs is not None:
                self.tracker.message(f"CUDA graphs: {self.stepper.passes.graphs.summary}")
            report = self._finish()
        except Stopping as stopping:
            # All processes are here; one of them may know more than the others.
            failures = [text for text in self.processes.gather(stopping.failure) if text is not None]
            self._save()
            if failures:
                raise InputError(f"{failures[0].rstrip('.')}; {self._how_to_continue()}") from stopping
            self.tracker.message(self._what_is_saved(), self._resume_command())
            raise Interrupted(self._how_to_continue()) from None
        except PeerLostError as error:
            if not self.processes.is_main:
                raise
            if not self.trained.placement.saves_alone:
                raise PeerLostError(
                    ", and with it went a part of the model; continue from the last saved state with:\n"
                    f"  {self._resume_command()}"
                ) from error
            self._save()
            raise PeerLostError(f"; {self._how_to_continue()}") from error
        for callback in self.callbacks:
            callback.on_end(self.session, report)
        return report

    @property
    def settles(self) -> bool:
        """Whether the method chooses from training batches before the first step; an adapter that the run
        begins with has chosen already."""
        return self.recipe.method.init_adapter is None and adapters.settles(self.trained.model)

    # --- an epoch -----------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Take the steps of the epoch that are left, and note and show what came of each."""
        loader, progress = self.job.train, self.progress
        self.saving.is_current = False
        loader.set_position(progress.epoch, progress.batch)
        loader.read_ahead()
        if self._is_evaluated():
            _read_ahead(self.job.selection)
        self.trained.set_training_mode()
        shown_count = progress.count
        clock = shown_at = time.monotonic()
        for step in self.stepper.steps(self._batches_left(), progress.epoch):
            loss_sum, wishes, norm = step.numbers.read()
            now = time.monotonic()
            self._advance(step, loss_sum, now - clock)
            loss = loss_sum / max(1, step.count)
            self.tracker.show_step(progress.epoch, progress.step, loss, step.lr, self._rate())
            self._tell_of_step(
                StepRecord(
                    step=progress.step,
                    epoch=progress.epoch + 1,
                    loss=loss,
                    lr=step.lr,
                    grad_norm=norm,
                    count=step.count,
                    seconds=now - clock,
                )
            )
            clock = now
            last = progress.batch == len(loader) or self._has_no_steps_left()
            if progress.step % self.recipe.run.log_interval == 0 or last:
                rate = (progress.count - shown_count) / max(1e-9, now - shown_at)
                shown_count, shown_at = progress.count, now
                self.logs.write(
                    "step",
                    {
                        "step": progress.step,
                        "epoch": progress.epoch + 1,
                        "loss": loss,
                        "lr": step.lr,
                        "grad_norm": norm,
                        f"{self.task.unit}_per_second": rate,
                    },
                )
            if wishes > 0:
                raise Stopping
            if progress.stopped is not None:
                break
            del step  # and with it its batches: others are about to be fetched

    def _batches_left(self) -> Iterator[Batch]:
        """The batches of this epoch that are left, none of them beyond the last step of the run.

        With the last one what is read next is begun with, at a time when a device still works on it.
        """
        settings, progress, train = self.recipe.optimisation, self.progress, self.job.train
        if progress.stopped is not None:  # and then by a signal, before the epoch was evaluated
            return
        number, is_last, left = progress.epoch + 1, self._is_last(), steps_left(settings, progress)
        # A loader that is read to its end says what it makes of the whole epoch.
        whole = self._steps_of_epoch_left() <= left
        yield from train if whole else islice(train, int(left) * settings.grad_accum)
        if not is_last:
            _read_ahead(train, number)
        elif self.job.final is not self.job.selection:
            _read_ahead(self.job.final)

    def _advance(self, step: Step, loss_sum: float, seconds: float) -> None:
        """Count a step that is done and took `seconds`."""
        progress = self.progress
        progress.step += 1
        progress.batch += len(step.window)
        progress.loss_sum += loss_sum
        progress.loss_count += step.count
        progress.count += step.count
        progress.train_seconds += seconds

    def _has_no_steps_left(self) -> bool:
        """Whether the run ends with the step that was taken last."""
        return self.progress.stopped is not None or steps_used_up(self.recipe.optimisation, self.progress)

    def _rate(self) -> float:
        """Units per second in training so far."""
        return self.progress.count / max(1e-9, self.progress.train_seconds)

    def _end_epoch(self) -> None:
        """Evaluate and save the state if it is time, and keep the adapter if it is the best so far."""
        progress, number = self.progress, self.progress.epoch + 1
        if progress.loss_count == 0:
            raise InputError(f"epoch {number}: none of the training {self.task.examples} can be decoded")
        record = EpochRecord(
            epoch=number,
            step=progress.step,
            lr=self.schedule(max(0, progress.step - 1), self.recipe.optimisation.lr),
            train_loss=progress.loss_sum / progress.loss_count,
            rate=self._rate(),
        )
        if self._is_evaluated():
            self._score(record)
        progress.history.append(record)
        progress.epoch, progress.batch = number, 0
        progress.loss_sum, progress.loss_count = 0.0, 0
        split = {"split": self.job.selection.split} if record.scores is not None else {}
        self.logs.write("epoch", record.flat(self.task.unit) | split)
        self.tracker.show_epoch(record, self.job.selection.split)
        if self.processes.from_main(self.saving.is_due):
            self._save()
        self._tell_of_epoch(record)

    def _tell_of_step(self, record: StepRecord) -> None:
        """Tell the callbacks of a step that is done, and hear whether one of them ends the training."""
        for callback in self.told_of_steps:
            callback.on_step(self.session, record)
        if self.told_of_steps:
            self._hear_callbacks()

    def _tell_of_epoch(self, record: EpochRecord) -> None:
        """Tell the callbacks of an epoch that is over. If they make it the last one and it was not evaluated
        before, it is now."""
        for callback in self.callbacks:
            callback.on_epoch(self.session, record)
        self._hear_callbacks()
        if self.progress.stopped is None or record.scores is not None:
            return
        self._score(record)
        late = {"epoch": record.epoch, "step": record.step, "split": self.job.selection.split}
        self.logs.write("evaluation", {**late, "loss": record.loss, **(record.scores or {})})
        self.tracker.show_epoch(record, self.job.selection.split)
        self._save()

    def _hear_callbacks(self) -> None:
        """Note whether a callback has asked to end the training, in any of the processes."""
        if not self.callbacks or self.progress.stopped is not None:
            return
        reasons = [reason for reason in self.processes.gather(self.session.wish) if reason is not None]
        if reasons and self.progress.step < self.schedule.total_steps:
            self.progress.stopped = reasons[0]
            self.tracker.message("a callback ends the training" + (f": {reasons[0]}" if reasons[0] else ""))

    def _score(self, record: EpochRecord) -> None:
        """Evaluate the epoch of a record on the selection split, and make it the best one, if it is."""
        with self.trained.averaged():
            found = self.last_evaluation = self._evaluate(self.job.selection)
            record.loss, record.scores = found.loss, dict(found.scores)
            self._select(record)

    def _is_evaluated(self) -> bool:
        """Whether the selection split is scored after this epoch."""
        if self._is_last():
            return True
        number = self.progress.epoch + 1
        return not self.recipe.data.evaluated_once and number % self.recipe.run.eval_interval == 0

    def _is_last(self) -> bool:
        """Whether no epoch follows after this one, unless the run stops early.

        That is known from its beginning on, unless a callback ends the training. The number of all steps of
        the run does not tell it: epochs may have had fewer, which `max_steps` ended before the run went on.
        """
        settings, progress = self.recipe.optimisation, self.progress
        if progress.stopped is not None or progress.epoch + 1 == settings.epochs:
            return True
        return self._steps_of_epoch_left() >= steps_left(settings, progress)

    def _steps_of_epoch_left(self) -> int:
        """How many optimizer steps the batches of this epoch make that are left."""
        return self.recipe.optimisation.steps_of(len(self.job.train) - self.progress.batch)

    def _select(self, record: EpochRecord) -> None:
        """Make an epoch that was just evaluated the best one, if it is."""
        best = self.progress.best
        if best is None or self._rank(record) > self._rank(best):
            self.progress.best_epoch, self.progress.stale_evaluations = record.epoch, 0
            self.best_evaluation = self.last_evaluation
            self._save_next_adapter(record.epoch)
        else:
            self.progress.stale_evaluations += 1

    def _rank(self, record: EpochRecord) -> tuple[float, ...]:
        assert record.loss is not None and record.scores is not None, "the epoch was evaluated"
        return self.task.rank(record.loss, record.scores)

    def _evaluate(self, loader: Loader) -> Evaluation:
        loader.set_position(0)
        self.tracker.show_evaluation(loader.split)
        try:
            found = evaluate(
                self.job.forwarded,
                loader,
                self.job.start_tally(loader),
                device=self.processes.device,
                autocast=self.autocast,
                placement=self.trained.placement,
                should_stop=lambda: self.stop.requested,
                windows=self.evaluated,
                replays=self.replays,
            )
        except InputError as error:
            raise Stopping(error.in_run) from error
        if found is None:
            raise Stopping
        if not math.isfinite(found.loss):
            raise NonFiniteError(
                f"the loss on {loader.split!r} is not finite: the weights have diverged, lower --lr"
            )
        return found

    # --- the end ------------------------------------------------------------------------------

    def _finish(self) -> Report:
        """Score the best adapter as it lies in its file, and write the report."""
        recipe, job, progress = self.recipe, self.job, self.progress
        memory = max(self.processes.gather(peak_memory(self.processes.device)))
        # From the file: what is scored is what the run leaves behind.
        info, best_adapter = adapters.read_adapter(self.folder.adapter)
        found = self._known_evaluation(best_adapter)
        if found is None:
            with self.trained.exchanged(best_adapter):
                found = self._evaluate(job.final)
        left_out = self._left_out()
        # One that stops early had more steps to take, and whoever stopped it knows why.
        if self.schedule.total_steps == progress.step:
            few = few_steps_warning(recipe, job.train, progress.step)
            if few is not None:
                self.tracker.warn(few)
        progress.seconds = self._seconds()
        best, last = progress.best, progress.evaluated[-1]
        assert best is not None, "the last epoch of a run is evaluated"
        outcome = Outcome(
            self.task, found, best.scores or {}, last.scores or {}, self._rate(), self.best_evaluation
        )
        shared = shared_fields(
            recipe,
            progress,
            loss=found.loss,
            split=job.final.split,
            data={loader.split: loader.source for loader in job.loaders},
            left_out=left_out[job.final.split],
            method_config=describe_method(info),
            trainable=self.trained.count,
            head=self.head,
            total=self.total,
            adapter_bytes=self.folder.adapter.stat().st_size,
            processes=self.processes,
            memory=memory,
            cuda_graph=self.stepper.passes.replayed,
            run_dir=self.folder.path,
            history=[record.flat(self.task.unit) for record in progress.history],
        )
        report = job.build_report(shared, outcome)
        if self.processes.is_main:
            files = job.result_files(report, found)
            report = conclude(
                report, outcome, job.details(outcome), files, self.folder, self.tracker, self.logs
            )
        return report

    def _left_out(self) -> dict[str, int]:
        """How many examples of each split were left out because they are corrupt; warn of them."""
        found: dict[str, int] = {}
        for loader in self.job.loaders:
            number = len(set().union(*self.processes.gather(set(loader.left_out()))))
            if number:
                corrupt = counted(number, f"corrupt {self.task.examples}")
                self.tracker.warn(f"{loader.split}: {corrupt} left out")
            found[loader.split] = number
        return found

    def _known_evaluation(self, adapter: Mapping[str, Tensor]) -> Evaluation | None:
        """The last evaluation, if it was of the final split with the very weights of this adapter."""
        if self.job.final is not self.job.selection or self.last_evaluation is None:
            return None
        return self.last_evaluation if self.trained.scores_as(adapter) else None

    # --- files --------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the state, then put the adapter that belongs to it in its place."""
        with self.saving.measured():
            self.progress.seconds = self._seconds()
            self.progress.metrics_bytes = self.logs.sync()  # first, so that this count is never too high
            tensors = self.trained.tensors()
            if not self.processes.is_main:
                return
            state = RunState(lasting(self.recipe), self.facts, self.progress, **tensors)
            save_run_state(self.folder.checkpoint, state)
            settle_best_adapter(self.folder, self.progress.best_epoch)

    def _save_next_adapter(self, epoch: int) -> None:
        """Write the adapter of an epoch, which becomes the best one when the state is saved next."""
        tensors = self.trained.adapter()
        if not self.processes.is_main:
            return
        with writing(self.folder.next_adapter):
            adapters.save_adapter(
                self.job.model,
                self.folder.next_adapter,
                **self.job.saved_with_adapter,
                extra=self._kept_in_adapter(epoch),
                tensors=tensors,
                base=self.facts.base,
                replaced=self.facts.replaced,
            )

    def _kept_in_adapter(self, epoch: int) -> dict[str, Any]:
        """What an adapter file says of the run besides what it needs itself."""
        kept = {"recipe": self.recipe.to_share(), "epoch": epoch}
        return kept | ({READERS: self.job.readers} if self.job.readers else {})

    # --- words --------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _how_to_continue(self) -> str:
        return f"{self._what_is_saved()}\n  {self._resume_command()}"

    def _what_is_saved(self) -> str:
        return (
            f"stopped after step {self.progress.step} of {self.schedule.total_steps}; "
            "the state is saved, continue with:"
        )

    def _resume_command(self) -> str:
        command = with_imports(f"vimtune train --resume {shlex.quote(str(self.folder.path))}")
        count = self.processes.world_size
        return command if count == 1 else f"torchrun --nproc-per-node {count} --no-python {command}"


def _read_ahead(loader: Loader, epoch: int = 0) -> None:
    """Have the first batches of an epoch prepared while something else is done."""
    loader.set_position(epoch)
    loader.read_ahead()
