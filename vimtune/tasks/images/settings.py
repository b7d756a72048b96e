"""The components of the recipes of image tasks: which images, and which backbone. Without torch.

Both hand options on, to the data set and to the model. They are compared with what these take, so that a
misspelt, reserved or ill-typed option is reported together with all other problems of a recipe, before
anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from vimtune import parsers
from vimtune.data.datasets import DATASETS, dataset_option_problems
from vimtune.data.loading.cache_places import cache_place
from vimtune.fields import Positive, Seed, Share, option, options_of
from vimtune.methods import METHODS
from vimtune.models.registry import MODELS, check_model_options, list_models
from vimtune.models.weights import DEFAULT_MODEL
from vimtune.tasks.components import (
    LIMIT,
    SHOTS,
    TEST,
    TRAIN_SIZE,
    BackboneOptions,
    DataOptions,
    EvaluateOptions,
    PredictOptions,
    ProtocolSize,
)
from vimtune.text import quote

EVENED = "balanced"
"""The class weights that make up for the numbers of images."""


def parse_class_weights(value: Any) -> str | dict[str, float]:
    """ "none", `EVENED`, or the weight of each class that has another one than 1.

    Raises:
        ValueError: something else.
    """
    if value in ("none", EVENED):
        return str(value)
    try:
        weights = parsers.mapping(value)
        return {name: parsers.number(0, above=True)(weight) for name, weight in weights.items()}
    except ValueError:
        raise ValueError(
            f"expected none, {EVENED}, or weights above 0 such as cat=2,dog=0.5 (of names with commas: "
            "'{\"cat, grey\": 2}')"
        ) from None


RESERVED = {
    "dataset_kwargs": {
        "name": "the key dataset",
        "split": "the keys train_split and eval_split",
        "data_dir": "the key data_dir",
        "seed": "the key data_seed",
        "img_size": "the key img_size",
        "download": "the key download",
    },
    "model_kwargs": {
        "model_name": "the key model",
        "num_classes": "the data set",
        "img_size": "the key img_size",
        "drop_path_rate": "the key drop_path",
        "pretrained": "the key pretrained",
        "peft": "the key peft",
        "peft_targets": "the key targets",
        "peft_layers": "the key layers",
        "peft_kwargs": "the key peft_kwargs",
    },
}
"""Options that the recipe sets from elsewhere, and where."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(DataOptions):
    """Which data are used, and how they are read."""

    naming = ("dataset", "data_dir")
    dividing = ("dataset_kwargs", "data_seed", "folds")

    dataset: str = option("synthetic_flowers", "data set (see --list)", parse=DATASETS.parse)
    data_dir: str | None = option(
        None, "folder of the data set's files", parse=parsers.optional(parsers.absolute_path)
    )
    train_split: Literal["train", "train+val"] = option("train", "images to train on: train, train+val")
    eval_split: Literal["val", "test"] | None = option(
        None, "evaluated while training: val, test (default: val if not trained on)", purpose="run"
    )
    shots: Positive | None = option(None, SHOTS, purpose="loss")
    train_size: ProtocolSize | None = option(None, TRAIN_SIZE)
    folds: Annotated[int, Ge(2), Le(1000)] | None = option(
        None, "k-fold: each data_seed holds out another of so many parts of train and val"
    )
    limit: Positive | None = option(None, LIMIT)
    test: bool = option(True, TEST, purpose="run")
    balanced: bool = option(
        False, "train on every class equally often, whatever number of images it has", purpose="loss"
    )
    dataset_kwargs: dict[str, Any] = option({}, "further options of the data set, such as species=20")
    data_seed: Seed = option(0, "seed of splits that are drawn and of generated images")
    download: bool = option(True, "download a data set that is not there yet")
    num_workers: Annotated[int, Ge(0), Le(1024)] | Literal["auto"] = option(
        "auto",
        "processes that prepare images: a number, auto",
        parse=parsers.automatic(parsers.integer(0, 1024)),
    )
    cache: Literal["auto", "none", "host", "device"] = option(
        "auto",
        "keep decoded images: auto (on a GPU with room), none, host, device",
        parse=cache_place,
        switch=True,
        purpose="run",
    )
    on_corrupt: Literal["error", "skip"] = option("error", "an unreadable image: error (stop), skip (report)")

    @property
    def selection_split(self) -> str:
        """The split evaluated during training: `eval_split`, or its default."""
        return self.eval_split or ("test" if self.train_split == "train+val" else "val")

    @property
    def are_usual(self) -> bool:
        """Whether these are the data of a recipe that names none."""
        known = options_of(type(self))
        return all(getattr(self, name) == known[name].default for name in self.naming)

    @property
    def evaluated_once(self) -> bool:
        """With `train_size` all of it may be trained on: the test split is then scored once."""
        return self.train_size is not None and self.selection_split == "test"

    @property
    def dataset_name(self) -> str:
        """Name of the data set."""
        return self.dataset

    @classmethod
    def handed_on_problems(cls, values: Mapping[str, Any]) -> list[str]:
        """Problems of `dataset_kwargs`."""
        given = values.get("dataset_kwargs")
        if given is None:
            return []
        problems = _reserved_problems("dataset_kwargs", given)
        if "dataset" in values:
            own = {name: value for name, value in given.items() if name not in RESERVED["dataset_kwargs"]}
            problems += dataset_option_problems(values["dataset"], own)
        return problems


@dataclass(frozen=True, kw_only=True)
class BackboneSettings(BackboneOptions):
    """The model that is adapted, and the weights from which it starts."""

    model: str = option(DEFAULT_MODEL, "model (see --list)", parse=MODELS.parse)
    pretrained: bool = option(True, "start from the model's published weights")
    checkpoint: str | None = option(
        None, "start from this .pth/.safetensors file instead", parse=parsers.optional(parsers.absolute_path)
    )
    img_size: int | list[int] | None = option(
        None,
        "image size, N or HxW (default: the model's own)",
        parse=parsers.optional(parsers.image_size),
    )
    drop_path: Share = option(0.0, "stochastic depth rate", purpose="run")
    model_kwargs: dict[str, Any] = option({}, "further options of the model")

    @classmethod
    def known_models(cls) -> Mapping[str, str]:
        """All registered models."""
        return list_models()

    @classmethod
    def handed_on_problems(cls, values: Mapping[str, Any]) -> list[str]:
        """Problems of `model_kwargs`."""
        given = values.get("model_kwargs")
        if given is None:
            return []
        problems = _reserved_problems("model_kwargs", given)
        if "model" in values:
            problems += _model_problems(values["model"], given)
        return problems


@dataclass(frozen=True, kw_only=True)
class ImageEvaluateOptions(EvaluateOptions):
    """How a model is scored on images."""

    title: ClassVar[str] = "evaluation of images"

    folder: str | None = option(
        None,
        "score all images of this folder, <class>/*, instead of a split",
        parse=parsers.optional(parsers.absolute_path),
    )
    flip: bool = option(False, "average the probabilities of each image and its mirror image")

    def check_split(self, split: str) -> None:
        """Look at a split that a user has named.

        Raises:
            ValueError: a folder is scored, which has none.
        """
        if self.folder is not None:
            raise ValueError(f"--split {quote(split)}: all images of the folder are scored; leave it out")


@dataclass(frozen=True, kw_only=True)
class ImagePredictOptions(PredictOptions):
    """How images are classified for a user.

    The exit code of `vimtune predict` is never 0 when the system cannot read an image, for want of a
    permission say, or when no image is left.
    """

    title: ClassVar[str] = "images"

    on_corrupt: Literal["report", "skip", "error"] = option(
        "report",
        "unreadable images: report (the others are classified, exit code 1), skip (exit code 0), error (stop "
        "at the first, write nothing)",
    )


@dataclass(frozen=True, kw_only=True)
class TagPredictOptions(ImagePredictOptions):
    """How it is decided for a user which labels an image has, where it may have several or none."""

    title: ClassVar[str] = "images with any number of labels"

    threshold: Annotated[float, Ge(0), Le(1)] = option(
        0.5, "an image has the labels whose probability is at least this, from 0 to 1"
    )


def _reserved_problems(key: str, options: Mapping[str, Any]) -> list[str]:
    """One line for each of `options`, given as `key`, that another key of the recipe sets."""
    return [f"{key}: {name} is set by {owner}" for name, owner in RESERVED[key].items() if name in options]


def _model_problems(model: str, given: Mapping[str, Any]) -> list[str]:
    """Problems of `model_kwargs` besides names that another key sets."""
    of_methods = {name for _, method in METHODS.items() for name in options_of(method)}
    problems = [
        f"model_kwargs: {name} is an option of a method, not of the model: give it in peft_kwargs"
        for name in given
        if name in of_methods
    ]
    own = {
        name: value
        for name, value in given.items()
        if name not in RESERVED["model_kwargs"] and name not in of_methods
    }
    if not own:
        return problems
    try:
        check_model_options(model, own, "model_kwargs")
    except ValueError as error:
        problems.append(str(error))
    if own.get("in_chans", 3) != 3:
        problems.append(
            f"model_kwargs: in_chans = {quote(own['in_chans'])}: images are read as RGB, which has 3 "
            "channels, grey ones, too. Leave it out"
        )
    return problems
