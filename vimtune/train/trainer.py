"""The training run, from recipe to report; the optimizer step reads top to bottom from `_steps` on."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import vimtune
from vimtune import adapters
from vimtune.console import build_console
from vimtune.data import ImageLoader
from vimtune.ops import resolved_backend
from vimtune.recipe import Recipe
from vimtune.train.batch import BatchMixer, summed_loss
from vimtune.train.conclusion import conclude
from vimtune.train.distributed import PeerLostError, Processes, open_processes
from vimtune.train.evaluate import Evaluation, evaluate
from vimtune.train.folder import writing
from vimtune.train.gradients import GradientWatch, put_gradients, scale_and_clip
from vimtune.train.graph import BatchGraph, CaptureError, CudaRecorder, refusals
from vimtune.train.guard import NonFiniteError, find_nonfinite
from vimtune.train.identity import Facts, compare, facts_of_all, lasting, settings_of_all
from vimtune.train.interrupt import Interrupted, StopRequest
from vimtune.train.job import build_job
from vimtune.train.optim import (
    CosineSchedule,
    WeightAverage,
    build_optimizer,
    set_learning_rate,
    skip_unless_finite,
    skips_by_itself,
)
from vimtune.train.precision import build_autocast, build_scaler
from vimtune.train.prefetch import Batch, Readback, WindowReader
from vimtune.train.reading import InputError, reading
from vimtune.train.report import (
    Report,
    build_report,
    describe_method,
    peak_memory,
    print_report,
    versions,
)
from vimtune.train.settings import derive_seed, process_settings, seed_generators
from vimtune.train.start import Start, find_start, prepare_folder
from vimtune.train.state import (
    Progress,
    RunState,
    check_place,
    check_tensors,
    ended,
    optimizer_tensors,
    restore_optimizer,
    save_run_state,
    settle_best_adapter,
)
from vimtune.train.tracking import Tracker

TRAINED = "default"
"""Name of the adapter that is trained; at the end another one, read from the file, is scored beside it."""

WATCHED_STEPS = 5
"""Optimizer steps after which a trained tensor that never had a gradient is reported."""
_NOT_READ = -(2**40)
"""What a process whose images cannot be read adds to the number of images of a step."""


def train(recipe: Recipe) -> Report:
    """Fine-tune as `recipe` says and leave a run folder behind.

    The folder holds recipe.yaml, adapter.safetensors (the best), checkpoint.safetensors (the last
    state, for `resume`), metrics.jsonl, tensorboard/, report.json, learning_curve.png,
    confusion_matrix.png and confusion_matrix.csv. Under torchrun all processes call this with the
    same recipe; only the first one writes and prints.

    Raises:
        ValueError: the recipe, the data, the weights or the run to resume do not allow the run,
            another run uses the folder, the output cannot be written, (`NonFiniteError`) training met inf
            or NaN, or (`InputError`, `PeerLostError`) images or another process got lost; then the state
            was saved.
        Interrupted: Ctrl-C or SIGTERM; the state was saved and can be resumed.
    """
    with (
        open_processes(recipe.device, recipe.check_paths) as processes,
        process_settings(recipe, processes.device),
        ExitStack() as stack,
    ):
        with processes.failing_together():
            processes.demand_same(settings_of_all(recipe))
            with processes.main_first():  # it locks the folder
                start = find_start(recipe, stack if processes.is_main else None)
            if start.report is not None:
                print_report(start.report, build_console(quiet=not processes.is_main))
                return start.report
            run = _Run(recipe, processes, start, stack)
        return run.complete()


class _Run:
    """One training run in this process."""

    def __init__(
        self,
        recipe: Recipe,
        processes: Processes,
        start: Start,
        stack: ExitStack,
    ) -> None:
        self.recipe, self.processes = recipe, processes
        self.device = processes.device
        self.eager_because = refusals(recipe, self.device)
        if recipe.cuda_graph == "on" and self.eager_because:
            raise ValueError(f"cuda_graph = 'on' is not possible: {'; '.join(self.eager_because)}. Use auto")
        self.autocast = build_autocast(recipe.amp, self.device)
        self.scaler = build_scaler(recipe.amp, self.device)
        self.job = build_job(recipe, processes)
        stack.callback(self.job.close)
        self.model = self.job.model
        self.forward = torch.compile(self.model) if recipe.compile else self.model
        self.mix = BatchMixer(recipe.mixup, recipe.cutmix, len(self.job.classes))
        entries = list(adapters.adapter_parameters(self.model))
        self.parameters: dict[str, nn.Parameter] = {entry.key: entry.parameter for entry in entries}
        self.optimizer = build_optimizer(
            entries,
            lr=recipe.lr,
            head_lr=recipe.head_lr,
            weight_decay=recipe.weight_decay,
            betas=(recipe.betas[0], recipe.betas[1]),
        )
        # fp16 looks first: what its scaler skips is decided by other rules.
        self.device_guards = skips_by_itself(self.optimizer) and not self.scaler.is_enabled()
        self.ema = WeightAverage(self.parameters, recipe.ema) if recipe.ema > 0 else None
        self.last_scores: Evaluation | None = None
        self.graph: BatchGraph | None = None
        if not self.eager_because:
            # The first step is over before: gradients still absent after it are those of dead tensors.
            warmup = recipe.grad_accum + 1
            self.graph = BatchGraph(CudaRecorder(self.device), self.parameters.values(), warmup)
        # Where the graph knows gradients to lie they stay; a step of one batch then writes over them.
        self.gradients_stay = self.graph is not None
        self.replaces_gradients = self.gradients_stay and recipe.grad_accum == 1
        self.windows = WindowReader(self.device, recipe.grad_accum)
        # Several processes meet on the host in each step anyway.
        self.reads_late = self.device_guards and self.windows.ahead and processes.world_size == 1
        self.images_per_step = recipe.batch_size * recipe.grad_accum
        self.steps_per_epoch = math.ceil(len(self.job.train) / recipe.grad_accum)
        self.schedule = CosineSchedule(
            total_steps=self.steps_per_epoch * recipe.epochs,
            warmup_steps=round(self.steps_per_epoch * recipe.warmup_epochs),
            min_lr=recipe.min_lr,
        )
        base = adapters.base_identity(self.model)
        self.facts = Facts(
            classes=self.job.classes,
            train_images=len(self.job.train.dataset),
            base_hash=base.bits,
            base_origin=base.origin,
            versions=versions(),
            data=self.job.fingerprints,
            processes=processes.world_size,
        )
        self.progress = Progress()
        if start.saved is not None:
            self._restore(start.saved)
        processes.demand_same(facts_of_all(self.facts, self.progress.step))
        self.first_step = self.progress.step
        self.watch = GradientWatch(self.parameters, 0 if self.first_step > 0 else WATCHED_STEPS)
        self.seconds_before = self.progress.seconds
        self.started = time.monotonic()
        self.folder = prepare_folder(recipe, start, self.progress, processes, stack)
        self.tracker = Tracker(
            self.folder,
            build_console(quiet=not processes.is_main),
            is_main=processes.is_main,
            epochs=recipe.epochs,
            total_steps=self.schedule.total_steps,
            first_step=self.first_step,
            keep_bytes=self.progress.metrics_bytes,
        )
        stack.callback(self.tracker.close)
        self.stop = stack.enter_context(StopRequest())

    # --- the run ------------------------------------------------------------------------------

    def complete(self) -> Report:
        """Train the epochs that are left, then score the best adapter and write the report."""
        self._introduce()
        try:
            while not ended(self.recipe, self.progress):
                self._train_epoch()
                self._end_epoch()
            return self._finish()
        except _Stopping as stopping:
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
            self._save()
            raise PeerLostError(f"{error}; {self._how_to_continue()}") from error

    def _train_epoch(self) -> None:
        self.job.train.set_position(self.progress.epoch, self.progress.batch)
        self.model.train()
        try:
            self._follow_steps()
        except InputError as error:
            # Where the other processes count the images of the step, they learn of it.
            self.processes.sum(torch.tensor(_NOT_READ))
            raise _Stopping(str(error)) from error

    def _follow_steps(self) -> None:
        """Take the steps of the epoch, and note and show what came of each."""
        recipe, progress = self.recipe, self.progress
        shown = progress.images
        clock = shown_at = time.monotonic()
        for step in self._steps():
            loss_sum, wishes, norm = step.numbers.read()
            progress.loss_sum += loss_sum
            progress.loss_images += step.num_images
            progress.images += step.num_images
            now = time.monotonic()
            progress.train_seconds += now - clock
            clock = now
            loss = loss_sum / max(1, step.num_images)
            average = progress.images / max(1e-9, progress.train_seconds)
            self.tracker.show_step(progress.epoch, step.number + 1, loss, step.lr, average)
            if (step.number + 1) % recipe.log_interval == 0 or step.is_last:
                rate = (progress.images - shown) / max(1e-9, now - shown_at)
                shown, shown_at = progress.images, now
                self.tracker.record_step(
                    {
                        "step": step.number + 1,
                        "epoch": progress.epoch + 1,
                        "loss": loss,
                        "lr": step.lr,
                        "grad_norm": norm,
                        "images_per_second": rate,
                    }
                )
            if wishes > 0:
                raise _Stopping
            del step  # and with it its images: others are about to be fetched

    def _steps(self) -> Iterator[_Step]:
        """Take the optimizer steps of an epoch and yield each of them when its numbers are there.

        The host would let the device wait while it reads a step's numbers and prepares the next one. So where
        `reads_late`, it launches the next step's passes first: whatever the numbers say, those change nothing
        but gradients.
        """
        unread: _Step | None = None
        for window in self.windows.read(reading(self.job.train)):
            step = self._compute_gradients(window)
            if unread is not None:
                yield self._checked(unread)
                unread = None
            follows = not self.stop.requested and self.windows.fetch_ahead()
            self._update(step)
            if self.reads_late and follows:
                unread = step
            else:
                yield self._checked(step)
            del step  # or it would keep its images while the next ones are computed with

    def _compute_gradients(self, window: list[Batch]) -> _Step:
        """Launch forward and backward of the batches of `window`: clipped gradients, over all processes."""
        recipe, number = self.recipe, self.progress.step
        lr = set_learning_rate(self.optimizer, self.schedule, number)
        is_last = self.progress.batch + len(window) == len(self.job.train)
        own_images = sum(len(images) for images, _ in window)
        # Several processes wait for each other here, where the device has nothing to do anyway.
        num_images = int(self.processes.sum(torch.tensor(own_images)))
        if num_images < 0:  # another process could not read its own
            raise _Stopping
        if num_images == 0:  # every image of the window was corrupt and skipped
            return _Step(number, window, 0, lr, is_last, Readback(torch.zeros(3)))

        # Losses are sums, so parts of any size add up to the whole.
        if own_images == 0 or not self.replaces_gradients:
            self.optimizer.zero_grad(set_to_none=not self.gradients_stay)
        total = torch.zeros((), device=self.device)
        for micro, (images, labels) in enumerate(window):
            if len(images) > 0:
                total += self._replay_or_run(*self._prepare(images, labels, number, micro))
        if number == self.first_step and own_images > 0:
            adapters.check_gradients(self.model)

        # Over all processes: gradients, loss, wish to stop. Then from a sum to a mean over the images there
        # really were.
        self.processes.sum_gradients_(list(self.parameters.values()))
        wish = torch.full_like(total, self.stop.requested)
        sums = self.processes.sum(torch.stack([total, wish]))
        self.scaler.unscale_(self.optimizer)
        factor = self.images_per_step / num_images
        total_norm = scale_and_clip(self.parameters.values(), factor, recipe.clip_grad)
        if unmoved := ", ".join(self.watch.look()):
            self._warn(f"gradient exactly zero in all of the first {WATCHED_STEPS} steps: {unmoved}")
        numbers = Readback(torch.cat([sums, total_norm[None]]))
        return _Step(number, window, num_images, lr, is_last, numbers)

    def _update(self, step: _Step) -> None:
        """Change the weights, but never by a loss or gradient that is not finite."""
        self.progress.step += 1
        self.progress.batch += len(step.window)
        if step.num_images == 0:
            return
        if self.device_guards:
            skip_unless_finite(self.optimizer, step.numbers.values)
        else:
            self._require_finite(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(step.number)

    def _checked(self, step: _Step) -> _Step:
        """`step`, whose numbers have arrived and are finite."""
        if self.device_guards:  # without a guard the host has looked before the update
            self._require_finite(step)
        return step

    def _prepare(self, images: Tensor, labels: Tensor, number: int, micro: int) -> Batch:
        """Seed the pass of micro-batch `micro` of step `number` and mix it; the same at every call."""
        place = (number, micro, self.processes.rank)
        seed_generators(derive_seed(self.recipe.seed, "step", *place), self.device)
        return self.mix(images, labels, derive_seed(self.recipe.seed, "mix", *place[:2]))

    def _replay_or_run(self, images: Tensor, targets: Tensor) -> Tensor:
        """`_forward_backward`, or its replay."""
        if self.graph is not None:
            try:
                return self.graph(self._forward_backward, images, targets)
            except CaptureError as error:
                self.graph = None
                self._warn(f"the CUDA graph could not be recorded, batches run eagerly: {error}")
        return self._forward_backward(images, targets)

    def _forward_backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of a batch to those of the step; return its loss, summed over images."""
        loss = self._loss(self.forward, images, targets)
        share = self.scaler.scale(loss / self.images_per_step)
        if self.gradients_stay:
            put_gradients(share, self.parameters.values(), replace=self.replaces_gradients)
        else:
            share.backward()
        return loss.detach()

    def _loss(self, forward: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> Tensor:
        with self.autocast():
            logits = forward(images)
        return summed_loss(logits, targets, self.recipe.label_smoothing)

    def _require_finite(self, step: _Step) -> None:
        loss_sum, _, norm = step.numbers.read()
        if math.isfinite(loss_sum) and (math.isfinite(norm) or self._scale_is_sought()):
            return
        place = None
        for micro, (images, labels) in enumerate(step.window):
            if place is None and len(images) > 0:

                def repeat(images: Tensor, labels: Tensor = labels, micro: int = micro) -> Tensor:
                    return self._loss(self.model, *self._prepare(images, labels, step.number, micro))

                place = find_nonfinite(self.model, images, repeat, backward=True)
        places = [found for found in self.processes.gather(place) if found is not None]
        what = "gradient" if math.isfinite(loss_sum) else "loss"
        hint = "set --clip-grad" if self.recipe.amp == "none" else "use --amp none"
        raise NonFiniteError(
            f"non-finite {what} in epoch {self.progress.epoch + 1}, step {step.number + 1} "
            f"(lr {step.lr:.2e}, amp {self.recipe.amp}). "
            f"It first arises in {places[0] if places else 'no place that a replay of the batch shows'}. "
            f"No update was made with it; lower --lr or {hint}"
        )

    def _scale_is_sought(self) -> bool:
        """Whether fp16 gradients may still overflow: those steps are skipped and the scale is lowered."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0

    # --- the end of an epoch ------------------------------------------------------------------

    def _end_epoch(self) -> None:
        recipe, progress = self.recipe, self.progress
        lr = self.schedule(max(0, progress.step - 1), recipe.lr)
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": lr,
            "train_loss": progress.loss_sum / max(1, progress.loss_images),
            "images_per_second": progress.images / max(1e-9, progress.train_seconds),
        }
        if progress.loss_images == 0:
            raise InputError(f"epoch {progress.epoch + 1}: none of the training images can be decoded")
        last = progress.epoch + 1 == recipe.epochs
        if last or (progress.epoch + 1) % recipe.eval_interval == 0:
            with self.ema.applied() if self.ema else nullcontext():
                scores = self._evaluate(self.job.selection)
                self.last_scores = scores
                record |= {"loss": scores.loss, "top1": scores.top1, "top5": scores.top5}
                if progress.is_better(scores.top1, scores.loss):
                    progress.best_top1, progress.best_epoch = scores.top1, progress.epoch + 1
                    progress.stale_evaluations = 0
                    self._save_next_adapter()
                else:
                    progress.stale_evaluations += 1
        progress.history.append(record)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_images = 0.0, 0
        self.tracker.record_epoch(record, recipe.selection_split)
        self._save()

    def _scores_if_known(self, loader: ImageLoader) -> Evaluation | None:
        """The last evaluation, if it was of these images with the very weights of the best adapter."""
        if loader is not self.job.selection or self.last_scores is None:
            return None
        scored = self.ema.tensors if self.ema else self.parameters
        saved = adapters.adapter_state_dict(self.model, "best")
        same = saved.keys() == scored.keys() and all(torch.equal(saved[key], scored[key]) for key in saved)
        return self.last_scores if same else None

    def _evaluate(self, loader: ImageLoader) -> Evaluation:
        loader.set_position(0)
        self.tracker.show_evaluation(loader.dataset.split)
        try:
            scores = evaluate(
                self.model,
                reading(loader),
                len(self.job.classes),
                device=self.device,
                autocast=self.autocast,
                processes=self.processes,
                should_stop=lambda: self.stop.requested,
            )
        except InputError as error:
            raise _Stopping(str(error)) from error
        if scores is None:
            raise _Stopping
        split = loader.dataset.split
        if not math.isfinite(scores.loss):
            raise NonFiniteError(
                f"the loss on {split!r} is not finite: the weights have diverged, lower --lr"
            )
        if self.recipe.on_corrupt == "error":
            assert scores.num_images == len(loader.dataset), "evaluation counts every image exactly once"
        return scores

    def _finish(self) -> Report:
        recipe, progress = self.recipe, self.progress
        memory = max(self.processes.gather(peak_memory(self.device)))
        # From the file, as a user would: what is scored is what the run leaves behind.
        info = vimtune.load_adapter(self.model, self.folder.adapter, name="best", force=recipe.force)
        loader = self.job.test or self.job.selection
        scores = self._scores_if_known(loader) or self._evaluate(loader)
        for used in dict.fromkeys((self.job.train, self.job.selection, loader)):
            if skipped := len(set().union(*self.processes.gather(used.skipped_paths))):
                self._warn(f"{used.dataset.split}: {skipped} corrupt images left out")
        progress.seconds = self._seconds()
        report = build_report(
            recipe,
            progress,
            scores,
            classes=self.job.classes,
            data=self.job.sources,
            split=loader.dataset.split,
            method_config=describe_method(info),
            trainable=sum(p.numel() for p in self.parameters.values()),
            total=vimtune.summary(self.model).total,
            processes=self.processes,
            memory=memory,
            cuda_graph=self.graph is not None and self.graph.num_replays > 0,
            run_dir=self.folder.path,
        )
        if self.processes.is_main:
            report = conclude(report, scores.confusion, self.job.classes, self.folder, self.tracker)
        return report

    # --- files --------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the state, then put the adapter that belongs to it in its place."""
        self.progress.seconds = self._seconds()
        self.progress.metrics_bytes = self.tracker.sync()  # first, so that this count is never too high
        if not self.processes.is_main:
            return
        state = RunState(
            recipe=lasting(self.recipe),
            facts=self.facts,
            progress=self.progress,
            adapter=adapters.adapter_state_dict(self.model, TRAINED),
            optimizer=optimizer_tensors(self.optimizer, self.parameters),
            ema=self.ema.tensors if self.ema else {},
            scaler=self.scaler.state_dict(),
        )
        save_run_state(self.folder.checkpoint, state)
        settle_best_adapter(self.folder, self.progress.best_epoch)

    def _save_next_adapter(self) -> None:
        """Write the adapter that becomes the best one when the state is saved next."""
        if not self.processes.is_main:
            return
        with writing(self.folder.next_adapter):
            vimtune.save_adapter(
                self.model,
                self.folder.next_adapter,
                classes=self.job.classes,
                preprocessing=self.job.preprocessing,
                extra={"recipe": self.recipe.to_share(), "epoch": self.progress.epoch + 1},
            )

    def _restore(self, saved: RunState) -> None:
        same_base = adapters.has_base(self.model, saved.facts.base_hash, saved.facts.base_origin)
        notes = compare(saved.recipe, saved.facts, self.recipe, self.facts, same_base)
        check_place(saved.progress, len(self.job.train))
        check_tensors(saved, adapters.adapter_state_dict(self.model, TRAINED), self.parameters)
        adapters.load_adapter_state_dict(self.model, saved.adapter, TRAINED)
        restore_optimizer(self.optimizer, self.parameters, saved.optimizer)
        if self.ema is not None:
            self.ema.restore(saved.ema or saved.adapter)
        if self.scaler.is_enabled() and saved.scaler:
            self.scaler.load_state_dict(saved.scaler)
        self.progress = saved.progress
        self.progress.warnings += [note for note in notes if note not in self.progress.warnings]

    # --- words --------------------------------------------------------------------------------

    def _introduce(self) -> None:
        recipe, tracker = self.recipe, self.tracker
        for split, source in self.job.sources.items():
            tracker.message(f"{split}: {source}")
        trainable = sum(p.numel() for p in self.parameters.values())
        total = vimtune.summary(self.model).total
        tracker.message(
            f"{recipe.model}, {recipe.peft}: {trainable:,} of {total:,} parameters trained "
            f"({100 * trainable / total:.2f} %); {self.device}, backend {resolved_backend(self.device)}, "
            f"amp {recipe.amp}"
            + (f", {self.processes.world_size} processes" if self.processes.world_size > 1 else "")
        )
        if self.device.type == "cuda":
            reasons = "; ".join(self.eager_because)
            tracker.message(f"CUDA graph: no, {reasons}" if reasons else "CUDA graph: yes, after a warm-up")
        tracker.message(f"run folder: {self.folder.path}")
        if self.progress.step:
            tracker.message(f"resumed in epoch {self.progress.epoch + 1} after step {self.progress.step}")
        for warning in self.progress.warnings:
            tracker.message(f"warning: {warning}")

    def _warn(self, text: str) -> None:
        if text in self.progress.warnings:  # said already, perhaps before the run was resumed
            return
        self.progress.warnings.append(text)
        self.tracker.message(f"warning: {text}")

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
        command = f"vimtune train --resume {shlex.quote(str(self.folder.path))}"
        count = self.processes.world_size
        return command if count == 1 else f"torchrun --nproc-per-node {count} --no-python {command}"


@dataclasses.dataclass(frozen=True)
class _Step:
    """An optimizer step, launched if not yet done."""

    number: int
    window: list[Batch]
    num_images: int
    """Images in the step, over all processes."""
    lr: float
    is_last: bool
    """Whether it is the last step of its epoch."""
    numbers: Readback
    """Loss summed over images, wishes to stop, and gradient norm before clipping; of all processes."""


class _Stopping(Exception):
    """Unwinds to where the run is saved; raised in all processes together.

    `failure` says why, where this process knows a reason other than a request to stop.
    """

    def __init__(self, failure: str | None = None) -> None:
        self.failure = failure
