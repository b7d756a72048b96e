"""What the components `data` and `backbone` of a recipe owe, and what the options of `vimtune predict` and
`vimtune evaluate` do, whichever task they belong to. Without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Le

from vimtune.fields import Options, Positive, PositiveAmount, option

SHOTS = "train on so many examples of each class, drawn by data_seed"
"""What `--help` says of the key `shots`."""
TRAIN_SIZE = "draw so many examples, such as 1000: 4/5 to train on, 1/5 to select by"
"""What `--help` says of the key `train_size`."""
LIMIT = "use at most so many examples of each split, drawn by data_seed"
"""What `--help` says of the key `limit`."""
TEST = "score the test split in the end; without, it is not opened"
"""What `--help` says of the key `test`."""

ProtocolSize = Annotated[int, Ge(2), Le(2**31 - 1)]
"""Number of examples of which some are to train on and some to select by."""


class DataOptions(Options, ABC):
    """Which data a task uses. Derived classes are frozen dataclasses."""

    title: ClassVar[str] = "data"
    """What `--help` calls these options."""
    naming: ClassVar[tuple[str, ...]] = ()
    """The options that say which data these are. A run that begins with the adapter of another has its data,
    unless it gives one of these itself."""
    dividing: ClassVar[tuple[str, ...]] = ()
    """The options that say how these data are read and divided, which such a run has as well."""

    @property
    def evaluated_once(self) -> bool:
        """Whether `selection_split` is scored after the last epoch alone, so that nothing is chosen on it."""
        return False

    @property
    @abstractmethod
    def selection_split(self) -> str:
        """The split that is evaluated during training and selects the best epoch."""

    @property
    def dataset_name(self) -> str:
        """Name of the data set, for that of the run folder; empty where the task's name says it."""
        return ""


class BackboneOptions(Options, ABC):
    """The model of a task, and the weights from which it starts. Derived classes are frozen dataclasses."""

    title: ClassVar[str] = "backbone"
    """What `--help` calls these options."""
    models_title: ClassVar[str] = "Models"
    """What `--list` calls the models."""
    weights_in_folders: ClassVar[bool] = False
    """Whether `checkpoint` may be a folder."""

    model: str
    checkpoint: str | None

    @classmethod
    @abstractmethod
    def known_models(cls) -> Mapping[str, str]:
        """Names of the models that `--list` shows, with a line about each."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """How a model is scored by `vimtune evaluate`. Derived classes are frozen dataclasses."""

    title: ClassVar[str] = "evaluation"
    """What `--help` calls these options."""

    calibrate: bool = option(True, "fit a temperature to the validation split, where there is one")

    def check_split(self, split: str) -> None:
        """Look at a split that a user has named.

        Raises:
            ValueError: these options say already what is scored.
        """


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Options):
    """How a user's inputs are answered. Derived classes are frozen dataclasses."""

    title: ClassVar[str] = "predictions"
    """What `--help` calls the options of a derived class."""

    top_k: Positive = option(3, "classes that are named for each input")
    batch_size: Positive = option(32, "inputs at a time")
    temperature: PositiveAmount = option(
        1.0,
        "the outputs of the model are divided by it before they become probabilities; vimtune evaluate says "
        "which one fits",
    )
