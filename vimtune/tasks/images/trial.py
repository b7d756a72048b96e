"""An image classifier, with an adapter or without, on images to be scored."""

from __future__ import annotations

from pathlib import Path

from vimtune.adapters import read_adapter_info
from vimtune.data import build_transform, model_preprocessing
from vimtune.origin import load_trained
from vimtune.recipe import Recipe
from vimtune.tasks.images.job import (
    create_backbone,
    demand_labels,
    image_size,
    open_batches,
    open_dataset,
)
from vimtune.tasks.images.predictor import build_base
from vimtune.tasks.images.settings import BackboneSettings, DataSettings
from vimtune.tasks.images.task import ImageTask
from vimtune.tasks.job import Trial
from vimtune.training.distributed import Processes


def open_trial(
    recipe: Recipe, task: ImageTask, processes: Processes, split: str, adapter: Path | None, force: bool
) -> Trial:
    """Open the images of a split and the model for a task; the others are arguments of `Task.open_trial`.

    Raises:
        ValueError: data, weights or an adapter that do not fit; the message says which.
    """
    data, backbone = recipe.data, recipe.backbone
    assert isinstance(data, DataSettings) and isinstance(backbone, BackboneSettings)
    dataset = open_dataset(data, split, image_size(backbone))
    demand_labels(task, dataset)
    if adapter is None:
        model = create_backbone(recipe, len(dataset.classes))
    else:
        info = read_adapter_info(adapter)
        if info.classes and info.classes != dataset.classes:
            raise ValueError(
                f"the classes of the adapter ({len(info.classes)}) are not those of the images "
                f"({len(dataset.classes)}): {dataset.source}"
            )
        model = build_base(info, backbone.checkpoint)
        load_trained(model, adapter, force)
    transform = build_transform("none", train=False, **model_preprocessing(model))
    loader = open_batches(recipe, dataset, transform, processes, train=False, once=True)
    tally = task.start_tally(len(dataset.classes), len(dataset), complete=data.on_corrupt == "error")
    return Trial(model.to(processes.device), loader, tally)
