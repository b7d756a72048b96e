"""What the components `data` and `backbone` of a recipe owe, and what the options of `vimtune predict` do,
whichever task they belong to. Without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vimtune.fields import Options, Positive, option


class DataOptions(Options, ABC):
    """Which data a task uses. Derived classes are frozen dataclasses."""

    title: ClassVar[str] = "data"
    """What `--help` calls these options."""

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
class PredictOptions(Options):
    """How a user's inputs are answered. Derived classes are frozen dataclasses."""

    title: ClassVar[str] = "predictions"
    """What `--help` calls the options of a derived class."""

    top_k: Positive = option(3, "classes that are named for each input")
    batch_size: Positive = option(32, "inputs at a time")
