"""One trial: a training run that is scored on the validation split, and may be ended early."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from vimtune.schema import STRICT, Count

KEPT = ("recipe.yaml", "report.json", "metrics.jsonl", "log.txt")
"""What stays of the folder of a trial that is over. Weights do not: a search has many trials."""

MAX_REASON = 500
"""Characters of the reason why a trial failed that are kept."""

KeepOn = Callable[[int, float], bool]
"""Is told the number of an epoch and its score, and says whether the trial goes on."""


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
    score: float | None = None
    """The best score on the validation split; None where there was none."""
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
    """Train, and give the score on the validation split in the best epoch.

    Of a trial that is ended early or fails no score is given: `keep_on` has been told those of its epochs.
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
    from vimtune.training.state import EpochRecord

    began = time.monotonic()
    recipe = Recipe.from_values(job.values)

    def after_epoch(record: EpochRecord) -> None:
        if record.scores is None or record.loss is None:
            return
        score = score_of(recipe, {"loss": record.loss, **record.scores})
        if score is not None and not keep_on(record.epoch, score):
            raise _Pruned

    def outcome(state: Literal["complete", "pruned", "failed"], **more: Any) -> TrialOutcome:
        return TrialOutcome(state=state, seconds=round(time.monotonic() - began, 3), **more)

    with _logged(job.folder):
        try:
            report = train(recipe, after_epoch=after_epoch)
        except _Pruned:
            return outcome("pruned")
        except OutputError:
            raise
        except (ValueError, RuntimeError, MemoryError) as error:
            # Such a combination may not exist, diverge, or need too much memory; others may not.
            reason = " ".join(str(error).split()) or type(error).__name__
            return outcome("failed", reason=reason[:MAX_REASON])
    best = next(record for record in report.history if record["epoch"] == report.best_epoch)
    score = score_of(recipe, best)
    if score is None:
        return outcome("failed", reason="these data do not have the score by which trials are compared")
    return outcome("complete", score=score, epoch=report.best_epoch, parameters=report.trainable_parameters)


def score_of(recipe: Any, record: Mapping[str, Any]) -> float | None:
    """The number by which trials are compared: the task's first score, or the loss where it has none."""
    scores = recipe.task.scores
    value = record.get(scores[0].name) if scores else record["loss"]
    return None if value is None else float(value)


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
    from vimtune.training.folder import writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def worker_values(values: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """The recipe for worker `index` of `count`: a GPU of its own where there are several, and a share of the
    CPU's cores."""
    import torch

    own = dict(values)
    if own["device"] in ("auto", "cuda") and torch.cuda.device_count() > 1:
        own["device"] = f"cuda:{index % torch.cuda.device_count()}"
    if own["threads"] is None and not torch.cuda.is_available():
        own["threads"] = max(1, (os.cpu_count() or 1) // count)
    return own
