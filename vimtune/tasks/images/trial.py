"""An image classifier, with an adapter or without, on images to be scored. B batch, C classes."""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimtune.data import (
    DatasetError,
    ImageDataset,
    MissingSplitError,
    Transform,
    build_transform,
    model_preprocessing,
)
from vimtune.data.matching import Matched, match_classes
from vimtune.data.own.labelled_folder import LabelledFolder
from vimtune.data.subset import draw_at_most
from vimtune.models import MODELS
from vimtune.models.fetching import file_of
from vimtune.models.merged import MergedFileError, is_merged_file, read_merged_info
from vimtune.models.weights import weights_of
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.tasks.classes.calibration import HELD_OUT, without_seen
from vimtune.tasks.details import Details
from vimtune.tasks.images.job import create_backbone, demand_labels, image_size, open_batches, open_dataset
from vimtune.tasks.images.predictor import open_trained, transform_for
from vimtune.tasks.images.seen import trained_images, without_images
from vimtune.tasks.images.settings import BackboneSettings, DataSettings, ImageEvaluateOptions
from vimtune.tasks.images.task import ImageTask
from vimtune.tasks.job import Evaluation, Scoring, Trial, no_test_split
from vimtune.tasks.origin import trained_note
from vimtune.text import printable, quote

logger = logging.getLogger(__name__)


class WithFlips(nn.Module):
    """A classifier that looks at every image and at its mirror image.

    The probabilities of both are averaged; the outputs are logits that stand for the means.
    """

    def __init__(self, model: nn.Module, several_labels: bool = False) -> None:
        """Wrap a classifier; with `several_labels` each of its outputs has a probability of its own."""
        super().__init__()
        self.model, self.several_labels = model, several_labels

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) in fp32 for images (B, 3, H, W)."""
        found = [self.model(each).float() for each in (images, images.flip(-1))]
        if self.several_labels:
            yes, no = (torch.logaddexp(*(F.logsigmoid(sign * each) for each in found)) for sign in (1, -1))
            return yes - no
        return torch.logaddexp(*(each.log_softmax(1) for each in found)) - math.log(2)


@dataclass(kw_only=True)
class ImageTrial(Trial):
    """An image classifier on images."""

    task: ImageTask
    """What is asked."""
    dataset: ImageDataset
    """The images."""
    held_out_note: str
    """Why there is no validation split to fit a temperature to, or what was left out of it."""

    def details(self, evaluation: Evaluation, held_out: Evaluation | None) -> Details:
        """What the task says beyond its scores."""
        return self.task.build_details(self.dataset, evaluation, held_out, self.held_out_note, self.notes)


def open_trial(
    recipe: Recipe,
    task: ImageTask,
    processes: Processes,
    split: str,
    adapter: Path | None,
    options: ImageEvaluateOptions,
    force: bool,
) -> ImageTrial:
    """Open the images of a split and the model for a task; the others are arguments of `Task.open_trial`.

    Raises:
        ValueError: data, weights or an adapter that do not fit; the message says which.
    """
    data, backbone = recipe.data, recipe.backbone
    assert isinstance(data, DataSettings) and isinstance(backbone, BackboneSettings)
    if options.folder is None:
        dataset = _open_split(data, split, image_size(backbone))
    else:
        whole = _open_folder(Path(options.folder), task)
        dataset = draw_at_most(whole, data.limit, data.data_seed)
        data = dataclasses.replace(data, limit=None)  # The limit is that of the folder, and of no split.
    demand_labels(task, dataset)
    model, named_classes, transform, untrained = _open_model(recipe, dataset, adapter, force)
    classes = named_classes or list(dataset.classes)
    matched = match_classes(dataset, classes)
    named = data if options.folder is None else None
    seen = trained_images(adapter, matched.dataset, named, image_size(backbone))
    notes = matched.notes() + trained_note(len(seen), len(matched.dataset), "images")
    if not named_classes:
        notes.insert(0, _order_note(classes))
    for note in notes if processes.is_main else []:
        logger.warning("%s", note)
    held_out, why = _open_held_out(recipe, data, matched, classes, options)
    if held_out is not None:
        if held_out is not matched.dataset:
            seen = trained_images(adapter, held_out, data, image_size(backbone))
        held_out, why = _unseen(held_out, seen)
    complete = data.on_corrupt == "error"

    def scoring(images: ImageDataset) -> Scoring:
        loader = open_batches(recipe, images, transform, processes, train=False, once=True)
        return Scoring(loader, task.start_tally(len(classes), len(images), complete))

    own = scoring(matched.dataset)
    other = own if held_out is matched.dataset else None if held_out is None else scoring(held_out)
    model = model.to(processes.device)
    return ImageTrial(
        model=WithFlips(model, task.several_labels) if options.flip else model,
        loader=own.loader,
        tally=own.tally,
        held_out=other,
        notes=notes,
        untrained=untrained,
        task=task,
        dataset=matched.dataset,
        held_out_note=why,
    )


def _open_folder(folder: Path, task: ImageTask) -> ImageDataset:
    """All images of a folder, with the label that their class folder says.

    Raises:
        ValueError: what `LabelledFolder` raises, or a task that asks for all labels of an image.
    """
    if task.several_labels:
        shown = shlex.quote(str(folder))
        raise ValueError(
            f"--folder {shown}: a class folder says one label of its images, and task {quote(task.name)} "
            f"asks for all of them. Write these into a table {quote(str(folder / 'test.csv'))}, as that of "
            f"the run, and give --dataset csv --data-dir {shown} instead: all its rows are scored"
        )
    return LabelledFolder(folder)


def _open_split(data: DataSettings, split: str, img_size: tuple[int, int]) -> ImageDataset:
    """The images of a split to score; where there is no test split, the refusal says what there is."""
    try:
        return open_dataset(data, split, img_size)
    except MissingSplitError as error:
        if split == "test":
            raise no_test_split(error) from error
        raise


def _open_model(
    recipe: Recipe, dataset: ImageDataset, adapter: Path | None, force: bool
) -> tuple[Any, list[str], Transform, str]:
    """The model on the CPU, the names of its classes, how an image becomes its input, and `Trial.untrained`.

    There are no names where its file has none, as plain weights.

    Raises:
        ValueError: weights or an adapter that do not fit, or classes without names of another number.
    """
    backbone = recipe.backbone
    assert isinstance(backbone, BackboneSettings)
    file = adapter
    if file is None and backbone.checkpoint is not None and is_merged_file(Path(backbone.checkpoint)):
        file, known = Path(backbone.checkpoint), MODELS.get(backbone.model)
        merged = read_merged_info(file)
        if known.architecture != merged.model:
            raise MergedFileError(
                f"{quote(str(file))} holds a {merged.model}, and the model is {quote(backbone.model)}: "
                f"add --model {merged.model}"
            )
    untrained = ""
    if file is None:
        named = _published_names(backbone, dataset)
        model = create_backbone(recipe, len(named or dataset.classes))
        untrained = "" if named else _new_head(recipe, model, dataset)
        transform = build_transform("none", train=False, **model_preprocessing(model))
    else:
        base = None if adapter is None else backbone.checkpoint
        model, named, preprocessing = open_trained(file, base, force)
        transform = transform_for(model, preprocessing, file)
    if not named and model.num_classes != len(dataset.classes):
        raise DatasetError(
            f"the model has {model.num_classes} classes without names, and the images have "
            f"{len(dataset.classes)} classes: {dataset.source}"
        )
    return model, named, transform, untrained


def _published_names(backbone: BackboneSettings, dataset: ImageDataset) -> list[str]:
    """The classes of the published weights of a model, if it has them and their head is one for these images.

    It is not if it knows none of the classes and has another number of them; what to do then is train one.
    """
    weights = weights_of(backbone.model) if backbone.pretrained and backbone.checkpoint is None else None
    if weights is None:
        return []
    file = file_of(weights)
    names = read_merged_info(file).classes if is_merged_file(file) else []
    fits = len(names) == len(dataset.classes) or not set(names).isdisjoint(dataset.classes)
    return names if fits else []


def _order_note(classes: Sequence[str]) -> str:
    """That classes were matched by their places, because the weights have no names of them."""
    shown = [*classes[:3], *(["..."] if len(classes) > 3 else [])]
    return (
        "The weights have no names of classes, so that their outputs are taken for the classes of the images "
        f"in the order of these: {', '.join(printable(name) for name in shown)}. If they were trained with "
        "another order, the scores mean nothing."
    )


def _new_head(recipe: Recipe, model: Any, dataset: ImageDataset) -> str:
    """What to say where weights were asked for and have no head for the classes of the images, so that the
    model has a random one; "" where it is theirs."""
    backbone = recipe.backbone
    assert isinstance(backbone, BackboneSettings)
    if backbone.checkpoint is None and not backbone.pretrained:
        return ""
    with torch.random.fork_rng(devices=[]):
        plain = create_backbone(recipe.replace(pretrained=False, checkpoint=None), model.num_classes)
    heads = [each.get_classifier().state_dict().values() for each in (plain, model)]
    if not all(torch.equal(random, own) for random, own in zip(*heads, strict=True)):
        return ""
    return (
        f"{backbone.checkpoint or backbone.model} has no head for the {len(dataset.classes)} classes of the "
        f"images ({dataset.source}): answers would be chance. Train first (vimtune train), give the result "
        "as --adapter, or name the data on which these weights were trained (--dataset)"
    )


def _open_held_out(
    recipe: Recipe,
    data: DataSettings,
    scored: Matched,
    classes: Sequence[str],
    options: ImageEvaluateOptions,
) -> tuple[ImageDataset | None, str]:
    """The images to which a temperature is fitted; None where there are none, and why."""
    if not options.calibrate:
        return None, "none was asked for"
    if data.train_split == "train+val" and data.selection_split != HELD_OUT:
        return None, f"the images of {HELD_OUT!r} were trained on"
    if scored.dataset.split == HELD_OUT:
        return scored.dataset, ""
    try:
        # What is wanted beside the scores is not worth a download.
        at_hand = dataclasses.replace(data, download=False)
        backbone = recipe.backbone
        assert isinstance(backbone, BackboneSettings)
        dataset = open_dataset(at_hand, HELD_OUT, image_size(backbone))
        if options.folder is not None and data.are_usual and set(dataset.classes) != set(classes):
            # Where a folder is scored nobody has to name data, and these are those that nobody has named.
            return None, (
                "neither the file nor a flag names data with the classes of the model; name them with "
                "--dataset and --data-dir"
            )
        if not set(dataset.classes) & set(classes):
            return None, f"there is no validation split with these classes; others are in: {dataset.source}"
        matched = match_classes(dataset, classes)
    except DatasetError as error:
        return None, f"there is no validation split ({error})"
    if matched.unknown:
        return (
            None,
            f"the validation split has classes that the model does not know ({matched.dataset.source})",
        )
    return matched.dataset, ""


def _unseen(held_out: ImageDataset, seen: Sequence[int]) -> tuple[ImageDataset | None, str]:
    """The images to which a temperature is fitted without those that were trained on, and what is said of
    these; None where no others are left."""
    note = without_seen(len(seen), len(held_out), "images")
    return (None if len(seen) == len(held_out) else without_images(held_out, seen)), note
