"""Where a run begins or goes on: the folder, the state in it, and whether anything is left to do."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vimtune.files import remove_temporaries
from vimtune.recipe import Recipe
from vimtune.run_folder import RunFolder, create_unused, hold, make_folder, writing
from vimtune.runtime.distributed import Processes
from vimtune.tasks.report import Report
from vimtune.text import printable, quote
from vimtune.training.identity import (
    HARMLESS,
    ResumeError,
    differences,
    flag_for_defaults,
    lasting,
    options_of,
)
from vimtune.training.report import read_report
from vimtune.training.state import (
    Progress,
    RunState,
    ended,
    load_run_state,
    settle_best_adapter,
    steps_used_up,
)


@dataclass(frozen=True)
class Start:
    """How a run starts.

    `folder` is None for a new folder, which is made when all else is ready, so that a run that cannot
    start leaves none behind. Without `saved` the run starts at its beginning. `report` is that of a run
    with nothing left to do.
    """

    folder: RunFolder | None = None
    saved: RunState | None = None
    report: Report | None = None


def find_start(recipe: Recipe, stack: ExitStack | None) -> Start:
    """What `recipe.run.resume` asks for.

    With a folder or a state file: continue it; a folder whose run was stopped before its first state
    starts over. With "auto": continue what lies in `output_dir`, or start there; a run that is finished
    with the same settings is only reported, so that a command line can be given again at any time.

    Args:
        recipe: the recipe.
        stack: keeps the folder locked; None in processes that leave this to the main process.

    Raises:
        ResumeError: there is nothing to continue, or nothing to do for these settings.
        FolderInUseError: another run works in the folder.
    """
    if recipe.run.resume is None:
        return Start()
    automatic = recipe.run.resume == "auto"
    folder, file = _named_by(recipe)
    if automatic and not folder.path.exists():
        return Start()
    if recipe.run.output_dir is not None and Path(recipe.run.output_dir).resolve() != folder.path.resolve():
        raise ResumeError(
            f"a resumed run continues in its own folder {printable(str(folder.path))}: drop output_dir"
        )
    if stack is not None and folder.path.is_dir():
        stack.enter_context(hold(folder))
    if not file.is_file():
        _require_startable(recipe.run.resume, folder, file, automatic)
        return Start(folder)
    saved = load_run_state(file)
    report = _report_if_finished(recipe, saved, folder)
    if report is not None:
        done = saved.progress.epoch
        finished = f"{printable(str(folder.path))} is finished after {done} epochs"
        if not automatic:
            raise ResumeError(f"{finished}: {_how_to_train_longer(recipe, saved.progress)}")
        names = [name for name in recipe.to_dict() if name not in HARMLESS]
        options = options_of(saved.recipe, saved.facts)
        if others := differences(saved.recipe, options, recipe, names):
            flag = flag_for_defaults(options, recipe)
            own = "" if flag is None else f", or state options that have other defaults now ({flag})"
            raise ResumeError(
                f"{finished} with other settings ({'; '.join(others)}): choose another output_dir{own}"
            )
    return Start(folder, saved, report)


def prepare_folder(
    recipe: Recipe, start: Start, progress: Progress, processes: Processes, stack: ExitStack
) -> RunFolder:
    """Make the folder of a new run, tidy that of one that continues, and write the recipe there.

    The main process does so, and keeps other runs out as long as `stack` is open. Where the best adapter
    that `progress` names is not there, `progress` forgets it, with a warning.

    Raises:
        ResumeError: it is not there, and no epoch is left that could take its place.
        FolderInUseError: another run works in the folder.
        OutputError: the folder cannot be written.
    """
    folder, best_is_there = start.folder, True
    if processes.is_main:
        folder = _claim_new_folder(recipe, stack) if folder is None else folder
        with writing(folder.path):
            remove_temporaries(folder.path)
        best_is_there = settle_best_adapter(folder, progress.best_epoch)
    folder, best_is_there = processes.from_main((folder, best_is_there))
    assert isinstance(folder, RunFolder), "the main process has one"
    if not best_is_there:
        missing = f"the best adapter, of epoch {progress.best_epoch}, is not in {printable(str(folder.path))}"
        if ended(recipe.optimisation, progress):
            raise ResumeError(f"{missing}: put it back, or raise --epochs to train on")
        progress.best_epoch = 0  # the next evaluated epoch is the best one
        progress.warnings.append(f"{missing}: the best of the epochs from here on takes its place")
    if processes.is_main:
        with writing(folder.recipe):
            lasting(recipe).replace(output_dir=str(folder.path)).save(folder.recipe)
    return folder


def _how_to_train_longer(recipe: Recipe, progress: Progress) -> str:
    """What to do about a run that has ended."""
    if progress.stopped is not None:
        return "a callback ended it" + (f" ({quote(progress.stopped)})" if progress.stopped else "")
    if steps_used_up(recipe.optimisation, progress):
        return "raise --max-steps to train longer"
    whole = progress.epoch >= recipe.optimisation.epochs
    return "raise --epochs to train longer" if whole else "it stopped early"


def _claim_new_folder(recipe: Recipe, stack: ExitStack) -> RunFolder:
    """Make and lock the folder of a run that starts."""
    if recipe.run.output_dir is None:
        folder = RunFolder(create_unused(recipe.run_dir()))
    else:
        folder = RunFolder(Path(recipe.run.output_dir))
        make_folder(folder.path)
    stack.enter_context(hold(folder))
    if recipe.run.output_dir is not None:
        recipe.check_paths()  # once more: another run may have come first
    return folder


def _named_by(recipe: Recipe) -> tuple[RunFolder, Path]:
    """The run folder and the state file that `recipe.run.resume` names."""
    named = recipe.run.output_dir if recipe.run.resume == "auto" else recipe.run.resume
    assert named is not None, "a recipe that resumes has them"
    path = Path(named)
    if recipe.run.resume == "auto" or path.is_dir():
        return RunFolder(path), RunFolder(path).checkpoint
    return RunFolder(path.parent), path


def _require_startable(resume: str, folder: RunFolder, file: Path, automatic: bool) -> None:
    """Raise ResumeError unless the run of a folder without a state can begin again without loss."""
    missing = f"resume = {resume!r}: there is no checkpoint {printable(str(file))}"
    if file != folder.checkpoint or not (automatic or folder.recipe.is_file()):
        raise ResumeError(missing)
    if found := [path.name for path in (folder.adapter, folder.report) if path.exists()]:
        raise ResumeError(
            f"{missing}, but there is {' and '.join(found)} of a run. Put its checkpoint back, or choose "
            "another folder"
        )


def _report_if_finished(recipe: Recipe, saved: RunState, folder: RunFolder) -> Report | None:
    """The report, if nothing is left to do.

    Without a report of this length the run was stopped between its last epoch and its end: let it end.
    """
    if not ended(recipe.optimisation, saved.progress):
        return None
    report = read_report(folder, recipe.task.report_type())
    return report if report is not None and report.epochs == saved.progress.epoch else None
