"""From a recipe to what a language model is trained with: texts, model with its adapter, loaders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vimtune.data import MissingSplitError
from vimtune.data.text import (
    TextSplit,
    draw_at_most,
    draw_protocol,
    draw_protocol_part,
    draw_shots,
    open_text,
    split_off,
)
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.runtime.seeds import derive_seed
from vimtune.tasks.classes.calibration import selected
from vimtune.tasks.classes.confusion import confusion_files, confusion_title
from vimtune.tasks.details import Details
from vimtune.tasks.job import Evaluation, Forward, Job, Loader, Outcome, Tally, Tensors
from vimtune.tasks.report import Report
from vimtune.tasks.text.batches import TextBatches
from vimtune.tasks.text.details import class_answers, text_details
from vimtune.tasks.text.heads import ClassHead, Head, LikelihoodHead, RatingHead
from vimtune.tasks.text.lengths import MOST_SHAPES
from vimtune.tasks.text.models import build_base, build_model, open_tokenizer, readers_of
from vimtune.tasks.text.settings import LanguageModelSettings, TextDataSettings
from vimtune.tasks.text.tokens import Encoder, Item, Tokenizer
from vimtune.text import counted

if TYPE_CHECKING:
    from vimtune.tasks.texts import TextTask


@dataclass(kw_only=True)
class TextJob(Job):
    """A language model on its texts."""

    train: TextBatches
    head: Head
    tallies: dict[str, Callable[[], Tally]]
    """Makes an empty tally for the evaluation of a split, by its name."""
    scored: TextSplit
    """The texts of `final`."""

    def details(self, outcome: Outcome) -> Details:
        """Those of a classifier, or the mistakes."""
        return text_details(self.scored, outcome.evaluation, *selected(outcome))

    def result_files(self, report: Report, evaluation: Evaluation) -> dict[str, Callable[[Path], None]]:
        """The confusion matrix as a table and as a picture, where all texts have the same classes."""
        if not self.scored.classes:
            return {}
        confusion = class_answers(evaluation).confusion
        title = confusion_title(confusion, report.split, "texts")
        return confusion_files(confusion, self.scored.classes, title)

    def expect_replays(self) -> int:
        """Pad training batches to the lengths of their groups, of which there are few."""
        self.train.pad_to_few_shapes()
        return MOST_SHAPES

    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """What the head learns from, summed over tokens or examples."""
        return self.head.loss(forward, tensors)

    def start_tally(self, loader: Loader) -> Tally:
        """An empty tally of what the model says of each choice."""
        return self.tallies[loader.split]()


def open_texts(recipe: Recipe, task: TextTask, processes: Processes) -> TextJob:
    """Open the texts, create the model, inject the adapter, build the loaders.

    Raises:
        ValueError: texts, tokenizer, weights or adapter settings that do not fit; the message says which.
    """
    data, backbone = settings_of(recipe)
    with processes.main_first():  # may download texts
        train, val, test = open_splits(task, data)
    head = head_of(task, train)
    with processes.main_first():  # may download weights
        model = build_model(recipe, backbone, head.outputs, task.pooling)
        tokenizer = open_tokenizer(backbone, model)
    loaders = Loaders(recipe, task, head, tokenizer, data.max_length, processes)
    training, usual_count = loaders.training(train)
    selection = loaders.scoring(val)
    outputs = {} if head.outputs is None else {"classes": names_of_outputs(head, train)}
    return TextJob(
        model=model,
        train=training,
        selection=selection,
        final=selection if test is None else loaders.scoring(test),
        usual_count=usual_count,
        outputs=outputs,
        readers=readers_of(tokenizer),
        # A model without a head chooses among the same classes whenever it is used.
        saved_with_adapter=dict(outputs or ({"classes": list(train.classes)} if train.classes else {})),
        head=head,
        tallies=loaders.tallies,
        scored=val if test is None else test,
    )


def check_data(recipe: Recipe, task: TextTask, processes: Processes) -> None:
    """Open all texts of a run; see `Task.check_data`."""
    data, _ = settings_of(recipe)
    with processes.main_first():  # may download texts
        open_splits(task, data)


def open_base(recipe: Recipe, task: TextTask, processes: Processes) -> nn.Module:
    """The language model with the head that the training texts ask for; see `Task.open_base`."""
    data, backbone = settings_of(recipe)
    with processes.main_first():  # may download texts and weights
        train, _, _ = open_splits(task, replace(data, test=False))
        return build_base(recipe, backbone, head_of(task, train).outputs, task.pooling)


def settings_of(recipe: Recipe) -> tuple[TextDataSettings, LanguageModelSettings]:
    """The components of a recipe that are those of language tasks."""
    data, backbone = recipe.data, recipe.backbone
    assert isinstance(data, TextDataSettings) and isinstance(backbone, LanguageModelSettings)
    return data, backbone


def open_splits(task: TextTask, data: TextDataSettings) -> tuple[TextSplit, TextSplit, TextSplit | None]:
    """The texts to train on, those that select the best epoch, and those that are scored in the end.

    The second ones are those of a validation file where there is one, else a part of the training file,
    never of the test file. There is no third part where a user's own data have none, or where the recipe
    wants none.

    Raises:
        DatasetError: a file that is missing or wrong, or fewer texts than the recipe wants to draw.
    """
    whole = open_text(task.form, "train", folder=data.data_dir, file=data.train_file, download=data.download)
    train, val = _divide(whole, _open_val(task, data, whole.classes), data)
    if data.shots is not None:
        train = draw_shots(train, data.shots, data.data_seed)
    train, val = (draw_at_most(split, data.limit, data.data_seed) for split in (train, val))
    if not data.test:
        return train, val, None
    try:
        test = open_test(task, data, train.classes)
    except MissingSplitError:
        if task.form.hub is not None or data.test_file is not None:
            raise
        test = None
    return train, val, test


def _open_val(task: TextTask, data: TextDataSettings, classes: Sequence[str]) -> TextSplit | None:
    """The texts of a validation file; None where there is none, as in the folders of official data sets,
    whose validation files are scored in the end.

    Raises:
        DatasetError: a file that is wrong.
    """
    if data.val_file is None and "val" not in task.form.files:
        return None
    try:
        val = open_text(task.form, "val", folder=data.data_dir, file=data.val_file, classes=classes)
    except MissingSplitError:
        return None
    return replace(val, source=f"{val.source} (a file of its own, so val_share has no effect)")


def _divide(whole: TextSplit, own: TextSplit | None, data: TextDataSettings) -> tuple[TextSplit, TextSplit]:
    """What is trained on and what selects, of the training file and of the validation file if there is one.

    Raises:
        DatasetError: there are fewer texts than the recipe wants to draw.
    """
    size, seed = data.train_size, data.data_seed
    if own is None:
        return split_off(whole, data.val_share, seed) if size is None else draw_protocol(whole, size, seed)
    if size is None:
        return whole, own
    return draw_protocol_part(whole, size, seed), draw_protocol_part(own, size, seed)


def open_test(task: TextTask, data: TextDataSettings, classes: Sequence[str] | None) -> TextSplit:
    """The texts that are scored in the end; with classes of their own where `classes` is None.

    Raises:
        DatasetError: a file that is missing or wrong.
    """
    test = open_text(
        task.form,
        "test",
        folder=data.data_dir,
        file=data.test_file,
        download=data.download,
        classes=classes,
    )
    return draw_at_most(test, data.limit, data.data_seed)


def head_of(task: TextTask, train: TextSplit) -> Head:
    """What the recipe asks of the model.

    Raises:
        ValueError: a classification head for texts without choices.
    """
    if task.head == "likelihood":
        return LikelihoodHead()
    if train.classes:
        return ClassHead(len(train.classes))
    if any(len(example.choices) < 2 for example in train.examples):
        raise ValueError(
            f"head = 'classifier' needs texts with a label, and {train.source} has none: use likelihood"
        )
    return RatingHead()


def names_of_outputs(head: Head, train: TextSplit) -> list[str]:
    """What each output of a classification head means."""
    return list(train.classes) if isinstance(head, ClassHead) else ["rating"]


@dataclass
class Loaders:
    """Makes the loaders of a run."""

    recipe: Recipe
    task: TextTask
    head: Head
    tokenizer: Tokenizer
    max_length: int
    processes: Processes
    tallies: dict[str, Callable[[], Tally]] = field(default_factory=dict)
    """Makes an empty tally for the evaluation of a split, by its name; of all splits that are scored."""

    def training(self, split: TextSplit) -> tuple[TextBatches, int]:
        """The loader of the training texts, and what a whole batch of it counts on average."""
        encoder = Encoder(self.tokenizer, self.max_length)
        items = self.head.training_items(encoder, split.examples)
        counted = sum(self.head.count(item) for item in items) / len(items)
        usual = math.ceil(counted * self.recipe.optimisation.batch_size)
        return self._loader(split, items, encoder, shuffle=True), usual

    def scoring(self, split: TextSplit) -> TextBatches:
        """The loader of texts to be scored."""
        encoder = Encoder(self.tokenizer, self.max_length)
        items = self.head.scoring_items(encoder, split.examples)
        characters = self.task.form.per_character
        self.tallies[split.name] = lambda: self.head.tally(split.examples, items, characters)
        return self._loader(split, items, encoder, shuffle=False)

    def _loader(
        self, split: TextSplit, items: Sequence[Item], encoder: Encoder, shuffle: bool
    ) -> TextBatches:
        sequences = counted(encoder.cut, "sequences")
        cut = f"; beginnings of {sequences} cut off, which had more than {self.max_length:,} tokens"
        return TextBatches(
            split.name,
            split.source + (cut if encoder.cut else ""),
            split.fingerprint(),
            len(split.examples),
            items,
            self.head.batch,
            batch_size=self.recipe.optimisation.batch_size,
            shuffle=shuffle,
            seed=derive_seed(self.recipe.run.seed, "data"),
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            pin_memory=self.processes.device.type == "cuda",
        )
