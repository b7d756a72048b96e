"""The model of a language task: a language model or a classifier on one, with the adapter of the recipe.

Shape letters: B rows, L tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vimtune import adapters
from vimtune.adapters import AdapterInfo, share_sources
from vimtune.language import (
    check_tokenizer,
    create_language_model,
    load_tokenizer,
    pooled_classifier,
    sequence_losses,
    tokenizer_digest,
)
from vimtune.recipe import Recipe
from vimtune.runtime.seeds import derive_seed
from vimtune.tasks.job import READERS
from vimtune.tasks.text.settings import LanguageModelSettings
from vimtune.text import quote

Pooling = Literal["last", "mean"]
"""Which features a classification head sees: those of the last token, or the mean of all."""


class SequenceScorer(nn.Module):
    """A language model that gives the loss of each sequence: all of a training step in one forward pass.

    Its parameters have the names that they have in the language model, so an adapter of the one fits the
    other.
    """

    def __init__(self, model: Any) -> None:
        """The scorer of a language model of transformers, with which it shares all parameters."""
        super().__init__()
        self.backbone, self.lm_head = model.backbone, model.lm_head
        share_sources(self, model)

    def forward(self, input_ids: Tensor, labels: Tensor, places: Tensor | None = None) -> Tensor:
        """Minus the log-likelihood of the labelled tokens of each row, (B,) in fp32.

        Args:
            input_ids: (B, L), padded on the right.
            labels: (B, L), the tokens that are predicted at their own places; -100 where none is.
            places: (T,), where they are; see `vimtune.language.sequence_losses`.
        """
        losses: Tensor = sequence_losses(self, input_ids, labels, places)
        return losses


def build_model(
    recipe: Recipe, settings: LanguageModelSettings, outputs: int | None, pooling: Pooling
) -> nn.Module:
    """The language model with its weights, its head where it has one, and the adapter of the recipe.

    Args:
        recipe: the settings of the run.
        settings: those of the language model.
        outputs: outputs of the classification head; None for a model that predicts tokens.
        pooling: which features the head sees.

    Raises:
        ValueError: no such model, weights that do not fit, or an adapter that does not fit.
    """
    method = recipe.method
    model = build_base(recipe, settings, outputs, pooling)
    torch.manual_seed(derive_seed(recipe.run.seed, "adapter"))
    adapters.inject(model, method.peft, targets=method.targets, layers=method.layers, **method.method_kwargs)
    return model


def open_tokenizer(
    settings: LanguageModelSettings, model: nn.Module, info: AdapterInfo | None = None, force: bool = False
) -> Any:
    """The tokenizer with which a model reads texts.

    It comes after the model, so that a model that is not there is not taken for a tokenizer that is not.

    Args:
        settings: those of the language model.
        model: a model of this module, or a language model of transformers.
        info: what the file of the adapter says that is to be used with it, if any.
        force: take it although that adapter was trained with another one.

    Raises:
        ValueError: there is none, or it belongs to another model or another adapter.
    """
    name = settings.tokenizer or settings.model
    tokenizer = load_tokenizer(name)
    check_tokenizer(tokenizer, model)
    known = {} if info is None else info.extra.get(READERS, {})  # files of earlier versions do not tell
    if known and known != readers_of(tokenizer) and not force:
        raise ValueError(
            f"the adapter was trained with another tokenizer than {quote(name)} is now, so its tokens mean "
            "something else here: give the tokenizer of its run with --tokenizer, or --force"
        )
    return tokenizer


def readers_of(tokenizer: Any) -> dict[str, str]:
    """The `readers` of a job whose texts a tokenizer reads."""
    return {"tokenizer": tokenizer_digest(tokenizer)}


def build_base(
    recipe: Recipe, settings: LanguageModelSettings, outputs: int | None, pooling: Pooling
) -> nn.Module:
    """The same without an adapter."""
    model = language_model(recipe, settings)
    return SequenceScorer(model) if outputs is None else pooled_classifier(model, outputs, pooling)


def language_model(recipe: Recipe, settings: LanguageModelSettings) -> Any:
    """The language model of transformers with the weights from which a run starts.

    Weights are fp32, whatever the dtype of their file: an update may be too small for a bf16 weight. Mixed
    precision (amp) computes with them in bf16 or fp16.
    """
    # Seeded apart, so that the adapter starts alike whatever the model drew.
    torch.manual_seed(derive_seed(recipe.run.seed, "model"))
    own = settings.pretrained and settings.checkpoint is None
    model = create_language_model(
        settings.model, pretrained=own, dtype=torch.float32, **settings.model_kwargs
    )
    if settings.checkpoint is not None:
        from vimtune.language.creation import load_weights

        load_weights(model, Path(settings.checkpoint))
    if recipe.optimisation.grad_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable()
        else:  # its name in older versions of transformers, of which newer ones warn
            model.gradient_checkpointing_enable()
    return model
