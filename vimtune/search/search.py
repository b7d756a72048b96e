"""How a search goes: its steps, their trials, and the recipe in the end."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vimtune.console import build_console, print_line
from vimtune.files import OutputError, atomic_write_text
from vimtune.pages.style import save_picture
from vimtune.plugins import with_imports
from vimtune.recipe import Recipe
from vimtune.run_folder import RunFolder, cannot_make, hold, make_folder, obstacle, writing
from vimtune.runtime.seeds import derive_seed
from vimtune.search import results
from vimtune.search.earlier import refuse_other_defaults
from vimtune.search.fitting import check_parts
from vimtune.search.plan import PLAN, Plan
from vimtune.search.space import Drawn, Space
from vimtune.search.study import Study, Trial, drawn_again
from vimtune.search.trial import LOSS, Job, TrialOutcome, keep_records
from vimtune.search.workers import run_here, run_in_processes
from vimtune.tasks.base import Score
from vimtune.text import printable
from vimtune.training.interrupt import Interrupted

if TYPE_CHECKING:
    import optuna

BEST = "best.yaml"
"""File of the recipe that is found."""
_HOPELESS = 3
"""So many trials may fail before one succeeds."""


def run_search(plan: Plan, folder: Path, workers: int) -> Recipe:
    """Search, or go on with a search, in `folder`, which has its plan.

    Args:
        plan: what to search.
        folder: where; it is there.
        workers: trials at once.

    Returns:
        The recipe that is found, as it stands in best.yaml.

    Raises:
        ValueError: no trial could be run, the journal is damaged, or another search uses the folder.
        Interrupted: Ctrl-C or SIGTERM.
    """
    console = build_console()
    command = with_imports(f"vimtune search --resume {shlex.quote(str(folder))}")
    with ExitStack() as stack:
        stack.enter_context(hold(RunFolder(folder)))
        try:
            space, drawn = _run_steps(plan, folder, workers, console)
        except KeyboardInterrupt:
            print_line(console, "stopped; the trials are saved, continue with:")
            print_line(console, f"  {command}", wrap=False)
            raise Interrupted(command) from None
        recipe = plan.final_recipe(space, drawn)
        with writing(folder / BEST):
            recipe.save(folder / BEST)
    print_line(console, f"found: {results.describe(drawn)}")
    print_line(console, "train it with:")
    train = with_imports(f"vimtune train --config {shlex.quote(str(folder / BEST))}")
    print_line(console, f"  {train}", wrap=False)
    return recipe


def begin(plan: Plan, folder: Path) -> None:
    """Make the folder of a new search, and write its plan there, if the model can have the parts of its
    space.

    Raises:
        SpaceError: it cannot.
        ValueError: the folder holds something already, or cannot be written; or the data or weights of the
            recipe cannot be opened.
    """
    shown = printable(str(folder))
    if (reason := obstacle(folder)) is not None:
        raise OutputError(cannot_make(folder, reason))
    if (folder / PLAN).exists():
        raise ValueError(
            f"--output-dir {shown} holds another search: choose another folder, or continue that search with "
            f"--resume {shown}"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--output-dir {shown} is not empty: give the name of a new folder")
    for conflict in check_parts(plan):
        print_line(build_console(), f"trials with both will fail: {conflict}")
    make_folder(folder)
    with writing(folder / PLAN):
        plan.save(folder / PLAN)


def _run_steps(plan: Plan, folder: Path, workers: int, console: Console) -> tuple[Space, Drawn]:
    """Run the step or the two steps; what the best trial of the last one has drawn, and from which space."""
    space, base = plan.space, plan.base()
    if not space.has_refinement:
        only = Step(plan, plan.name, folder, 1, space, base, console)
        return space, only.run(workers)
    first = Step(plan, f"{plan.name}, step 1", folder / "step-1", 1, space, base, console)
    found = first.run(workers)
    if not found.parts and not space.refined_keys:
        return space, found
    refined, base = space.refine(found), plan.base(found.keys)
    second = Step(plan, f"{plan.name}, step 2", folder / "step-2", 2, refined, base, console)
    return refined, second.run(workers)


@dataclass
class Step:
    """One step of a search: its trials, in its folder."""

    plan: Plan
    name: str
    """What it is called."""
    folder: Path
    number: int
    """1 or 2."""
    space: Space
    base: dict[str, Any]
    """The recipe's keys by which those that are drawn may be multiplied."""
    console: Console
    active: dict[int, optuna.Trial] = field(default_factory=dict)
    """The trials that are running, by number."""
    waiting: list[optuna.Trial] = field(default_factory=list)
    """Those that had begun when the search was stopped, and are to go on."""

    @cached_property
    def study(self) -> Study:
        """The trials so far."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return Study(
            self.folder / "study.journal",
            seed=derive_seed(self.plan.seed, "step", self.number),
            prune=self.plan.prune,
            epochs=self.plan.recipe.optimisation.epochs,
        )

    @property
    def score(self) -> Score:
        """What trials are compared by: the task's first score, or the loss where the data do not have it."""
        metrics = {trial.outcome.metric for trial in self.study.trials() if trial.outcome is not None}
        return LOSS if LOSS.name in metrics else next(iter(self.plan.recipe.task.scores), LOSS)

    def run(self, workers: int) -> Drawn:
        """Run the trials that are left; what the best of all has drawn.

        Raises:
            ValueError: no trial has succeeded, or those that there are had other defaults.
        """
        complete = (trial for trial in self.study.trials() if trial.is_complete)
        refuse_other_defaults(map(self._recipe, complete))
        self.waiting = self.study.unfinished()
        done = sum(trial.outcome is not None for trial in self.study.trials())
        where = printable(str(self.folder))
        what = f"{self.name}: {self.plan.trials} trials in {where}"
        print_line(self.console, what + (f", of which {done} are done" if done else ""))
        if workers == 1:
            run_here(self)
        else:
            run_in_processes(self, workers)
        ranked = self.study.ranked()
        self._write(picture=True)
        if not ranked:
            raise ValueError(f"no trial has succeeded; the reasons are in {where}/trials.md")
        results.print_trials(ranked, self.varying, self.score, self.console)
        return self.drawn(ranked[0])

    def drawn(self, trial: Trial) -> Drawn:
        """What a trial has drawn."""
        return self.space.draw(drawn_again(trial.params), self.base)

    def varying(self, trial: Trial) -> Drawn:
        """What tables say of it: what is not the same in every trial."""
        return self.space.varying(self.drawn(trial))

    # --- what the workers ask for

    def next_job(self) -> Job | None:
        """The next trial; None if there are enough."""
        if self.waiting:
            trial = self.waiting.pop(0)
        elif len(self.study) < self.plan.trials:
            trial = self.study.ask()
        else:
            return None
        drawn = self.space.draw(trial, self.base)
        self.active[trial.number] = trial
        values = self.plan.trial_values(self.space, drawn, self._place(trial.number))
        return Job(trial.number, values)

    def _recipe(self, trial: Trial) -> Recipe:
        """The recipe with which a trial would be begun now."""
        values = self.plan.trial_values(self.space, self.drawn(trial), self._place(trial.number))
        return Recipe.from_values(values)

    def _place(self, number: int) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / f"{number:05}"

    def keep_on(self, number: int, epoch: int, value: float) -> bool:
        """Note the value of an epoch; whether the trial goes on."""
        return self.study.keep_on(self.active[number], epoch, value)

    def finish(self, job: Job, outcome: TrialOutcome) -> None:
        """Note what came of a trial, and say so.

        Raises:
            ValueError: the first trials have all failed.
        """
        self.study.finish(self.active.pop(job.number), outcome)
        with writing(job.folder):
            keep_records(job.folder)
        self._write(picture=False)
        trials = self.study.trials()
        self._say(trials[job.number])
        ended = [trial.outcome for trial in trials if trial.outcome is not None]
        if len(ended) >= _HOPELESS and all(each.state == "failed" for each in ended):
            raise ValueError(
                f"the first {len(ended)} trials have failed, the last one so: {outcome.reason}; "
                f"its log is {printable(str(job.folder / 'log.txt'))}"
            )

    def _say(self, trial: Trial) -> None:
        """Print a line about a trial that has just ended."""
        outcome, score = trial.outcome, self.score
        assert outcome is not None
        parts = [f"trial {trial.number}: {outcome.state}"]
        if trial.has_value:
            value = score.show(results.shown(trial, score))
            parts.append(f"val {score.title} {value} in epoch {outcome.epoch}")
        if outcome.parameters is not None:
            parts.append(f"{outcome.parameters:,} parameters")
        parts.append(outcome.reason or results.describe(self.varying(trial)))
        for best in self.study.ranked()[:1]:
            parts.append(f"best: {score.show(results.shown(best, score))} (trial {best.number})")
        print_line(self.console, "; ".join(parts))

    def _write(self, picture: bool) -> None:
        """Write the tables, the best trials first, and with `picture` also that."""
        ranked, trials = self.study.ranked(), self.study.trials()
        best = {trial.number for trial in ranked}
        ordered = [*ranked, *(trial for trial in trials if trial.number not in best)]
        tables = {
            "trials.csv": results.to_csv(ordered, self.score),
            "trials.md": results.to_markdown(ordered, drawn=self.varying, score=self.score),
        }
        for name, table in tables.items():
            with writing(self.folder / name):
                atomic_write_text(self.folder / name, table)
        if picture:
            winner = next(iter(ranked), None)
            title = f"{self.name}: {self.plan.recipe.backbone.model}"
            save_picture(results.draw_trials(trials, winner, self.score, title), self.folder / "trials.png")
