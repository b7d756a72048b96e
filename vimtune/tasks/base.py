"""What a task is, and the registry that finds tasks by name.

A task is what a model is trained for. It is a frozen dataclass whose fields are its options, it says by which
scores runs are compared, and it opens the data and the model of a run as a `Job`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from vimtune.fields import Options, options_of
from vimtune.registry import Registry, require_complete
from vimtune.tasks.components import BackboneOptions, DataOptions, EvaluateOptions, PredictOptions
from vimtune.tasks.images.settings import BackboneSettings, DataSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vimtune.recipe import Recipe
    from vimtune.runtime.distributed import Processes
    from vimtune.tasks.exporting import Exported
    from vimtune.tasks.job import Job, Trial
    from vimtune.tasks.merging import Merged, Precision
    from vimtune.tasks.predictor import Predictor
    from vimtune.tasks.report import Report


@dataclass(frozen=True)
class Score:
    """A number that an evaluation gives besides the loss, and how it is shown."""

    name: str
    """Key in records and reports, such as "top1"."""
    title: str
    """Name in tables and pictures, such as "top-1"."""
    percent: bool = True
    """Whether the value goes from 0 to 100 and is shown with "%"."""
    higher_is_better: bool = True
    hub_metric: str | None = None
    """What the Hugging Face hub calls it, such as "accuracy"; None for `name`."""
    short: str = ""
    """Name in the lines of a run, where there is little room; the key unless it is given."""

    @property
    def name_in_lines(self) -> str:
        """`short`, or the key."""
        return self.short or self.name

    def show(self, value: float, digits: int = 2) -> str:
        """The value as text."""
        return f"{value:.{digits}f}{' %' if self.percent else ''}"


@dataclass(frozen=True, kw_only=True)
class Task(Options, ABC):
    """What a model is trained for.

    Derived classes are frozen dataclasses and registered with `register_task`. Their fields, stated with
    `vimtune.fields.option`, are keys of the recipes of this task.
    """

    name: ClassVar[str] = ""
    """Name in the registry."""
    summary: ClassVar[str] = ""
    """One line for tables."""
    unit: ClassVar[str] = "examples"
    """What is counted, in the plural, such as "images" or "tokens": losses are means over it, and the speed
    of a run is so many of it per second."""
    short_unit: ClassVar[str] = "ex"
    """The unit in the progress bar, where there is little room."""
    examples: ClassVar[str] = "examples"
    """What the data consist of, in the plural, such as "images" or "texts"."""
    scores: ClassVar[tuple[Score, ...]] = ()
    """The scores of an evaluation besides the loss, the most important one first."""
    data_options: ClassVar[type[DataOptions]] = DataSettings
    """The component of its recipes that says which data are used."""
    backbone_options: ClassVar[type[BackboneOptions]] = BackboneSettings
    """The component of its recipes that says which model is adapted."""
    predict_options: ClassVar[type[PredictOptions]] = PredictOptions
    """The options of `vimtune predict` for its adapters."""
    evaluate_options: ClassVar[type[EvaluateOptions]] = EvaluateOptions
    """The options of `vimtune evaluate`."""

    decided_by_file: ClassVar[tuple[str, ...]] = ()
    """Keys of the recipe that an adapter file or a merged file of this task decides by itself, wherever it is
    used; another value of them is refused there."""
    hub_task: ClassVar[str | None] = None
    """What the Hugging Face hub calls such a task, "image-classification"; None if it has no name for it."""
    packages: ClassVar[tuple[str, ...]] = ("timm", "torchvision")
    """Distributions besides torch whose versions a report names, because results depend on them; like the
    components above those of images, unless a task has others."""

    @abstractmethod
    def open(self, recipe: Recipe, processes: Processes) -> Job:
        """Open the data, build the model with its adapter, and make the loaders.

        Raises:
            ValueError: data, weights or settings that do not fit together; the message says which.
        """

    def check_data(self, recipe: Recipe, processes: Processes) -> None:
        """Open all data that a run of the recipe reads, without a model, before anything is trained: missing
        files are fetched now, or refused now. By default nothing is done, and the run finds out itself.

        Raises:
            ValueError: data that cannot be opened; the message says why.
        """

    def open_base(self, recipe: Recipe, processes: Processes) -> nn.Module | None:
        """The model of a recipe without its adapter, with as many outputs as its data ask for, for what is to
        be known of it before any run.

        Returns:
            The model on the CPU; None for a task that has no model apart from its adapter, or does not say.

        Raises:
            ValueError: data or weights that cannot be opened.
        """
        return None

    def create_base(self, recipe: Recipe, *, head: bool) -> nn.Module:
        """The model of a recipe without its adapter, on the CPU, whatever its data are.

        Args:
            recipe: which model, and its weights.
            head: whether the head of these weights is wanted; False for an adapter that brings its own.

        Raises:
            ValueError: weights that are not to be had or do not fit, or a task that has no such model.
        """
        raise ValueError(f"task {self.name!r} has no model apart from its data")

    def open_trial(
        self,
        recipe: Recipe,
        processes: Processes,
        split: str,
        adapter: Path | None,
        options: EvaluateOptions,
        force: bool,
    ) -> Trial:
        """Open a split and a model to score it, for `vimtune evaluate`.

        Args:
            recipe: which data and which model.
            processes: those of the command.
            split: "val" or "test".
            adapter: an adapter file for the model, or a merged file, which holds one; None for that of the
                recipe itself.
            options: how it is scored, an instance of `evaluate_options`.
            force: use the adapter although base weights or tokenizer are others.

        Raises:
            ValueError: what `open` raises, an adapter that does not fit, or a task that has no such thing.
        """
        raise ValueError(f"task {self.name!r} has no evaluation apart from training")

    def read_inputs(self, inputs: Sequence[str], classes: Sequence[str]) -> Sequence[Any]:
        """What a user asks about, read before any model is created.

        Args:
            inputs: the arguments of `vimtune predict`, such as paths.
            classes: names of the classes of the adapter; empty where it has none.

        Returns:
            What `Predictor.answers` takes.

        Raises:
            ValueError: an input that is missing or wrong, or a task that answers no questions.
        """
        raise ValueError(f"task {self.name!r} has no answers to single inputs")

    def open_predictor(
        self, adapter: Path, base: Mapping[str, Any], device: torch.device, backend: str, force: bool
    ) -> Predictor:
        """Create the model that answers with an adapter of this task.

        Args:
            adapter: the file.
            base: keys of the recipe that say where the base weights are now ("checkpoint", "model",
                "tokenizer"); what is not among them is as the adapter file says.
            device: where it computes.
            backend: scan backend, see `vimtune.ops`.
            force: use the adapter although base weights or tokenizer are others.

        Raises:
            ValueError: weights or an adapter that do not fit, or a task that answers no questions.
        """
        raise ValueError(f"task {self.name!r} has no answers to single inputs")

    def merge(
        self,
        adapter: Path,
        output: Path,
        base: Mapping[str, Any],
        device: torch.device,
        backend: str,
        force: bool,
        precision: Precision,
    ) -> Merged:
        """Fold an adapter of this task into its base weights, write them, and prove that nothing changed.

        Args:
            adapter: the file.
            output: the file or folder to be written.
            base: as for `open_predictor`.
            device: where it computes.
            backend: scan backend, see `vimtune.ops`.
            force: use the adapter although base weights or tokenizer are others.
            precision: type of the weights that are written.

        Raises:
            ValueError: weights or an adapter that do not fit, a place that cannot be written, or a task that
                has no such thing.
            MergeError: what was written computes something else; nothing is left behind.
        """
        raise ValueError(f"task {self.name!r} has no merged weights: use vimtune.merge from Python")

    def export(self, source: Path, output: Path, base: Mapping[str, Any], force: bool) -> Exported:
        """Write a model of this task for programs that do without this package, and check the file.

        Args:
            source: an adapter file, a merged file, or a plain checkpoint whose model `base` names.
            output: the file, whose name says in which format it is (`vimtune.export.formats`).
            base: as for `open_predictor`.
            force: use the adapter although base weights are others.

        Raises:
            ValueError: weights or an adapter that do not fit, a place that cannot be written, a package that
                is missing, or a task that has no such thing.
            ExportError: the file computes something else; nothing is left behind.
        """
        raise ValueError(f"task {self.name!r} has no exported form: vimtune merge writes plain weights")

    def merge_to_share(
        self,
        adapter: Path,
        folder: Path,
        base: Mapping[str, Any],
        device: torch.device,
        backend: str,
        force: bool,
    ) -> str:
        """`merge` into an empty folder that is passed on, in the form in which others load it from the hub.

        Returns:
            Python that loads it, in which "{place}" stands for the repository.

        Raises:
            ValueError: as `merge`.
        """
        raise ValueError(f"task {self.name!r} has no merged weights: use vimtune.merge from Python")

    def rank(self, loss: float, scores: Mapping[str, float | None]) -> tuple[float, ...]:
        """What selects the best epoch: of two evaluations the one with the larger tuple is the better one.

        By default the first of `scores` decides, and between equal ones the lower loss; without any score the
        loss alone.
        """
        ranks = [-loss]
        for score in self.scores[:1]:
            value = scores[score.name]
            if value is not None:
                ranks.insert(0, value if score.higher_is_better else -value)
        return tuple(ranks)

    def report_type(self) -> type[Report]:
        """The class of the reports that this task's jobs build."""
        from vimtune.tasks.report import ScoreReport

        return ScoreReport


AnyTask = TypeVar("AnyTask", bound=type[Task])
"""Any class of tasks."""

TASKS: Registry[type[Task]] = Registry("task")
"""All tasks by name."""


def register_task(name: str) -> Callable[[AnyTask], AnyTask]:
    """Class decorator that makes a task known under `name`.

    Raises:
        ValueError: the name is taken by another task, or the class has no summary of its own, lacks a method,
            or has a field without help.
    """

    def register(cls: AnyTask) -> AnyTask:
        require_complete(cls, f"task {name!r}")
        options_of(cls)
        TASKS.add(name, cls)
        cls.name = name
        return cls

    return register
