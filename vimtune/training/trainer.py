"""From a recipe to a run: `train` opens the parts of a run and lets it complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from vimtune import adapters
from vimtune.console import build_console, print_line
from vimtune.loggers import LoggedRun, require_installed
from vimtune.ops import resolved_backend
from vimtune.recipe import Recipe
from vimtune.recipe.components import OptimisationSettings
from vimtune.recipe.optimizers import OPTIMIZERS
from vimtune.run_folder import RunFolder, adapter_path
from vimtune.runtime.distributed import Processes, open_processes
from vimtune.runtime.precision import Autocast, build_autocast
from vimtune.tasks.job import Job, Tensors
from vimtune.tasks.report import Report
from vimtune.text import quote
from vimtune.training.callbacks import Callback, Session
from vimtune.training.evaluate import Replays
from vimtune.training.gradients import FreshGradients, Gradients, StandingGradients
from vimtune.training.graph import BatchGraphs, CudaRecorder, Recorder, refusals
from vimtune.training.identity import Facts, compare, facts_of_all, settings_of_all
from vimtune.training.interrupt import StopRequest
from vimtune.training.logs import Logs, compared_settings
from vimtune.training.memory import restart_peak
from vimtune.training.optim import CosineSchedule
from vimtune.training.passes import Passes
from vimtune.training.prefetch import WindowReader
from vimtune.training.report import print_report, versions
from vimtune.training.run import Run
from vimtune.training.settings import process_settings
from vimtune.training.sharding import build_placement
from vimtune.training.start import Start, find_start, prepare_folder
from vimtune.training.state import Progress, RunState, check_place
from vimtune.training.stepper import Stepper, stepper_class
from vimtune.training.tracking import Tracker
from vimtune.training.trained import Trained, build_trained


def train(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> Report:
    """Fine-tune as `recipe` says and leave a run folder behind.

    The folder holds recipe.yaml, adapter.safetensors (the best), checkpoint.safetensors (the last
    state, for `resume`), metrics.jsonl, report.json, report.html, learning_curve.png, what the loggers keep
    there, such as tensorboard/, and what the task adds: confusion_matrix.png, confusion_matrix.csv and
    examples.png. Under torchrun all processes call this with the same recipe and callbacks of the same
    classes; only the first one writes and prints.

    Args:
        recipe: the settings.
        callbacks: are told of the run while it goes, and may end it; see `Callback`.

    Returns:
        The report, of the class that the task has for it.

    Raises:
        ValueError: the recipe, the data, the weights or the run to resume do not allow the run,
            another run uses the folder, the output cannot be written, (`NonFiniteError`) training met inf
            or NaN, or (`InputError`, `PeerLostError`) data or another process got lost; then the state
            was saved.
        Interrupted: Ctrl-C or SIGTERM; the state was saved and can be resumed.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"recipe = {quote(recipe)}: expected a vimtune.Recipe; vimtune.load_recipe reads one from a file"
        )
    with (
        open_processes(recipe.run.device, recipe.check_paths) as processes,
        process_settings(recipe.run, processes.device),
        ExitStack() as stack,
    ):
        restart_peak(processes.device)
        with processes.failing_together():
            _check_callbacks(callbacks)
            names = {"callbacks": [type(callback).__qualname__ for callback in callbacks]}
            processes.demand_same(settings_of_all(recipe) | names)
            with processes.main_first():  # it locks the folder
                start = find_start(recipe, stack if processes.is_main else None)
            if start.report is not None:
                console = build_console(quiet=not processes.is_main)
                print_line(console, f"{recipe.run.output_dir} is finished already; this is its report:")
                print_report(start.report, console)
                return start.report
            run = open_run(recipe, processes, start, stack, callbacks)
        return run.complete()


def _check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise ValueError if one of them is none, such as a class that should have been called."""
    for number, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks[{number}] = {quote(callback)}: expected an instance of a class derived from "
                "vimtune.Callback"
            )


def open_run(
    recipe: Recipe,
    processes: Processes,
    start: Start,
    stack: ExitStack,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Open all that a run works with; the folder comes last, so that a run that cannot start leaves none.

    Args:
        recipe: the settings.
        processes: those of the run.
        start: whether it begins or goes on.
        stack: closes what was opened.
        callbacks: are told of the run.

    Raises:
        ValueError: the run cannot start, for the reasons that `train` names.
    """
    task, optimisation = recipe.task, recipe.optimisation
    require_installed(recipe.run.logger)
    eager_because = refusals(optimisation, processes.device)
    if optimisation.cuda_graph == "on" and eager_because:
        raise ValueError(f"cuda_graph = 'on' is not possible: {'; '.join(eager_because)}. Use auto")
    autocast = build_autocast(optimisation.amp, processes.device)
    placement = build_placement(optimisation, processes)
    job = _open_job(recipe, processes, stack, begins=start.saved is None)
    sizes = adapters.summary(job.model)
    facts = _facts(recipe, job, processes)
    notes = [] if start.saved is None else _compare(recipe, start.saved, facts, job)
    placement.place(job.model)
    trained = build_trained(optimisation, job.model, placement)
    schedule = _schedule(optimisation, len(job.train))
    progress = Progress() if start.saved is None else _continue(start.saved, notes, trained)
    processes.demand_same(facts_of_all(facts, progress.step))
    folder = prepare_folder(recipe, start, progress, processes, stack)
    tracker = _tracker(recipe, job, schedule, processes, progress)
    logs = stack.enter_context(Logs(tracker.warn))
    stack.callback(tracker.close)
    if processes.is_main:
        logs.open(recipe.run.logger, _logged_run(recipe, folder, job, progress))
    stop = stack.enter_context(StopRequest())
    recorder = None if eager_because else CudaRecorder(processes.device)
    stepper = _stepper(
        optimisation, recipe.run.seed, job, trained, schedule, processes, stop, tracker, autocast, recorder
    )
    run = Run(
        recipe=recipe,
        task=task,
        job=job,
        processes=processes,
        trained=trained,
        stepper=stepper,
        schedule=schedule,
        autocast=autocast,
        facts=facts,
        progress=progress,
        folder=folder,
        tracker=tracker,
        logs=logs,
        session=_session(recipe, job, folder, processes, tracker, progress),
        callbacks=callbacks,
        stop=stop,
        evaluated=WindowReader(processes.device, 1),
        replays=None if recorder is None else _replays(job, recorder, tracker),
        total=sizes.total,
        head=sizes.head,
    )
    _introduce(run, eager_because)
    return run


def _open_job(recipe: Recipe, processes: Processes, stack: ExitStack, *, begins: bool) -> Job:
    """The job of a run; where the run `begins` and does not go on, with the adapter that it starts from."""
    job = recipe.task.open(recipe, processes)
    stack.callback(job.close)
    if recipe.method.init_adapter is not None and begins:
        classes = job.saved_with_adapter.get("classes")
        file = adapter_path(recipe.method.init_adapter)
        adapters.start_from(job.model, file, classes=classes, force=recipe.run.force)
    return job


def _tracker(
    recipe: Recipe, job: Job, schedule: CosineSchedule, processes: Processes, progress: Progress
) -> Tracker:
    """What shows a run from where it stands at `progress`."""
    steps_per_epoch = recipe.optimisation.steps_of(len(job.train))
    left = schedule.total_steps - progress.step + recipe.optimisation.steps_of(progress.batch)
    return Tracker(
        build_console(quiet=not processes.is_main),
        recipe.task,
        # An epoch that `max_steps` has ended counts as a whole one.
        epochs=min(progress.epoch + math.ceil(left / steps_per_epoch), recipe.optimisation.epochs),
        total_steps=schedule.total_steps,
        first_step=progress.step,
        warnings=progress.warnings,
    )


def _session(
    recipe: Recipe, job: Job, folder: RunFolder, processes: Processes, tracker: Tracker, progress: Progress
) -> Session:
    """What callbacks see of a run."""
    return Session(
        recipe=recipe,
        model=job.model,
        folder=folder.path,
        device=processes.device,
        rank=processes.rank,
        epochs=tracker.epochs,
        total_steps=tracker.total_steps,
        _progress=progress,
        _message=tracker.message,
    )


def _logged_run(recipe: Recipe, folder: RunFolder, job: Job, progress: Progress) -> LoggedRun:
    """What loggers are told of a run that stands at `progress`."""
    return LoggedRun(
        folder=folder.path,
        settings=compared_settings(recipe),
        unit=recipe.task.unit,
        splits=(job.selection.split,),
        scores=tuple(score.name for score in recipe.task.scores),
        first_step=progress.step,
        kept_bytes=progress.metrics_bytes,
    )


def _schedule(settings: OptimisationSettings, batches: int) -> CosineSchedule:
    """The learning rate over the steps of a run whose epochs have so many batches.

    Where `max_steps` ends the run before, the warm-up has the share of it that it has of all epochs.
    """
    steps_per_epoch = settings.steps_of(batches)
    total = steps_per_epoch * settings.epochs
    warmup = steps_per_epoch * settings.warmup_epochs
    if settings.max_steps is not None and settings.max_steps < total:
        total, warmup = settings.max_steps, warmup * settings.max_steps / total
    return CosineSchedule(
        total_steps=total,
        warmup_steps=round(warmup),
        min_lr=settings.min_lr,
        constant=OPTIMIZERS[settings.opt].averages,
    )


def _facts(recipe: Recipe, job: Job, processes: Processes) -> Facts:
    """What the weights will depend on besides the recipe."""
    base, replaced = adapters.base_identity(job.model), adapters.replaced_identity(job.model)
    return Facts(
        outputs=job.outputs,
        train_examples=job.train.num_examples,
        base_hash=base.bits,
        base_origin=base.origin,
        replaced_hash=replaced.bits,
        replaced_origin=replaced.origin,
        versions=versions(recipe.task),
        data={loader.split: loader.fingerprint() for loader in job.loaders},
        processes=processes.world_size,
        readers=job.readers,
        methods=recipe.method.all_options,
    )


def _compare(recipe: Recipe, saved: RunState, facts: Facts, job: Job) -> list[str]:
    """One line for each change since the state of a run was saved that makes the rest differ.

    Raises:
        ResumeError: it is a state of another run.
    """
    base, replaced = saved.facts.base, saved.facts.replaced
    same_base = adapters.has_base(job.model, base.bits, base.origin)
    if replaced.origin:
        same_base &= adapters.has_replaced(job.model, replaced.bits, replaced.origin)
    notes = compare(saved.recipe, saved.facts, recipe, facts, same_base)
    check_place(saved.progress, len(job.train))
    return notes


def _continue(saved: RunState, notes: list[str], trained: Trained) -> Progress:
    """Take over the state of a run, and return where it stands.

    Raises:
        ResumeError: its tensors are not those of this run.
    """
    trained.restore(saved)
    progress = saved.progress
    progress.warnings += [note for note in notes if note not in progress.warnings]
    return progress


def _stepper(
    settings: OptimisationSettings,
    seed: int,
    job: Job,
    trained: Trained,
    schedule: CosineSchedule,
    processes: Processes,
    stop: StopRequest,
    tracker: Tracker,
    autocast: Autocast,
    recorder: Recorder | None,
) -> Stepper:
    """The steps of a run, from where `tracker` stands; `recorder` records the passes of its batches."""
    parameters = list(trained.parameters.values())
    gradients: Gradients = FreshGradients(parameters)
    graphs: BatchGraphs[Tensor] | None = None
    if recorder is not None:
        gradients = StandingGradients(parameters, one_batch=settings.grad_accum == 1)
        # The first step is over before: gradients still absent after it are those of dead tensors.
        graphs = BatchGraphs(
            recorder,
            parameters,
            warmup=settings.grad_accum + 1,
            limit=job.expect_replays(),
        )
    usual_count = job.usual_count * settings.grad_accum
    passes = Passes(
        job,
        gradients,
        trained.scaler,
        autocast=autocast,
        compiled=settings.compile,
        seed=seed,
        rank=processes.rank,
        device=processes.device,
        divisor=usual_count,
        graphs=graphs,
        warn=tracker.warn,
    )
    return stepper_class(trained)(
        passes,
        trained,
        WindowReader(processes.device, settings.grad_accum),
        schedule,
        processes,
        stop,
        first_step=tracker.first_step,
        usual_count=usual_count,
        clip_grad=settings.clip_grad,
        amp=settings.amp,
        warn=tracker.warn,
    )


def _replays(job: Job, recorder: Recorder, tracker: Tracker) -> Replays | None:
    """What replays the batches of evaluations; None where none is worth it.

    They share the memory of the graphs of training, with which they take turns.
    """
    limit = job.expect_replayed_evaluations()
    graphs: BatchGraphs[Tensors] = BatchGraphs(recorder, (), warmup=1, limit=limit)
    return Replays(graphs, tracker.warn) if limit > 0 else None


def _introduce(run: Run, eager_because: list[str]) -> None:
    """Say what the run works on, and with what."""
    recipe, tracker, progress = run.recipe, run.tracker, run.progress
    for loader in run.job.loaders:
        tracker.message(
            f"{loader.split}: {loader.source}" + (f"; {loader.reading}" if loader.reading else "")
        )
    trainable, total = run.trained.count, run.total
    device, world_size = run.processes.device, run.processes.world_size
    tracker.message(
        f"{recipe.backbone.model}, {recipe.method.peft}: {trainable:,} of {total:,} parameters trained "
        f"({100 * trainable / total:.2f} %); {device}, backend {resolved_backend(device)}, "
        f"amp {recipe.optimisation.amp}"
        + (f", {world_size} processes" if world_size > 1 else "")
        + (" that share the model" if recipe.optimisation.shard else "")
    )
    if progress.step == 0 and run.settles:
        tracker.message("before the first step the method chooses from training batches")
    if device.type == "cuda":
        reasons = "; ".join(eager_because)
        tracker.message(f"CUDA graph: no, {reasons}" if reasons else "CUDA graph: yes, after a warm-up")
    tracker.message(f"run folder: {run.folder.path}")
    if progress.step:
        whole = recipe.optimisation.steps_of(len(run.job.train)) * progress.epoch
        ended = f"; epoch {progress.epoch} had ended early and has no rest" if progress.step < whole else ""
        tracker.message(f"resumed in epoch {progress.epoch + 1} after step {progress.step}{ended}")
    for warning in progress.warnings:
        tracker.message(f"warning: {warning}")
