"""The trials of one step of a search: those that there were, and the next one.

They are kept by optuna in a journal, a file of JSON lines to which each fact is appended, so that a search
that was killed goes on with what is in it; `optuna-dashboard` shows it, too. What trial n draws depends on
the seed, on n, and on the trials before it, not on whether the search was stopped in between.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimtune.machine import installed_version
from vimtune.schema import check
from vimtune.search.settings import Chooser
from vimtune.search.trial import TrialOutcome
from vimtune.text import printable

if TYPE_CHECKING:
    import optuna

MAX_BYTES = 512 * 2**20
"""Longest journal that is read; the largest number of trials with a hundred epochs has half of it."""
OLDEST = 4
"""First major version of optuna that is supported."""
_OUTCOME = "outcome"
"""Under this name optuna keeps what came of a trial."""
_STARTUP = 5
"""Number of finished trials before one is ended early."""


def require_optuna() -> None:
    """Make sure that optuna is there.

    Raises:
        ValueError: it is not, or too old; the message says what to install.
    """
    install = "pip install 'vimtune[search]'"
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(f"a search needs optuna: {install}")
    version = installed_version("optuna") or ""
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < OLDEST:
        raise ValueError(f"a search needs optuna {OLDEST} or newer, this is {version}: {install}")


@dataclass(frozen=True)
class Trial:
    """A trial as tables show it."""

    number: int
    """Counts from 0."""
    params: dict[str, Any]
    """What was drawn."""
    outcome: TrialOutcome | None
    """None for a trial that has not ended."""

    @property
    def is_complete(self) -> bool:
        """Whether it came to its end."""
        return self.outcome is not None and self.outcome.state == "complete"

    @property
    def has_value(self) -> bool:
        """Whether an epoch of it has a value."""
        return self.outcome is not None and self.outcome.value is not None

    @property
    def value(self) -> float:
        """The value of a trial that has one."""
        assert self.outcome is not None and self.outcome.value is not None
        return self.outcome.value


class Study:
    """The trials of one step."""

    def __init__(self, path: Path, *, seed: int, prune: bool, epochs: int) -> None:
        """Open the journal `path`, or begin it.

        Args:
            path: the file. Nobody else may have it open: the folder of the search is locked.
            seed: of the draws.
            prune: whether trials that lag behind are ended early.
            epochs: length of a trial.

        Raises:
            ValueError: the journal is damaged or too long.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _repair(path)
        free = max(1, epochs // 10)  # the first tenth says little
        pruner = optuna.pruners.MedianPruner(_STARTUP, free + 1) if prune else optuna.pruners.NopPruner()
        self._seed = seed
        shown = printable(str(path))
        try:
            from optuna.storages.journal import JournalFileBackend

            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
            self._study = optuna.create_study(
                study_name="search", storage=storage, direction="maximize", pruner=pruner, load_if_exists=True
            )
            self._frozen()
        except OSError:
            raise
        except Exception as error:  # optuna believes its file, so that anything may be raised by a wrong one
            raise ValueError(
                f"{shown} is damaged ({type(error).__name__}): start the search anew in another folder"
            ) from error

    def __len__(self) -> int:
        return len(self._frozen())

    def unfinished(self) -> list[optuna.Trial]:
        """The trials that had begun when the search was stopped."""
        from optuna.trial import Trial as Running
        from optuna.trial import TrialState

        running = [trial for trial in self._frozen() if trial.state == TrialState.RUNNING]
        found = []
        for trial in running:
            self._seed_sampler(trial.number)
            found.append(Running(self._study, trial._trial_id))
        return found

    def ask(self) -> optuna.Trial:
        """A new trial. What it draws has to be drawn before the next one is asked for."""
        self._seed_sampler(len(self))
        return self._study.ask()

    def keep_on(self, trial: optuna.Trial, epoch: int, value: float) -> bool:
        """Note the value of an epoch; whether the trial goes on."""
        trial.report(value, epoch)
        return not trial.should_prune()

    def finish(self, trial: optuna.Trial, outcome: TrialOutcome) -> None:
        """Note what came of a trial; the best epoch of one that did not come to its end is found here.

        One that failed counts as one that was ended early: so what is like it is drawn less often.
        """
        from optuna.trial import TrialState

        seen: dict[int, float] = self._frozen()[trial.number].intermediate_values
        if outcome.state != "complete" and seen:
            epoch = max(seen, key=lambda number: seen[number])
            outcome = dataclasses.replace(outcome, value=seen[epoch], epoch=epoch)
        trial.set_user_attr(_OUTCOME, dataclasses.asdict(outcome))
        if outcome.state == "complete":
            self._study.tell(trial, outcome.value)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def trials(self) -> list[Trial]:
        """All trials, in order.

        Raises:
            ValueError: the journal says of a trial what it cannot.
        """
        return [
            Trial(
                trial.number,
                dict(trial.params),
                check(TrialOutcome, trial.user_attrs[_OUTCOME], f"the journal: trial {trial.number}")
                if trial.state.is_finished() and _OUTCOME in trial.user_attrs
                else None,
            )
            for trial in self._frozen()
        ]

    def ranked(self) -> list[Trial]:
        """The trials that came to their end, the best one first; between equal ones the smaller one."""

        def order(trial: Trial) -> tuple[float, int, int]:
            assert trial.outcome is not None
            return (-trial.value, trial.outcome.parameters or 0, trial.number)

        return sorted((trial for trial in self.trials() if trial.is_complete), key=order)

    def _frozen(self) -> list[optuna.trial.FrozenTrial]:
        trials: list[optuna.trial.FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def _seed_sampler(self, number: int) -> None:
        """Draw what trial `number` draws by a seed of its own."""
        import optuna

        from vimtune.runtime.seeds import derive_seed

        seed = derive_seed(self._seed, "trial", number) % 2**32
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def drawn_again(params: Mapping[str, Any]) -> Chooser:
    """A chooser that draws what a trial has drawn."""
    import optuna

    chooser: Chooser = optuna.trial.FixedTrial(dict(params))
    return chooser


def _repair(path: Path) -> None:
    """Remove what a killed search leaves: the lock of its journal, and the beginning of a line.

    Raises:
        ValueError: no regular file, or too long a one.
    """
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.exists():
        return
    shown = printable(str(path))
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{shown} is not a regular file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{shown} has {size:,} bytes; at most {MAX_BYTES:,} are read")
    whole = path.read_bytes().rpartition(b"\n")
    if whole[2]:
        os.truncate(path, len(whole[0]) + len(whole[1]))
