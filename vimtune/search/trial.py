"""One trial: a training run that is scored on the validation split, and may be ended early."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from vimtune.machine import usable_cores
from vimtune.schema import STRICT, Count
from vimtune.tasks.base import Score, Task

LOSS = Score("loss", "loss", percent=False, higher_is_better=False)
"""What trials are compared by where the data have no score."""
KEPT = ("recipe.yaml", "report.json", "metrics.jsonl", "log.txt")
"""What stays of the folder of a trial that is over. Weights do not: a search has many trials."""

MAX_REASON = 500
"""Characters of the reason why a trial failed that are kept."""

KeepOn = Callable[[int, float], bool]
"""Is told the number of an epoch and its value, and says whether the trial goes on."""


@dataclass(frozen=True)
class Job:
    """A trial that is to be run."""

    number: int
    values: dict[str, Any]
    """Its recipe."""

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return Path(self.values["output_dir"])


@dataclass(frozen=True)
class TrialOutcome:
    """What came of a trial. It is kept in the journal, as JSON."""

    __pydantic_config__ = STRICT

    state: Literal["complete", "pruned", "failed"]
    value: float | None = None
    """The best score on the validation split, of which the larger is the better one (a loss is negative);
    None where there was none."""
    metric: str = ""
    """Name of the score, or "loss"; empty for a trial that did not end by itself."""
    epoch: Count = 0
    """The epoch that has it; 0 where there was none."""
    parameters: Count | None = None
    """How many numbers are trained; None for a trial that did not end by itself."""
    seconds: Annotated[float, Ge(0)] = 0.0
    reason: str = ""
    """Why it failed."""


class _Pruned(Exception):
    """Ends a training run that is not worth going on."""


def run_trial(job: Job, keep_on: KeepOn) -> TrialOutcome:
    """Train, and give the value on the validation split in the best epoch.

    Of a trial that is ended early or fails no value is given: `keep_on` has been told those of its epochs.
    What a run prints goes to log.txt in its folder. A trial that was stopped before goes on from its state.

    Args:
        job: which trial.
        keep_on: asked after every epoch that was scored.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state of the run was saved.
        OutputError: the disk is full, or the folder cannot be written.
    """
    from vimtune.recipe import Recipe
    from vimtune.training import OutputError, train
    from vimtune.training.callbacks import Callback, Session
    from vimtune.training.state import EpochRecord

    began = time.monotonic()
    recipe = Recipe.from_values(job.values)

    class Pruning(Callback):
        """Ends a trial that is not worth going on, without a score on the test split."""

        def on_epoch(self, session: Session, epoch: EpochRecord) -> None:
            if epoch.scores is None or epoch.loss is None:
                return
            value, _ = value_of(recipe.task, {"loss": epoch.loss, **epoch.scores})
            if not keep_on(epoch.epoch, value):
                raise _Pruned

    def outcome(state: Literal["complete", "pruned", "failed"], **more: Any) -> TrialOutcome:
        return TrialOutcome(state=state, seconds=round(time.monotonic() - began, 3), **more)

    with _logged(job.folder):
        try:
            report = train(recipe, callbacks=[Pruning()])
        except _Pruned:
            return outcome("pruned")
        except OutputError:
            raise
        except (ValueError, RuntimeError, MemoryError) as error:
            # Such a combination may not exist, diverge, or need too much memory; others may not.
            reason = " ".join(str(error).split()) or type(error).__name__
            return outcome("failed", reason=reason[:MAX_REASON])
    best = next(record for record in report.history if record["epoch"] == report.best_epoch)
    value, metric = value_of(recipe.task, best)
    return outcome(
        "complete",
        value=value,
        metric=metric,
        epoch=report.best_epoch,
        parameters=report.trainable_parameters,
    )


def value_of(task: Task, record: Mapping[str, Any]) -> tuple[float, str]:
    """The number by which trials are compared, the larger the better, and the name of what it is.

    It is the task's first score, or the loss, as a negative number, where these data do not have that score.

    Args:
        task: of the trial.
        record: loss and scores of an epoch by name.
    """
    for score in task.scores[:1]:
        found = record[score.name]
        if found is not None:
            return (float(found) if score.higher_is_better else -float(found)), score.name
    return -float(record["loss"]), LOSS.name


def keep_records(folder: Path) -> None:
    """Remove from the folder of a trial what only a run that goes on needs."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in KEPT:
            entry.unlink()


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Write what is printed within the block to log.txt in the folder."""
    from vimtune.run_folder import writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def worker_values(values: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The recipe for worker `index`: a GPU of its own where there are several, and a thread for each core
    that it may use."""
    import torch

    own = dict(values)
    if own["device"] in ("auto", "cuda") and torch.cuda.device_count() > 1:
        own["device"] = f"cuda:{index % torch.cuda.device_count()}"
    if own["threads"] is None and not torch.cuda.is_available():
        own["threads"] = usable_cores()
    return own
