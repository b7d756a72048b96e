"""A language model, with an adapter or without, on texts to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimtune.adapters import read_adapter_info
from vimtune.data import MissingSplitError
from vimtune.data.text import TextSplit, open_text
from vimtune.origin import load_trained
from vimtune.recipe import Recipe
from vimtune.tasks.job import Evaluation, Trial
from vimtune.tasks.text.job import Loaders, head_of, open_splits, open_test, settings_of
from vimtune.tasks.text.models import build_base, open_tokenizer
from vimtune.tasks.text.scoring import TextEvaluation
from vimtune.tasks.text.settings import TextDataSettings
from vimtune.training.distributed import Processes

if TYPE_CHECKING:
    from vimtune.tasks.texts import TextTask


@dataclass
class TextTrial(Trial):
    """A language model on texts."""

    split: TextSplit

    def examples(self, evaluation: Evaluation) -> list[dict[str, Any]]:
        """The log-likelihood of each choice, and what was chosen."""
        assert isinstance(evaluation, TextEvaluation)
        return [
            {
                "choices": list(example.choices),
                "answer": judged.answer,
                "predicted": judged.predicted,
                "predicted_per_character": judged.predicted_per_character,
                "log_likelihoods": list(judged.log_likelihoods),
            }
            for example, judged in zip(self.split.examples, evaluation.judged, strict=True)
        ]


def open_trial(
    recipe: Recipe, task: TextTask, processes: Processes, split: str, adapter: Path | None, force: bool
) -> TextTrial:
    """Open the texts of a split and the model; the arguments are those of `Task.open_trial`.

    Raises:
        ValueError: texts, tokenizer, weights or an adapter that do not fit; the message says which.
    """
    data, backbone = settings_of(recipe)
    info = None if adapter is None else read_adapter_info(adapter)
    if info is None and task.head == "classifier":
        raise ValueError("head = 'classifier' is trained with an adapter: give its file with --adapter")
    texts = _open(task, data, split, (info and info.classes) or None)
    head = head_of(task, texts)
    model = build_base(recipe, backbone, head.outputs, task.pooling)
    if adapter is not None:
        load_trained(model, adapter, force)
    tokenizer = open_tokenizer(backbone, model, info, force)
    loaders = Loaders(recipe, task, head, tokenizer, data.max_length, processes)
    loader = loaders.scoring(texts)
    return TextTrial(model.to(processes.device), loader, loaders.tallies[texts.name](), texts)


def _open(task: TextTask, data: TextDataSettings, split: str, classes: Sequence[str] | None) -> TextSplit:
    """The texts; their classes are those of the adapter, or else of the training file where there is one."""
    if split == "val":
        return open_splits(task, data)[1]
    if classes is None and (data.train_file is not None or data.data_dir is not None):
        try:
            classes = open_text(task.form, "train", folder=data.data_dir, file=data.train_file).classes
        except MissingSplitError:
            classes = None  # those of the file itself
    return open_test(task, data, classes)
