"""From a recipe to the things a run works on: data, model with its adapter, loaders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

import vimtune
from vimtune.data import (
    ImageDataset,
    ImageLoader,
    MissingSplitError,
    build_transform,
    create_dataset,
    create_loader,
    model_preprocessing,
)
from vimtune.models import VisionMamba, create_listed_model, load_checkpoint
from vimtune.recipe import Recipe
from vimtune.train.distributed import Processes
from vimtune.train.settings import derive_seed


@dataclass
class Job:
    """What a run works on. `test` is None where the data set has no test images of its own."""

    model: nn.Module
    classes: list[str]
    train: ImageLoader
    selection: ImageLoader
    test: ImageLoader | None
    preprocessing: dict[str, Any]

    @property
    def sources(self) -> dict[str, str]:
        """For each split in use, which images it really holds."""
        return {dataset.split: dataset.source for dataset in self._datasets}

    @property
    def fingerprints(self) -> dict[str, str]:
        """For each split in use, a hash that changes when its images do."""
        return {dataset.split: dataset.fingerprint() for dataset in self._datasets}

    def close(self) -> None:
        """End the processes that prepare images."""
        for loader in self._loaders:
            loader.close()

    @property
    def _loaders(self) -> list[ImageLoader]:
        return list(dict.fromkeys([self.train, self.selection, *([self.test] if self.test else [])]))

    @property
    def _datasets(self) -> list[ImageDataset]:
        return [loader.dataset for loader in self._loaders]


def build_job(recipe: Recipe, processes: Processes) -> Job:
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

    def loader(dataset: ImageDataset, train: bool) -> ImageLoader:
        return create_loader(
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

    selection = loader(selection_set, train=False)
    return Job(
        model=model.to(processes.device),
        classes=train_set.classes,
        train=loader(train_set, train=True),
        selection=selection,
        test=selection if test_set is selection_set else loader(test_set, train=False) if test_set else None,
        preprocessing=eval_transform.config,
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
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def _image_size(recipe: Recipe) -> tuple[int, int]:
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
    if selection.split == "test":
        return selection
    try:
        return _open(recipe, "test", img_size)
    except MissingSplitError:
        return None
