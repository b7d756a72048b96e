"""The components of the recipes of language tasks: which texts, and which language model. Without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt

from vimtune import parsers
from vimtune.fields import Positive, Seed, option
from vimtune.language import LANGUAGE_MODELS, language_models
from vimtune.tasks.components import (
    LIMIT,
    SHOTS,
    TEST,
    TRAIN_SIZE,
    BackboneOptions,
    DataOptions,
    PredictOptions,
    ProtocolSize,
)
from vimtune.text import suggest

_PATH = parsers.optional(parsers.absolute_path)


def _model(value: Any) -> str:
    """A name that may be a language model's, or the absolute path of a folder or file."""
    name: str = parsers.text(value)
    if name in LANGUAGE_MODELS:
        return name
    if os.path.exists(name):
        return os.path.abspath(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    raise ValueError(
        f"expected one of {', '.join(LANGUAGE_MODELS)}, a repository of the hub (owner/name), or a folder or "
        f"file that exists.{suggest(name, LANGUAGE_MODELS)}"
    )


@dataclass(frozen=True, kw_only=True)
class TextDataSettings(DataOptions):
    """Which texts are used, and how they are read."""

    title: ClassVar[str] = "data of language tasks"

    data_dir: str | None = option(None, "folder of the data set's files", parse=_PATH)
    train_file: str | None = option(None, "train on this .jsonl, .csv or .tsv instead", parse=_PATH)
    val_file: str | None = option(None, "select the best epoch by this .jsonl, .csv or .tsv", parse=_PATH)
    test_file: str | None = option(None, "score on this .jsonl, .csv or .tsv in the end", parse=_PATH)
    val_share: Annotated[float, Gt(0), Lt(1)] = option(
        0.1, "share of the training texts that select the best epoch, unless a file does"
    )
    shots: Positive | None = option(None, SHOTS, purpose="loss")
    train_size: ProtocolSize | None = option(None, TRAIN_SIZE)
    limit: Positive | None = option(None, LIMIT)
    test: bool = option(True, TEST, purpose="run")
    max_length: Annotated[int, Ge(8), Le(2**20)] = option(
        2048, "tokens of a sequence; the beginning of longer ones is cut"
    )
    data_seed: Seed = option(0, "seed by which that share is drawn")
    download: bool = option(True, "take texts from the hub where no folder or file is given")

    @property
    def selection_split(self) -> str:
        """The split evaluated during training: a file of its own, or else a part of the training texts."""
        return "val"


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(BackboneOptions):
    """The language model that is adapted, and the weights from which it starts."""

    title: ClassVar[str] = "backbone of language tasks"
    models_title: ClassVar[str] = "Language models"
    weights_in_folders: ClassVar[bool] = True

    model: str = option(
        "mamba-130m", "language model (see --list), repository of the hub, or folder", parse=_model
    )
    pretrained: bool = option(True, "start from the model's published weights")
    checkpoint: str | None = option(
        None, "start from the weights in this file or folder instead", parse=_PATH
    )
    tokenizer: str | None = option(
        None, "tokenizer: repository, folder or tokenizer.json (default: the model's)"
    )
    model_kwargs: dict[str, Any] = option({}, "fields of the model's configuration that take other values")

    @classmethod
    def known_models(cls) -> Mapping[str, str]:
        """The models of the table; any other repository of the hub or folder serves as well."""
        return language_models()


@dataclass(frozen=True, kw_only=True)
class TextPredictOptions(PredictOptions):
    """How texts are answered for a user."""

    title: ClassVar[str] = "texts"

    max_new_tokens: Positive = option(64, "the most tokens of a completion")
