"""A language model, with an adapter or without, on texts to be scored."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimtune.adapters import AdapterFileError, AdapterInfo, load_adapter, read_adapter_info
from vimtune.data import DatasetError, MissingSplitError
from vimtune.data.text import TextSplit, open_text
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.tasks.classes.calibration import without_seen
from vimtune.tasks.components import EvaluateOptions
from vimtune.tasks.details import Details
from vimtune.tasks.job import Evaluation, Scoring, Trial, no_test_split
from vimtune.tasks.origin import trained_note
from vimtune.tasks.text.details import text_details
from vimtune.tasks.text.heads import Head, RatingHead
from vimtune.tasks.text.job import (
    Loaders,
    head_of,
    names_of_outputs,
    open_splits,
    open_test,
    settings_of,
)
from vimtune.tasks.text.models import build_base, open_tokenizer
from vimtune.tasks.text.scoring import TextEvaluation
from vimtune.tasks.text.seen import Identity, trained_texts, unseen_part
from vimtune.tasks.text.settings import TextDataSettings
from vimtune.text import quote

if TYPE_CHECKING:
    from vimtune.tasks.texts import TextTask

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TextTrial(Trial):
    """A language model on texts."""

    split: TextSplit
    """The texts."""
    held_out_note: str
    """Why there is no validation split to fit a temperature to, or what was left out of it."""

    def details(self, evaluation: Evaluation, held_out: Evaluation | None) -> Details:
        """Those of a classifier, or the mistakes."""
        return text_details(self.split, evaluation, held_out, self.held_out_note, self.notes)

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
    recipe: Recipe,
    task: TextTask,
    processes: Processes,
    split: str,
    adapter: Path | None,
    options: EvaluateOptions,
    force: bool,
) -> TextTrial:
    """Open the texts of a split and the model; the arguments are those of `Task.open_trial`.

    Raises:
        ValueError: texts, tokenizer, weights or an adapter that do not fit; the message says which.
    """
    data, backbone = settings_of(recipe)
    info = None if adapter is None else read_adapter_info(adapter)
    if info is None and task.head == "classifier":
        raise ValueError("head = 'classifier' is trained with an adapter: give its file with --adapter")
    # What rates choices names no classes of texts.
    classes = None if info is None or info.num_classes == RatingHead.outputs else info.classes
    texts = _open(task, data, split, classes or None)
    head = head_of(task, texts)
    if adapter is not None and info is not None and info.num_classes and head.outputs is not None:
        _demand_outputs(info, adapter, head, texts)
    trained = trained_texts(adapter, task)
    whole = len(texts.examples)
    notes = trained_note(whole - len(unseen_part(texts, trained).examples), whole, "texts")
    for note in notes if processes.is_main else []:
        logger.warning("%s", note)
    model = build_base(recipe, backbone, head.outputs, task.pooling)
    if adapter is not None:
        load_adapter(model, adapter, force=force)
    tokenizer = open_tokenizer(backbone, model, info, force)
    loaders = Loaders(recipe, task, head, tokenizer, data.max_length, processes)
    own = Scoring(loaders.scoring(texts), loaders.tallies[texts.name]())
    other, why = _open_held_out(task, data, texts, options)
    if other is not None:
        other, why = _unseen(other, trained)
    held_out = None
    if other is not None:
        held_out = own if other is texts else Scoring(loaders.scoring(other), loaders.tallies[other.name]())
    return TextTrial(
        model=model.to(processes.device),
        loader=own.loader,
        tally=own.tally,
        held_out=held_out,
        split=texts,
        notes=notes,
        held_out_note=why,
    )


def _demand_outputs(info: AdapterInfo, adapter: Path, head: Head, texts: TextSplit) -> None:
    """Raise AdapterFileError for an adapter whose head does not answer with the choices of the texts."""
    wanted = names_of_outputs(head, texts)
    if info.num_classes == len(wanted) and info.classes in ([], wanted):
        return
    rates = info.num_classes == RatingHead.outputs
    has = "a head that rates choices" if rates else f"a head for {quote(info.classes or info.num_classes)}"
    needed = f"of {quote(wanted)}" if texts.classes else "that rates choices"
    raise AdapterFileError(
        f"{quote(str(adapter))} has {has}, and {texts.source} needs one {needed}: score it on texts like "
        "those of its run, or give an adapter of these"
    )


def _open_held_out(
    task: TextTask, data: TextDataSettings, texts: TextSplit, options: EvaluateOptions
) -> tuple[TextSplit | None, str]:
    """The texts to which a temperature is fitted; None where there are none, and why."""
    if not options.calibrate or not texts.classes:
        return None, "none was asked for"
    if texts.name == "val":
        return texts, ""
    try:
        # What is wanted beside the scores is not worth a download.
        _, found, _ = open_splits(task, replace(data, test=False, download=False))
    except DatasetError as error:
        return None, f"there is no validation split ({error})"
    if found.classes != texts.classes:
        return None, f"the validation split has other classes ({found.source})"
    return found, ""


def _unseen(held_out: TextSplit, trained: Collection[Identity]) -> tuple[TextSplit | None, str]:
    """The texts to which a temperature is fitted without those that were trained on, and what is said of
    these; None where no others are left."""
    left, whole = unseen_part(held_out, trained), len(held_out.examples)
    note = without_seen(whole - len(left.examples), whole, "texts")
    return left if left.examples else None, note


def _open(task: TextTask, data: TextDataSettings, split: str, classes: Sequence[str] | None) -> TextSplit:
    """The texts; their classes are those of the adapter, or else of the training file where there is one."""
    if split == "val":
        return open_splits(task, data)[1]
    has_own = data.train_file is not None or data.data_dir is not None
    if classes is None and has_own:
        try:
            classes = open_text(task.form, "train", folder=data.data_dir, file=data.train_file).classes
        except MissingSplitError:
            classes = None  # those of the file itself
    try:
        return open_test(task, data, classes)
    except MissingSplitError as error:
        if has_own:
            raise no_test_split(error) from error
        raise
