"""The result of a run, as report.json has it: what all tasks report, and scores by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vimtune.schema import STRICT, finite_or_none
from vimtune.tasks.base import TASKS
from vimtune.tasks.job import Outcome
from vimtune.text import duration

FORMAT = "vimtune report 1"
"""What a report calls its format."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a run, as in report.json: the part that every task has. Times are seconds, memory MiB.

    A number that could not be measured or is not finite is None.

    `loss` is that of the saved adapter on the split `split`, which is "test" where the data have one. The
    adapter is that of epoch `best_epoch`, chosen by its scores on the split `selection_split`. When
    `selection_split` and `split` are the same, the choice makes the scores optimistic. `head_parameters` of
    the `trainable_parameters` are those of the head, `adapter_bytes` is the size of the adapter's file; both
    are None in reports of earlier versions. `backend` is the scan
    backend that really ran, `cuda_graph` says whether batches were replayed (in the run's last session, if it
    was resumed). `data` says for each split which data were used, and `left_out` how many examples of `split`
    were not scored because they are corrupt; it is None in reports of earlier versions. `recipe` holds the
    settings of the run, and `history` a record of each epoch, as in metrics.jsonl.
    """

    __pydantic_config__ = STRICT

    format: str = FORMAT
    loss: float | None
    split: str
    selection_split: str
    best_epoch: int
    epochs: int
    steps: int
    stopped_early: bool
    trainable_parameters: int
    total_parameters: int
    peak_memory: float | None
    peak_memory_of: str
    seconds: float
    train_seconds: float
    model: str
    method: str
    method_config: dict[str, Any]
    data: dict[str, str]
    backend: str
    cuda_graph: bool
    device: str
    device_name: str
    processes: int
    threads: int
    amp: str
    seed: int
    deterministic: bool
    versions: dict[str, str]
    warnings: list[str]
    run_dir: str
    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    head_parameters: int | None = None
    adapter_bytes: int | None = None
    left_out: int | None = None

    def scores_by_name(self) -> dict[str, float | None]:
        """The scores on `split`, by the names that the task gives them."""
        return {}

    def num_scored(self) -> int | None:
        """How many examples the scores are of; None where the report does not say it."""
        return None

    def further_scores(self) -> Iterator[tuple[str, str]]:
        """What was measured on `split` beside `scores_by_name`: names and values, for tables."""
        return iter(())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in report.json, those of the task first."""
        values = dataclasses.asdict(self)
        shared = [field.name for field in dataclasses.fields(Report)]
        order = [shared[0], *(name for name in values if name not in shared), *shared[1:]]
        plain: dict[str, Any] = finite_or_none({name: values[name] for name in order})
        return plain

    def rows(self) -> Iterator[tuple[str, str]]:
        """The final table: names and values. A task adds to it by the three methods below."""
        yield from self.score_rows()
        early = ", stopped early" if self.stopped_early else ""
        yield "best epoch", f"{self.best_epoch} of {self.epochs}{early} ({self.selected_by()})"
        trained, total = self.trainable_parameters, self.total_parameters
        yield "trainable parameters", f"{trained:,} of {total:,} ({100.0 * trained / total:.2f} %)"
        yield "training speed", self.speed()
        memory = "" if self.peak_memory is None else f"{self.peak_memory:.0f} MiB "
        yield "peak memory", f"{memory}({self.peak_memory_of})"
        yield "time", duration(self.seconds)
        yield "model, method", f"{self.model}, {self.method}"
        graph = ", CUDA graph" if self.cuda_graph else ""
        yield "device, backend", f"{self.device}, {self.backend}{graph}"
        yield "data", self.data[self.split]
        scored = self.num_scored()
        if scored is not None and self.left_out:
            yield "scored", f"{scored:,} of {scored + self.left_out:,}, the others are corrupt"
        yield from self.detail_rows()

    def score_rows(self) -> Iterator[tuple[str, str]]:
        """The first rows of the final table: the scores."""
        yield f"loss ({self.split})", "not finite" if self.loss is None else f"{self.loss:.4f}"

    def selected_by(self) -> str:
        """By what the best epoch was chosen, such as "val top-1 50.00 %"."""
        return f"{self.selection_split} loss"

    def speed(self) -> str:
        """How fast the run trained, such as "512 img/s"."""
        return "not measured"

    def detail_rows(self) -> Iterator[tuple[str, str]]:
        """The last rows of the final table."""
        return iter(())


def percent_rows(values: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
    """Lines of a table for those of the percentages that there are, by their names."""
    return ((name, f"{value:.2f} %") for name, value in values.items() if value is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreReport(Report):
    """Result of a run of a task that has no report of its own.

    `scores` are those of the saved adapter on `split`, over `num_examples` examples; `best_scores` and
    `last_scores` those of the best and of the last evaluated epoch on `selection_split`. `rate` says on how
    many of the task's units the run trained per second, over all processes.
    """

    task: str
    scores: dict[str, float | None]
    num_examples: int
    best_scores: dict[str, float | None]
    last_scores: dict[str, float | None]
    rate: float
    rate_unit: str = ""
    """Of what `rate` speaks, in short; empty in reports of earlier versions."""

    def scores_by_name(self) -> dict[str, float | None]:
        """`scores`."""
        return self.scores

    def num_scored(self) -> int:
        """`num_examples`."""
        return self.num_examples

    @staticmethod
    def values(outcome: Outcome) -> dict[str, Any]:
        """The fields of this class for what a run has reached."""
        return {
            "task": outcome.task.name,
            "scores": dict(outcome.evaluation.scores),
            "num_examples": outcome.evaluation.count,
            "best_scores": dict(outcome.best),
            "last_scores": dict(outcome.last),
            "rate": outcome.rate,
            "rate_unit": outcome.task.short_unit,
        }

    def score_rows(self) -> Iterator[tuple[str, str]]:
        """A row for each score that there is, then the loss."""
        for score in TASKS.get(self.task).scores:
            value = self.scores[score.name]
            if value is not None:  # One that these texts do not have, such as accuracy per character.
                yield f"{score.title} ({self.split})", score.show(value)
        yield from super().score_rows()

    def selected_by(self) -> str:
        """The most important score in the best epoch."""
        for score in TASKS.get(self.task).scores[:1]:
            value = self.best_scores[score.name]
            if value is not None:
                return f"{self.selection_split} {score.title} {score.show(value)}"
        return super().selected_by()

    def speed(self) -> str:
        """Units per second."""
        return f"{self.rate:.0f} {self.rate_unit or TASKS.get(self.task).short_unit}/s"
