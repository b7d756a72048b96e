"""Language tasks: choose the continuation of a text, or say of which class it is.

This file holds what can be said without torch; `vimtune.tasks.text` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vimtune.data import text
from vimtune.data.text import Example, TextFormat
from vimtune.fields import option
from vimtune.language import require_transformers
from vimtune.tasks.base import Score, Task, register_task
from vimtune.tasks.components import BackboneOptions, DataOptions, EvaluateOptions, PredictOptions
from vimtune.tasks.predictor import Predictor
from vimtune.tasks.text.settings import LanguageModelSettings, TextDataSettings, TextPredictOptions
from vimtune.text import quote

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vimtune.recipe import Recipe
    from vimtune.runtime.distributed import Processes
    from vimtune.tasks.exporting import Exported
    from vimtune.tasks.merging import Merged, Precision
    from vimtune.tasks.text.job import TextJob
    from vimtune.tasks.text.trial import TextTrial


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """What all language tasks have in common.

    Their loss is a mean over tokens, or over examples where a classification head is trained.
    """

    unit = "tokens"
    short_unit = "tok"
    examples = "texts"
    scores = (
        Score("acc", "accuracy", hub_metric="accuracy"),
        Score("acc_norm", "accuracy per character"),
    )
    data_options: ClassVar[type[DataOptions]] = TextDataSettings
    backbone_options: ClassVar[type[BackboneOptions]] = LanguageModelSettings
    predict_options: ClassVar[type[PredictOptions]] = TextPredictOptions
    packages = ("transformers", "tokenizers")
    hub_task = "text-generation"
    form: ClassVar[TextFormat]
    """The data set."""

    head: Literal["likelihood", "classifier"] = option(
        "likelihood", "what answers: likelihood (of the choices), classifier (on pooled features)"
    )
    pooling: Literal["last", "mean"] = option(
        "last", "features of the classifier: last token, or mean of all"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "classifier":
            object.__setattr__(self, "unit", "examples")
            object.__setattr__(self, "short_unit", "ex")

    def open(self, recipe: Recipe, processes: Processes) -> TextJob:
        """Open the texts and the language model of `recipe`; see `Task.open`."""
        require_transformers()
        from vimtune.tasks.text.job import open_texts

        return open_texts(recipe, self, processes)

    def check_data(self, recipe: Recipe, processes: Processes) -> None:
        """Open all texts; see `Task.check_data`."""
        require_transformers()
        from vimtune.tasks.text.job import check_data

        check_data(recipe, self, processes)

    def open_base(self, recipe: Recipe, processes: Processes) -> nn.Module:
        """The language model with its weights; see `Task.open_base`."""
        require_transformers()
        from vimtune.tasks.text.job import open_base

        return open_base(recipe, self, processes)

    def create_base(self, recipe: Recipe, *, head: bool) -> nn.Module:
        """The language model with its weights, which have no head of classes; see `Task.create_base`."""
        del head
        require_transformers()
        from vimtune.tasks.text.job import settings_of
        from vimtune.tasks.text.models import build_base

        return build_base(recipe, settings_of(recipe)[1], None, self.pooling)

    def open_trial(
        self,
        recipe: Recipe,
        processes: Processes,
        split: str,
        adapter: Path | None,
        options: EvaluateOptions,
        force: bool,
    ) -> TextTrial:
        """Open the texts to score and the language model; see `Task.open_trial`."""
        require_transformers()
        from vimtune.tasks.text.trial import open_trial

        return open_trial(recipe, self, processes, split, adapter, options, force)

    def read_inputs(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str] | list[Example]:
        """The texts or questions among arguments, files and standard input; see `Task.read_inputs`."""
        return self.form.asked(text.read_asked(self.form, inputs), classes)

    def open_predictor(
        self, adapter: Path, base: Mapping[str, Any], device: torch.device, backend: str, force: bool
    ) -> Predictor:
        """Create the language model with an adapter; see `Task.open_predictor`."""
        require_transformers()
        from vimtune.tasks.text.predictor import open_predictor

        return open_predictor(self, adapter, base, device, backend, force)

    def export(self, source: Path, output: Path, base: Mapping[str, Any], force: bool) -> Exported:
        """Refuse, with the reason; see `Task.export`."""
        raise ValueError(
            f"{quote(str(source))} is an adapter of texts, and only models of images are exported: a "
            "language model hands states from token to token, which one graph does not hold. vimtune merge "
            "writes a folder that plain transformers loads"
        )

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
        """Write a folder that transformers loads; see `Task.merge`."""
        require_transformers()
        from vimtune.tasks.text.merging import merge_texts

        return merge_texts(self, adapter, output, base, device, backend, force, precision)

    def merge_to_share(
        self,
        adapter: Path,
        folder: Path,
        base: Mapping[str, Any],
        device: torch.device,
        backend: str,
        force: bool,
    ) -> str:
        """Write a model of transformers; see `Task.merge_to_share`."""
        self.merge(adapter, folder, base, device, backend, force, "fp32")
        return 'import transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained("{place}")'


@register_task("arc_easy")
@dataclass(frozen=True, kw_only=True)
class ArcEasy(TextTask):
    """Answer the easy questions of the AI2 Reasoning Challenge."""

    summary = "ARC-Easy: questions of school tests; scores as lm-evaluation-harness: acc, acc_norm"
    form = text.ARC_EASY


@register_task("arc_challenge")
@dataclass(frozen=True, kw_only=True)
class ArcChallenge(TextTask):
    """Answer the hard questions of the AI2 Reasoning Challenge."""

    summary = "ARC-Challenge: harder questions of school tests; acc, acc_norm"
    form = text.ARC_CHALLENGE


@register_task("hellaswag")
@dataclass(frozen=True, kw_only=True)
class HellaSwag(TextTask):
    """Say how a scene goes on."""

    summary = "HellaSwag: how a described scene goes on; acc, acc_norm"
    form = text.HELLASWAG


@register_task("winogrande")
@dataclass(frozen=True, kw_only=True)
class Winogrande(TextTask):
    """Fill the gap of a sentence with one of two names."""

    summary = "Winogrande: which of two names a sentence means; acc"
    form = text.WINOGRANDE


@register_task("piqa")
@dataclass(frozen=True, kw_only=True)
class Piqa(TextTask):
    """Choose the way that leads to a goal."""

    summary = "PIQA: which of two ways leads to a goal; acc, acc_norm"
    form = text.PIQA


@register_task("boolq")
@dataclass(frozen=True, kw_only=True)
class BoolQ(TextTask):
    """Answer a question about a passage with yes or no."""

    summary = "BoolQ: does a passage say yes or no to a question; acc"
    form = text.BOOLQ


@register_task("text")
@dataclass(frozen=True, kw_only=True)
class OwnTexts(TextTask):
    """Learn a user's own texts: prompts with completions, texts with labels, or texts alone."""

    summary = "your own .jsonl, .csv or .tsv: prompt and completion, text and label, or text alone"
    form = text.OWN

    text_column: str | None = option(
        None, "column of the texts (default: text, sentence or another usual name)"
    )
    label_column: str | None = option(
        None, "column of the labels (default: label, category or another usual name)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "form", text.own_texts(self.text_column, self.label_column))
