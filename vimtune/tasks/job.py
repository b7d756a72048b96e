"""What a task gives the trainer once its data are open: batches, a model, a loss, scores and a report.

The trainer knows nothing else about a task. It sums losses and divides them by what was counted, it adds up
the totals of an evaluation over batches and processes, and it saves and shows scores by their names.

Nothing here imports torch when it is imported, because `--help` and `--list` read the tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vimtune.data.errors import MissingSplitError
from vimtune.tasks.details import Details

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vimtune.tasks.base import Task
    from vimtune.tasks.report import Report

READERS = "readers"
"""Under this key an adapter file keeps the `readers` of the job that trained it, in its `extra`."""

Tensors = dict[str, "Tensor"]
"""The tensors of a batch by name, such as "images" (B, 3, H, W) and "labels" (B,)."""

Forward = Callable[..., Any]
"""Calls the model of a job, in the precision of the run, with the arguments of its `forward`."""


class InputError(ValueError):
    """Data cannot be read; the state of a run is fine and was saved."""

    def __init__(self, message: str, in_run: str | None = None) -> None:
        """An error.

        Args:
            message: what happened, and what can be done about it.
            in_run: the same for a run that is trained, where something else can be done; None where not.
        """
        super().__init__(message)
        self.in_run = message if in_run is None else in_run


@dataclass(frozen=True)
class Batch:
    """One batch of a loader: this process's share of it."""

    tensors: Tensors
    count: int
    """How much the share holds of what the task counts (its `unit`). It is 0 where nothing is left of it."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from page-locked memory run beside the computation."""
        beside = device.type == "cuda"  # Only there what follows waits for the copy.
        moved = {name: tensor.to(device, non_blocking=beside) for name, tensor in self.tensors.items()}
        return Batch(moved, self.count)


class Loader(ABC):
    """The batches of one split, in an order that depends only on the seed and the epoch.

    Every process iterates over its own shares of the same number of batches.

    Attributes:
        split: name of the split, such as "val".
        source: one line saying which data are really used.
        num_examples: how many examples the split holds.
        num_workers: how many processes prepare its batches.
        reading: how its examples are read, in a few words, where that was chosen and not asked for.
    """

    split: str
    source: str
    num_examples: int
    num_workers: int = 0
    reading: str = ""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the examples of the split do."""

    @abstractmethod
    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next iteration yields: the batches of `epoch` from number `start_batch` on."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches in a whole epoch."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            InputError: the data cannot be read. The run saves its state and ends.
        """

    @property
    def originals(self) -> Loader:
        """The batches of the same examples as the whole model takes them, in the same order: these, unless
        they hold what a part of the model has made of the examples already."""
        return self

    def read_ahead(self) -> None:  # noqa: B027 - most loaders have nobody who could
        """Learn that the next iteration begins at the current position, though not yet.

        A loader with processes that prepare batches sets them to work, so that the first batches are there
        when they are asked for. What the iteration yields does not depend on it.
        """

    def left_out(self) -> Collection[str]:
        """Names of the examples that this process has met and left out because they are corrupt."""
        return ()

    def close(self) -> None:  # noqa: B027 - most loaders hold nothing
        """Give back what the loader holds, such as processes that prepare batches."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of a split has found. A task may derive a class with more details for its report."""

    loss: float
    """Loss per counted unit."""
    scores: Mapping[str, float | None]
    """A value for each of the task's `scores`, by name; None for a score that these data do not have."""
    count: int
    """How many examples were scored."""


class Tally(ABC):
    """Counts the answers of a model during an evaluation.

    Attributes:
        totals: what has been counted so far, as tensors in host memory that are changed in place. Sums over
            the batches and over the processes must mean something, so these are counts and sums, not means.
    """

    totals: Tensors

    @abstractmethod
    def judge(self, forward: Forward, tensors: Tensors) -> Tensors:
        """What the model says of one batch, as tensors where the batch lies; nothing is counted yet.

        `forward` notes outputs that are not finite. On a GPU this may be recorded once and replayed, also for
        another empty tally of the same job, so it must not read values back from the device. It calls
        `forward` equally often for every batch, because processes that share the model meet in each call.
        """

    @abstractmethod
    def count(self, judged: Tensors) -> None:
        """Count one batch: what `judge` returned for it, now in host memory."""

    def add(self, forward: Forward, tensors: Tensors) -> None:
        """Judge one batch and count it."""
        self.count({name: tensor.cpu() for name, tensor in self.judge(forward, tensors).items()})

    @abstractmethod
    def evaluation(self) -> Evaluation:
        """The scores. When this is called, `totals` are those of all processes together."""


@dataclass
class Job(ABC):
    """A task on the data and the model of a run.

    `train`, `selection` and `final` are the batches to train on, those whose scores select the best epoch,
    and those whose scores are the result of the run. `final` is `selection` where the data have no test
    split.
    """

    model: nn.Module
    """The model with its adapter, whole and on any device: the trainer moves it to where it is trained."""
    train: Loader
    selection: Loader
    final: Loader
    usual_count: int
    """What a whole batch counts, over all processes, at least roughly. Gradients are first divided by this
    and at the end scaled to what there really was, so that they have their usual size all the time."""
    outputs: dict[str, list[str]] = field(default_factory=dict)
    """What the outputs of the model mean, such as {"classes": [...]}. A state of a run with others cannot be
    continued."""
    readers: dict[str, str] = field(default_factory=dict)
    """Hashes of files besides the base weights on which the training depends: what makes inputs of the
    examples, such as {"tokenizer": hash}, or answers them, such as a teacher. A state of a run with others is
    not continued. The adapter file has them, too (`READERS`)."""
    saved_with_adapter: dict[str, Any] = field(default_factory=dict)
    """Arguments of `vimtune.save_adapter` that let the file be used without the recipe of the run."""

    def expect_replays(self) -> int:
        """Learn before training that its batches will be replayed, from one recording for each shape.

        A job whose batches come in many shapes brings those of `train` to few of them here, by padding that
        changes no loss and no count. The default changes nothing, and one shape is recorded.

        Returns:
            How many shapes are worth a recording.
        """
        return 1

    def expect_replayed_evaluations(self) -> int:
        """Learn that batches of evaluations will be replayed, as `expect_replays` does of training.

        Returns:
            How many shapes are worth a recording: 0, by default, lets them run as they come.
        """
        return 0

    def prepare(self, tensors: Tensors, seed: int) -> Tensors:
        """Change a batch before it is trained on, as mixup does, by `seed` alone.

        The default leaves it as it is. A batch may be prepared more than once, so the given tensors must not
        be written to.
        """
        del seed
        return tensors

    @abstractmethod
    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """Loss of a prepared batch in fp32, a scalar, summed over what the task counts (`Batch.count`).

        On a GPU this may be recorded once and replayed, so it must not read values back from the device. It
        calls `forward` equally often for every batch, as a tally does.
        """

    @abstractmethod
    def start_tally(self, loader: Loader) -> Tally:
        """An empty tally for an evaluation of `loader`."""

    def build_report(self, shared: Mapping[str, Any], outcome: Outcome) -> Report:
        """The report of a finished run.

        Args:
            shared: values of the fields that the reports of all tasks have.
            outcome: what the run has reached.
        """
        from vimtune.tasks.report import ScoreReport

        return ScoreReport(**shared, **ScoreReport.values(outcome))

    def details(self, outcome: Outcome) -> Details:
        """What the report's page says beyond the scores; nothing by default."""
        del outcome
        return Details()

    def result_files(self, report: Report, evaluation: Evaluation) -> dict[str, Callable[[Path], None]]:
        """Further files of the result: their names in the run folder, and functions that write them."""
        del report, evaluation
        return {}

    @property
    def forwarded(self) -> nn.Module:
        """What batches go through to become outputs: the model itself, unless a job hands some of them to a
        part of it."""
        return self.model

    @property
    def loaders(self) -> list[Loader]:
        """The different ones among `train`, `selection` and `final`."""
        return list(dict.fromkeys([self.train, self.selection, self.final]))

    def close(self) -> None:
        """Give back what the loaders hold."""
        for loader in self.loaders:
            loader.close()


class Scoring(NamedTuple):
    """A split that is to be scored."""

    loader: Loader
    tally: Tally
    """An empty one."""


def no_test_split(error: MissingSplitError) -> MissingSplitError:
    """The refusal to score a test split that is not there, with what can be scored in its place."""
    return MissingSplitError(f"{str(error).rstrip('.')}. To score the validation split instead: --split val")


@dataclass
class Trial:
    """A task's model on a split whose scores are asked for, without any training."""

    model: nn.Module
    """The model, with an adapter or without, on the device of this process."""
    loader: Loader
    tally: Tally
    """An empty one."""
    held_out: Scoring | None = None
    """The validation split, where something is to be fitted to it, such as a temperature. Where it is scored
    itself, as a whole, it has the very loader and tally of this trial."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the scores has to know, in whole sentences."""
    untrained: str = ""
    """Why the answers of the model are nothing but chance, and what to do, where that was not asked for."""

    def close(self) -> None:
        """Give back what the loaders hold."""
        self.loader.close()
        if self.held_out is not None:
            self.held_out.loader.close()

    def details(self, evaluation: Evaluation, held_out: Evaluation | None) -> Details:
        """What there is to say beyond the scores.

        Args:
            evaluation: of the split.
            held_out: of the validation split, where the trial has one.
        """
        del evaluation, held_out
        return Details()

    def examples(self, evaluation: Evaluation) -> list[dict[str, Any]]:
        """What was found for every single example, as plain values; nothing by default."""
        del evaluation
        return []


@dataclass(frozen=True)
class Outcome:
    """What a run has reached: the values from which a task makes its report."""

    task: Task
    """What was trained for."""
    evaluation: Evaluation
    """Scores of the saved adapter on the split `final`."""
    best: Mapping[str, float | None]
    """Scores on the split `selection` in the best epoch."""
    last: Mapping[str, float | None]
    """Scores on the split `selection` in the last epoch that was evaluated."""
    rate: float
    """What was trained on per second, in the task's unit, over all processes."""
    selection: Evaluation | None = None
    """Scores of the saved adapter on the split `selection`; None where the run was continued after its best
    epoch, and knows only the scores themselves."""
