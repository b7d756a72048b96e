"""What is analysed: a model before and after training, test images, and training batches with their loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vimtune.adapters import active_adapter, delete_adapter, list_adapters
from vimtune.analysis.parameters import effective_parameters
from vimtune.models import VisionMamba
from vimtune.models.merged import is_merged_file, read_merged
from vimtune.recipe import Recipe, load_recipe, refuse_keys_without_use
from vimtune.runtime.distributed import Processes, open_processes
from vimtune.runtime.seeds import derive_seed
from vimtune.tasks.images.job import create_backbone
from vimtune.tasks.job import Forward, Job, Loader, Tensors
from vimtune.tasks.origin import check_replaced, recipe_of_trained, refuse_other_model
from vimtune.training.report import device_name, versions
from vimtune.training.settings import process_settings

Loss = Callable[[Forward], Tensor]
"""The mean loss of one training batch, a scalar, as a function of whatever calls the model."""


class NotApplicable(ValueError):
    """An analysis has nothing to say of this model or these data; the message says why."""


@dataclass
class Subject:
    """A model before and after training, and the data to look at it with."""

    before: nn.Module
    """The model as training found it, without any adapter, in evaluation mode."""
    after: nn.Module
    """The model as training left it, with its adapter or with plain weights, in evaluation mode."""
    facts: dict[str, str] = field(default_factory=dict)
    """What is analysed, in words: file, model, method, data."""
    batches: list[Tensor] = field(default_factory=list)
    """Test images (b, C, H, W), preprocessed, in batches on the device of the models."""
    losses: Callable[[], Iterator[Loss]] = lambda: iter(())
    """Gives the losses of training batches."""

    @cached_property
    def weights_before(self) -> dict[str, Tensor]:
        """Every parameter before training, by path."""
        return effective_parameters(self.before)

    @cached_property
    def weights_after(self) -> dict[str, Tensor]:
        """Every parameter after training, as the model computes with it, by the same paths."""
        return effective_parameters(self.after)

    def images(self) -> list[Tensor]:
        """`batches`, for an analysis that needs some.

        Raises:
            NotApplicable: there are none.
        """
        if not self.batches:
            raise NotApplicable("it needs images: name a data set with --dataset")
        return self.batches

    def vims(self) -> tuple[VisionMamba, VisionMamba]:
        """The model before and after, for an analysis that knows the inside of a Vim.

        Raises:
            NotApplicable: it is another model.
        """
        if isinstance(self.before, VisionMamba) and isinstance(self.after, VisionMamba):
            return self.before, self.after
        raise NotApplicable(f"it is about Vision Mamba, and the model is a {type(self.after).__name__}")


@contextmanager
def open_subject(
    path: Path, values: Mapping[str, Any], *, split: str, num_images: int, num_batches: int
) -> Iterator[Subject]:
    """What an adapter file or a merged file describes, for the length of a block.

    Args:
        path: the file.
        values: keys of the recipe that are to be others than those of its run.
        split: "test" or "val", from which the images are taken.
        num_images: at most so many of them, drawn from all over the split, in any order: neighbours in a data
            set are often of one class, and say little of how features of images differ.
        num_batches: at most so many training batches.

    Raises:
        ValueError: no such file, or weights, data and settings that do not fit together.
    """
    merged = is_merged_file(path)
    refuse_keys_without_use(values, "loss", "analysis")
    stored = recipe_of_trained(path, values)
    if not merged:  # The base of a merged file is any model that is named.
        refuse_other_model(path, stored, values)
    recipe = load_recipe(None, {**stored, **values})
    with open_processes(recipe.run.device) as processes, process_settings(recipe.run, processes.device):
        if processes.world_size > 1:
            raise ValueError("an analysis is the work of one process: start it without torchrun")
        # A merged file says nothing of its data; those of a recipe without the key would be any others.
        if merged and "dataset" not in values:
            after, _ = read_merged(path)
            subject = Subject(create_backbone(recipe, after.num_classes), after)
        else:
            limit = getattr(recipe.data, "limit", None)
            few = recipe.replace(limit=min(limit or num_images, num_images))
            subject = _with_data(path, recipe, few, processes, merged, split, num_batches)
        for model in (subject.before, subject.after):
            model.to(processes.device).eval()
        method = active_adapter(subject.after)
        subject.facts = {
            "file": str(path),
            "model": recipe.backbone.model,
            "method": "merged weights" if method is None else method.method,
            **subject.facts,
            "seed": str(recipe.run.seed),
            "device": device_name(processes.device),
            "versions": ", ".join(f"{name} {number}" for name, number in versions(recipe.task).items()),
        }
        yield subject


def _with_data(
    path: Path,
    recipe: Recipe,
    few: Recipe,
    processes: Processes,
    merged: bool,
    split: str,
    num_batches: int,
) -> Subject:
    """See `open_subject`; `few` is the recipe with no more examples than are wanted."""
    options = recipe.task.evaluate_options(calibrate=False)
    adapter = None if merged else path
    trial = few.task.open_trial(few, processes, split, adapter, options, few.run.force)
    try:
        images = _take_images(trial.loader, processes.device)
    finally:
        trial.close()
    before, after = trial.model, trial.model
    if merged:
        after, _ = read_merged(path)
    else:
        check_replaced(after, path, recipe.run.force)
        before = copy.deepcopy(after)
        for name in list_adapters(before):
            delete_adapter(before, name)
    facts = {"data": trial.loader.source, "images": f"{sum(map(len, images))} of split {split!r}"}
    return Subject(before, after, facts, images, lambda: _losses(recipe, processes, num_batches))


def _take_images(loader: Loader, device: torch.device) -> list[Tensor]:
    """All images of a loader in another order, in batches; none of a task whose examples are no images."""
    found = []
    for batch in loader:
        images = batch.to(device).tensors.get("images")
        if images is None:
            return []
        found.append(images)
    together = torch.cat(found)
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(0))
    return list(together[order].split(len(found[0])))


def _losses(recipe: Recipe, processes: Processes, count: int) -> Iterator[Loss]:
    """The first training batches of a run, augmented as there, as functions that give their mean loss."""
    job = recipe.task.open(recipe, processes)
    try:
        loader = job.train.originals
        loader.set_position(0)
        for number, batch in zip(range(count), loader, strict=False):
            tensors: Tensors = batch.to(processes.device).tensors
            prepared = job.prepare(tensors, derive_seed(recipe.run.seed, "analysis", number))
            yield partial(_mean_loss, job, prepared, batch.count)
    finally:
        job.close()


def _mean_loss(job: Job, tensors: Tensors, count: int, forward: Forward) -> Tensor:
    return job.loss(forward, tensors) / count
