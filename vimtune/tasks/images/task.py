"""What all tasks of images have in common: the data, the backbone, augmentation, and what commands ask for.

This file holds what can be said without torch. A task of images states its scores and its loss: it derives a
class from `ImageTask`, and its job from `vimtune.tasks.images.job.ImageJob`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vimtune import parsers
from vimtune.fields import option
from vimtune.tasks.base import Task
from vimtune.tasks.components import EvaluateOptions, PredictOptions
from vimtune.tasks.images.settings import ImageEvaluateOptions, ImagePredictOptions
from vimtune.text import quote

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vimtune.data import ImageDataset
    from vimtune.recipe import Recipe
    from vimtune.runtime.distributed import Processes
    from vimtune.tasks.details import Details
    from vimtune.tasks.exporting import Exported
    from vimtune.tasks.images.job import ImageJob, OpenedImages
    from vimtune.tasks.images.predictor import ImagePredictor
    from vimtune.tasks.job import Evaluation, Tally, Trial
    from vimtune.tasks.merging import Merged, Precision


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """Say something about each image with a backbone that has an output for each class."""

    unit = "images"
    short_unit = "img"
    examples = "images"
    predict_options: ClassVar[type[PredictOptions]] = ImagePredictOptions
    evaluate_options: ClassVar[type[EvaluateOptions]] = ImageEvaluateOptions
    decided_by_file = ("task", "model", "model_kwargs", "img_size", "pretrained")
    hub_task = "image-classification"
    several_labels: ClassVar[bool] = False
    """Whether an image may have several labels or none (`ImageDataset.tags`). Each class is then judged by
    itself, and has a probability of its own."""

    augmentation: Literal["none", "light", "medium", "strong"] = option(
        "light", "augmentation: none, light, medium, strong", purpose="loss"
    )
    transforms: Literal["albumentations", "torchvision"] = option(
        "albumentations",
        "library of augmentation on a CPU: albumentations, torchvision",
        purpose="loss",
    )

    @property
    def repeats_itself(self) -> bool:
        """Whether an image is trained on with the same pixels and the same targets in every epoch."""
        return self.augmentation == "none"

    @abstractmethod
    def build_job(self, opened: OpenedImages) -> ImageJob:
        """The job on images and a model that were opened."""

    @abstractmethod
    def start_tally(self, num_classes: int, num_images: int, complete: bool) -> Tally:
        """An empty tally for a split.

        Args:
            num_classes: C.
            num_images: how many images the split has.
            complete: whether all of them have to be scored; else some may be left out.
        """

    @abstractmethod
    def build_details(
        self,
        dataset: ImageDataset,
        evaluation: Evaluation,
        held_out: Evaluation | None,
        held_out_note: str,
        notes: Sequence[str] = (),
    ) -> Details:
        """What an evaluation says beyond its scores.

        Args:
            dataset: the images that were scored.
            evaluation: of these, by the task's tally.
            held_out: of the validation split, where there is one.
            held_out_note: why there is none, or what was left out of it.
            notes: what a reader has to know of the images.
        """

    def open(self, recipe: Recipe, processes: Processes) -> ImageJob:
        """Open the image data set and the model of `recipe`; see `Task.open`."""
        from vimtune.tasks.images.job import open_images

        return open_images(recipe, self, processes)

    def open_base(self, recipe: Recipe, processes: Processes) -> nn.Module:
        """The backbone with its weights; see `Task.open_base`."""
        from vimtune.tasks.images.job import open_base

        return open_base(recipe, processes)

    def create_base(self, recipe: Recipe, *, head: bool) -> nn.Module:
        """The backbone with its weights; see `Task.create_base`."""
        from vimtune.tasks.images.job import create_backbone

        return create_backbone(recipe, head=head)

    def check_data(self, recipe: Recipe, processes: Processes) -> None:
        """Open all splits; see `Task.check_data`."""
        from vimtune.tasks.images.job import open_splits

        open_splits(recipe, self, processes)

    def open_trial(
        self,
        recipe: Recipe,
        processes: Processes,
        split: str,
        adapter: Path | None,
        options: EvaluateOptions,
        force: bool,
    ) -> Trial:
        """Open the images to score and the model; see `Task.open_trial`."""
        from vimtune.tasks.images.trial import open_trial

        assert isinstance(options, ImageEvaluateOptions)
        return open_trial(recipe, self, processes, split, adapter, options, force)

    def read_inputs(self, inputs: Sequence[str], classes: Sequence[str]) -> list[Path]:
        """The images among files and folders; see `Task.read_inputs`."""
        from vimtune.tasks.images.inputs import find_images

        del classes
        return find_images([Path(parsers.path(each)) for each in inputs])

    def predictor_type(self) -> type[ImagePredictor]:
        """The class of what answers with a model of this task."""
        from vimtune.tasks.images.predictor import ImagePredictor

        return ImagePredictor

    def open_predictor(
        self, adapter: Path, base: Mapping[str, Any], device: torch.device, backend: str, force: bool
    ) -> ImagePredictor:
        """Create the model of an adapter file or a merged file; see `Task.open_predictor`."""
        from vimtune.tasks.images.predictor import load_image_predictor

        return load_image_predictor(
            adapter,
            checkpoint=_checkpoint_of(base),
            device=device,
            backend=backend,
            force=force,
            kind=self.predictor_type(),
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
        """Write plain weights that timm loads; see `Task.merge`."""
        from vimtune.tasks.images.merging import merge_images

        checkpoint = _checkpoint_of(base)
        return merge_images(adapter, output, checkpoint, device, backend, force, precision, self.name)

    def export(self, source: Path, output: Path, base: Mapping[str, Any], force: bool) -> Exported:
        """Write a graph from images to logits; see `Task.export`."""
        from vimtune.tasks.images.exporting import export_images

        return export_images(source, output, base, force, self.name)

    def merge_to_share(
        self,
        adapter: Path,
        folder: Path,
        base: Mapping[str, Any],
        device: torch.device,
        backend: str,
        force: bool,
    ) -> str:
        """Write plain weights and the configuration by which timm loads them; see `Task.merge_to_share`."""
        from vimtune.tasks.images.merging import merge_for_timm

        return merge_for_timm(adapter, folder, _checkpoint_of(base), device, backend, force, self.name)


def _checkpoint_of(base: Mapping[str, Any]) -> Path | None:
    """The file of base weights that a user gives for an adapter of images; None if there is none.

    Raises:
        ValueError: something else is given.
    """
    for name in base:
        if name != "checkpoint":
            raise ValueError(
                f"{name} = {quote(base[name])}: an adapter of images says itself which model it needs; "
                "its weights may be given as checkpoint"
            )
    return base.get("checkpoint")
