"""From a recipe to what an image classifier is trained with: data, model with its adapter, loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import vimtune
from vimtune.data import (
    ImageDataset,
    MissingSplitError,
    build_transform,
    create_dataset,
    create_loader,
    model_preprocessing,
)
from vimtune.models import VisionMamba, create_listed_model, load_checkpoint
from vimtune.recipe import Recipe
from vimtune.tasks.images.batches import ImageBatches
from vimtune.tasks.images.confusion import confusion_files
from vimtune.tasks.images.mixing import BatchMixer, summed_loss
from vimtune.tasks.images.report import ImageReport, build_image_report
from vimtune.tasks.images.scoring import ImageEvaluation, ImageTally
from vimtune.tasks.job import Evaluation, Forward, Job, Loader, Outcome, Tensors
from vimtune.train.distributed import Processes
from vimtune.train.report import Report
from vimtune.train.settings import derive_seed


@dataclass(kw_only=True)
class ImageJob(Job):
    """An image classifier on its data."""

    classes: list[str]
    """Name of each class, by label."""
    mix: BatchMixer
    label_smoothing: float
    counts_all: bool
    """Whether no image may be left out."""

    def prepare(self, tensors: Tensors, seed: int) -> Tensors:
        """Mix the images of a batch, and their labels into shares (B, C), where the recipe asks for it."""
        images, labels = self.mix(tensors["images"], tensors["labels"], seed)
        return {"images": images, "labels": labels}

    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """Cross entropy summed over the images."""
        return summed_loss(forward(tensors["images"]), tensors["labels"], self.label_smoothing)

    def start_tally(self, loader: Loader) -> ImageTally:
        """An empty tally of right and wrong answers."""
        return ImageTally(len(self.classes), loader.num_examples if self.counts_all else None)

    def build_report(self, shared: Mapping[str, Any], outcome: Outcome) -> ImageReport:
        """The report with accuracy per class and the most confused classes."""
        return build_image_report(shared, outcome, self.classes)

    def result_files(self, report: Report, evaluation: Evaluation) -> dict[str, Callable[[Path], None]]:
        """The confusion matrix as a table and as a picture."""
        assert isinstance(evaluation, ImageEvaluation) and isinstance(report, ImageReport)
        return confusion_files(evaluation.confusion, self.classes, report)


def open_images(recipe: Recipe, processes: Processes) -> ImageJob:
    """Open the data, create the model, inject the adapter, build the loaders.

    Raises:
        ValueError: data, weights or adapter settings that do not fit; the message says which.
    """
    img_size = _image_size(recipe)
    with processes.main_first():
        train_set = _open(recipe, recipe.train_split, img_size)
        selection_set = _open(recipe, recipe.selection_split, img_size)
        test_set = _open_test(recipe, selection_set, img_size)
    for dataset in (selection_set, test_set):
        if dataset is not None and dataset.classes != train_set.classes:
            raise ValueError(
                f"the classes of {dataset.split!r} ({len(dataset.classes)}) are not those of "
                f"{train_set.split!r} ({len(train_set.classes)}): {dataset.source}; {train_set.source}"
            )
    with processes.main_first():  # may download weights
        model = build_model(recipe, len(train_set.classes))
    shared = {**model_preprocessing(model), "img_size": img_size, "library": recipe.transforms}
    train_transform = build_transform(recipe.augmentation, train=True, **shared)
    eval_transform = build_transform("none", train=False, **shared)

    def batches(dataset: ImageDataset, train: bool) -> ImageBatches:
        loader = create_loader(
            dataset,
            train_transform if train else eval_transform,
            batch_size=recipe.batch_size,
            shuffle=train,
            drop_last=False,
            num_workers=recipe.num_workers,
            seed=derive_seed(recipe.seed, "data"),
            rank=processes.rank,
            world_size=processes.world_size,
            cache=recipe.cache,
            on_corrupt=recipe.on_corrupt,
            pin_memory=processes.device.type == "cuda",
        )
        return ImageBatches(loader)

    classes = train_set.classes
    selection = batches(selection_set, train=False)
    return ImageJob(
        model=model.to(processes.device),
        train=batches(train_set, train=True),
        selection=selection,
        final=selection if test_set is None or test_set is selection_set else batches(test_set, train=False),
        usual_count=recipe.batch_size,
        outputs={"classes": classes},
        saved_with_adapter={"classes": classes, "preprocessing": eval_transform.config},
        classes=classes,
        mix=BatchMixer(recipe.mixup, recipe.cutmix, len(classes)),
        label_smoothing=recipe.label_smoothing,
        counts_all=recipe.on_corrupt == "error",
    )


def build_model(recipe: Recipe, num_classes: int) -> VisionMamba:
    """The backbone with its weights, and the adapter of the recipe in it."""
    options = dict(recipe.model_kwargs)
    if recipe.img_size is not None:
        options["img_size"] = _image_size(recipe)
    # Seeded apart, so that the adapter starts alike whatever the backbone drew.
    torch.manual_seed(derive_seed(recipe.seed, "model"))
    options |= {"num_classes": num_classes, "drop_path_rate": recipe.drop_path}
    model = create_listed_model(
        recipe.model, options, pretrained=recipe.pretrained and recipe.checkpoint is None, what="model_kwargs"
    )
    if recipe.checkpoint is not None:
        load_checkpoint(model, recipe.checkpoint)
    torch.manual_seed(derive_seed(recipe.seed, "adapter"))
    vimtune.inject(model, recipe.peft, targets=recipe.targets, layers=recipe.layers, **recipe.method_kwargs)
    model.set_grad_checkpointing(recipe.grad_checkpointing)
    return model


def _image_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the images: those of the recipe, or the model's own."""
    if isinstance(recipe.img_size, int):
        return recipe.img_size, recipe.img_size
    if isinstance(recipe.img_size, Sequence):
        return recipe.img_size[0], recipe.img_size[1]
    config = timm.get_pretrained_cfg(recipe.model)
    assert config is not None, "every model of the catalogue has a pretrained_cfg"
    return config.input_size[1], config.input_size[2]


def _open(recipe: Recipe, split: str, img_size: tuple[int, int]) -> ImageDataset:
    return create_dataset(
        recipe.dataset,
        split,
        recipe.data_dir,
        seed=recipe.data_seed,
        img_size=img_size,
        download=recipe.download,
        **recipe.dataset_kwargs,
    )


def _open_test(recipe: Recipe, selection: ImageDataset, img_size: tuple[int, int]) -> ImageDataset | None:
    """The test split: `selection` itself if it is that one, None where the data set has none."""
    if selection.split == "test":
        return selection
    try:
        return _open(recipe, "test", img_size)
    except MissingSplitError:
        return None
