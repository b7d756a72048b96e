"""`vimtune compare`: run what is missing of a comparison, then show all of it."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vimtune.compare.execution import POLL_SECONDS, Processes, StartedRun
from vimtune.compare.plan import PLAN_FILE, Cell, Plan, PlanError, load_plan
from vimtune.compare.results import Row, rows_of_runs
from vimtune.compare.schedule import Schedule
from vimtune.compare.soups import soup_of
from vimtune.compare.tables.console import print_rows
from vimtune.compare.tables.files import write_tables
from vimtune.compare.tables.notes import OF_RUNS, protocol_of
from vimtune.compare.worker import LOG_FILE
from vimtune.console import build_console, print_line
from vimtune.plugins import with_imports
from vimtune.recipe import Recipe, RecipeError, changed_options, complete_stored, keeping
from vimtune.recipe.files import read_values
from vimtune.run_folder import RunFolder, hold, made_folder, make_folder, unused_folder, writing
from vimtune.runtime.device import resolve_device
from vimtune.runtime.distributed import Processes as OneProcess
from vimtune.runtime.launch import read_launch
from vimtune.text import counted, duration, printable, quote, shorten
from vimtune.training.identity import HARMLESS, differences, in_one_line
from vimtune.training.interrupt import Interrupted, StopRequest
from vimtune.training.result import Result, read_result
from vimtune.training.unfinished import options_begun_with

MAY_CHANGE = frozenset((*HARMLESS, "device", "threads")) - {"checkpoint", "pretrained"}
"""Keys of recipes that a comparison may have otherwise when it is continued. The weights from which runs
begin are none of them: a run that goes on knows its own, and a finished one does not say which it had."""


def compare(plan: Plan, folder: Path) -> tuple[list[Row], Mapping[Cell, str]]:
    """Make the runs of a comparison that are not finished yet, and write its tables.

    Args:
        plan: what is compared.
        folder: that of the comparison. It may hold runs, of this plan or of an earlier form of it.

    Returns:
        A row for each method on each data set, and why runs failed, which are missing in their rows.

    Raises:
        ValueError: the folder holds runs with other settings, is in use, or cannot be written; data of a run
            cannot be opened; or there are several processes. No run has been started then.
        Interrupted: Ctrl-C or SIGTERM; runs have saved their states, and the tables have what there is.
    """
    if read_launch().world_size > 1:
        raise ValueError("a comparison starts the processes of its runs itself: start it without torchrun")
    console = build_console()
    with made_folder(folder), hold(RunFolder(folder)), StopRequest() as stop:
        schedule = Schedule(plan, _finished(plan, folder))
        _check_data_and_models(schedule, folder)
        with writing(folder):
            plan.save(folder)
        print_line(
            console,
            f"comparison of {counted(schedule.total, 'runs')}, {len(schedule.done)} finished: {folder}",
        )
        print_line(console, protocol_of(plan))
        if others := plan.published_elsewhere:
            shown = printable(shorten(", ".join(others)))
            print_line(console, f"published scores without a run here ({len(others)}): {shown}")
        _run_all(schedule, folder, stop, console)
        rows = _with_soups(schedule, folder, console, make=not stop.requested)
        _conclude(rows, folder, protocol_of(plan), schedule.failed, console, plan.reference)
        if stop.requested:
            go_on = with_imports(f"vimtune compare --resume {shlex.quote(str(folder))}")
            print_line(console, "stopped; what is finished is kept, go on with:")
            print_line(console, f"  {go_on}", wrap=False)
            raise Interrupted(go_on)
    return rows, schedule.failed


def _finished(plan: Plan, folder: Path, *, goes_on: bool = True) -> dict[Cell, Result]:
    """The runs of a plan that are finished in a folder.

    Args:
        plan: what is compared.
        folder: that of the comparison.
        goes_on: whether runs are to be made beside those, which have to have the same defaults then.

    Raises:
        PlanError: there are runs with other settings than those of the plan.
    """
    found: dict[Cell, Result] = {}
    problems: list[str] = []
    advice: dict[str, None] = {}
    for cell in plan.all_cells():
        run = RunFolder(folder / cell.path)
        if not run.recipe.is_file():
            continue
        wanted = plan.recipe(cell, folder)
        try:
            stored = Recipe.from_values(complete_stored(read_values("resume", run.recipe)))
        except RecipeError as error:
            problems += [f"{cell}: {problem}" for problem in error.problems]
            continue
        result = read_result(run.path) if run.report.is_file() else None
        options = options_begun_with(run) if result is None else result.report.method_config
        kept = keeping(changed_options(options, wanted.method), wanted.method)
        if kept != wanted.method.peft_kwargs:
            advice[_how_to_keep(cell.method, kept, folder)] = None
            if not goes_on:
                wanted = wanted.replace(peft_kwargs=kept)
        names = [name for name in wanted.to_dict() if name not in MAY_CHANGE]
        problems += [f"{cell}: {problem}" for problem in differences(stored, options, wanted, names)]
        if result is not None:
            found[cell] = result
    if problems:
        last = f"{folder} has runs with other settings: choose another --output-dir"
        raise PlanError([*problems, *advice, last])
    return found


def _how_to_keep(method: str, kept: Mapping[str, Any], folder: Path) -> str:
    """What to do where the runs of a method have other defaults than they would have now."""
    entry = in_one_line({method: {"peft_kwargs": dict(kept)}})
    return (
        f"{method}: to go on with its runs, state options that have other defaults now, under `methods` in "
        f"{printable(str(folder / PLAN_FILE))}: {entry[1:-1]}"
    )


def _check_data_and_models(schedule: Schedule, folder: Path) -> None:
    """Open the data and the base models of all runs that are to be made, and fetch what may be fetched.

    Raises:
        PlanError: it has a line for each data set and for each model that cannot be opened.
    """
    checked: set[str] = set()
    problems: dict[str, str] = {}

    def check(what: str, settings: object, opens: Callable[[], object]) -> None:
        """Call `opens` unless the same has been opened for another run, or failed with other settings: a
        server that does not answer is waited for once."""
        if what in problems or (key := f"{what} {settings}") in checked:
            return
        checked.add(key)
        try:
            opens()
        except ValueError as error:
            problems[what] = " ".join(str(error).split())

    for cell in schedule.startable():
        recipe = schedule.plan.recipe(cell, folder)
        task, place = recipe.task, f"data: {cell.data}"  # A method may have data of its own.
        check(place, (task.name, recipe.data), partial(task.check_data, recipe, OneProcess()))
        if place not in problems:
            model = f"model: {recipe.backbone.model}"
            check(model, (task.name, recipe.backbone), partial(task.open_base, recipe, OneProcess()))
    if problems:
        raise PlanError([f"{what}: {problem}" for what, problem in problems.items()])


def _run_all(schedule: Schedule, folder: Path, stop: StopRequest, console: Console) -> None:
    """Make all runs that are missing, until a request to stop.

    Raises:
        ValueError: this machine does not have one of the devices.
    """
    options = schedule.plan.options
    for device in options.devices or ():
        resolve_device(device)  # One that is not there is refused before anything is started.
    processes = Processes(options.jobs, options.devices)
    asked = False
    try:
        while True:
            while processes.has_room and not stop.requested and (cell := schedule.next()) is not None:
                run = folder / cell.path
                with writing(run):
                    run.mkdir(parents=True, exist_ok=True)
                    schedule.plan.recipe(cell, folder).save(RunFolder(run).recipe)
                processes.start(cell, run)
                print_line(console, f"{cell}: started, its log is {run / LOG_FILE}")
                schedule.running.add(cell)
            if stop.requested and not asked:
                asked = True
                print_line(
                    console, f"stopping; saving the states of {counted(len(processes.running), 'runs')}"
                )
                processes.ask_to_stop()
            for ended in processes.ended():
                schedule.running.discard(ended.cell)
                _take(schedule, ended, stop.requested, console)
            if not processes.running and (stop.requested or schedule.next() is None):
                return
            time.sleep(POLL_SECONDS)
    finally:
        processes.kill()


def _with_soups(schedule: Schedule, folder: Path, console: Console, make: bool) -> list[Row]:
    """The rows of a comparison, with the scores of the averages over seeds where the plan asks for them.

    Adapters that do not average are no failure: the row has no such score, and a line says why.
    """
    rows = schedule.rows()
    if not schedule.plan.options.soups:
        return rows
    return [
        dataclasses.replace(row, soups=tuple(_soups(row, schedule, folder, console, make))) for row in rows
    ]


def _soups(
    row: Row, schedule: Schedule, folder: Path, console: Console, make: bool
) -> Iterator[Mapping[str, float | None]]:
    """The scores of the averages of a row, one for each data seed."""
    if row.lr is None or row.missing or len(row.seeds) < 2:
        return
    groups: dict[int | None, dict[Cell, Result]] = {}
    for cell in schedule.plan.cells(row.method, row.data, row.lr):
        groups.setdefault(cell.data_seed, {})[cell] = schedule.done[cell]
    for runs in groups.values():
        try:
            scores = soup_of(runs, folder, make)
        except ValueError as error:
            print_line(console, f"no soup of {row.method} on {row.data}: {printable(str(error))}")
            return
        if scores is not None:
            yield scores


def _take(schedule: Schedule, run: StartedRun, stopping: bool, console: Console) -> None:
    """Note and say how a run has ended."""
    place = f"[{len(schedule.done) + len(schedule.failed) + 1}/{schedule.total}] {run.cell}"
    if run.code == 0:
        result = schedule.done[run.cell] = read_result(run.folder)
        took = duration(time.monotonic() - run.started)
        print_line(console, f"{place}: {result.report.selected_by()}, {took}")
    elif not (stopping and run.code in (130, -15)):
        schedule.failed[run.cell] = run.failure()
        print_line(console, f"{place} failed: {schedule.failed[run.cell]}")


def _conclude(
    rows: Sequence[Row],
    folder: Path | None,
    note: str,
    failed: Mapping[Cell, str],
    console: Console,
    reference: str | None,
) -> None:
    """Print the tables and, where there is anything in them, write them into a folder."""
    failures = [f"{cell}: {reason}" for cell, reason in failed.items()]
    print_rows(rows, console, reference)
    for failure in failures:
        print_line(console, f"failed: {failure}")
    if folder is not None and any(row.results for row in rows):
        written = write_tables(rows, folder, note, failures, reference)
        print_line(console, f"written to {folder}: {', '.join(written)}")


def _show(
    runs: Sequence[Path],
    values: Mapping[str, Any],
    config: str | None,
    output_dir: Path | None,
    resume: Path | None,
) -> int:
    """Make the tables of runs that are finished; folders without a report are named and left out."""
    if values or config is not None or resume is not None:
        raise ValueError("with run folders nothing is trained: expected no other flags than --output-dir")
    console, reference = build_console(is_result=output_dir is None), None
    if len(runs) == 1 and (runs[0] / PLAN_FILE).is_file():
        plan = load_plan(runs[0] / PLAN_FILE, {}, check_paths=False)
        reference = plan.reference
        finished = _finished(plan, runs[0], goes_on=False)
        rows = _with_soups(Schedule(plan, finished), runs[0], console, make=False)
        note = protocol_of(plan)
    else:
        results, left_out = [], []
        # A run that is named twice is no second one: the spread would be that of fewer runs.
        for run in {run.resolve(): run for run in runs}.values():
            try:
                results.append(read_result(run))
            except ValueError as error:
                left_out.append(str(error))
        for reason in left_out:
            print_line(console, f"left out: {reason}")
        if not results:
            raise ValueError(f"none of {counted(len(runs), 'folders')} has the report of a finished run")
        rows, note = rows_of_runs(results), OF_RUNS
    if output_dir is not None:
        make_folder(output_dir)
    _conclude(rows, output_dir, note, {}, console, reference)
    return 0


def run_compare(
    *,
    runs: Sequence[Path],
    values: Mapping[str, Any],
    config: str | None,
    output_dir: Path | None,
    resume: Path | None,
) -> int:
    """`vimtune compare`; returns the exit code.

    Args:
        runs: finished run folders, or the folder of one comparison, of which only tables are made.
        values: keys of the plan, as flags give them.
        config: a YAML file with others.
        output_dir: where the comparison or the tables go.
        resume: a comparison to be continued.

    Raises:
        ValueError: the plan, the folders or what they hold do not allow it.
    """
    if runs:
        return _show(runs, values, config, output_dir, resume)
    if resume is not None:
        if output_dir is not None or config is not None:
            raise ValueError(
                "--resume goes on in the folder that it names, by the plan there: drop --output-dir and "
                "--config"
            )
        if not (resume / PLAN_FILE).is_file():
            raise ValueError(f"resume = {quote(str(resume))} is no comparison: it has no {PLAN_FILE}")
        config = str(resume / PLAN_FILE)
    plan = load_plan(config, values)
    default = Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    with ExitStack() as stack:
        folder = resume or output_dir or stack.enter_context(unused_folder(default))
        _, failed = compare(plan, folder)
    return 1 if failed else 0
