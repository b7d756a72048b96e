"""From a recipe to what an image classifier is trained with: data, model with its adapter, loaders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import timm
import torch
from torch import Tensor, nn

from vimtune import adapters
from vimtune.data import (
    ImageDataset,
    MissingSplitError,
    Transform,
    build_transform,
    create_dataset,
    create_loader,
    model_preprocessing,
)
from vimtune.data.loading.batch_sampler import BatchSampler
from vimtune.data.loading.loader import samples_for
from vimtune.data.loading.worker_count import AS_ASKED, WorkerCount, choose_num_workers
from vimtune.data.subset import draw_at_most, draw_protocol, draw_shots, take_fold
from vimtune.methods import METHODS
from vimtune.models import VisionMamba, create_listed_model, load_checkpoint
from vimtune.models.checkpoint import load_with_its_head
from vimtune.models.registry import MODELS
from vimtune.models.weights import WEIGHTS, weights_of
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.runtime.precision import build_autocast
from vimtune.runtime.seeds import derive_seed
from vimtune.tasks.classes.calibration import HELD_OUT, NOT_APART, selected
from vimtune.tasks.classes.confusion import confusion_files, confusion_title
from vimtune.tasks.classes.details import ClassDetails
from vimtune.tasks.classification import Classification
from vimtune.tasks.images.batches import ImageBatches
from vimtune.tasks.images.details import image_details
from vimtune.tasks.images.distillation import TEACHER, Distillation, load_teacher
from vimtune.tasks.images.examples import choose_examples
from vimtune.tasks.images.features import FeatureBatches, ImagesOrFeatures, repeats_its_features
from vimtune.tasks.images.gallery import write_gallery
from vimtune.tasks.images.mixing import BatchMixer, summed_loss
from vimtune.tasks.images.report import ImageReport, build_image_report
from vimtune.tasks.images.scoring import ImageEvaluation, ImageTally
from vimtune.tasks.images.settings import BackboneSettings, DataSettings
from vimtune.tasks.images.task import ImageTask
from vimtune.tasks.images.weighting import class_weights
from vimtune.tasks.job import Evaluation, Forward, Job, Loader, Outcome, Tensors
from vimtune.tasks.report import Report

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ImageJob(Job):
    """A model with an output for each class, on its images."""

    classes: list[str]
    """Name of each class, by label."""
    counts_all: bool
    """Whether no image may be left out."""
    features: ImagesOrFeatures | None = None
    """The model where it gets features that were computed once in the place of images."""

    @property
    def forwarded(self) -> nn.Module:
        """The model, or what takes features in its place."""
        return self.model if self.features is None else self.features

    def expect_replays(self) -> int:
        """Whole batches, and the last one of an epoch, which eagerly takes as long as several others."""
        return 2

    def expect_replayed_evaluations(self) -> int:
        """Whole batches, and the last one of each split."""
        return 3

    def held_out(self, outcome: Outcome) -> tuple[Evaluation | None, str]:
        """What a temperature is fitted to: the scores of the validation split; None where there are none,
        and why."""
        if self.selection.split != HELD_OUT:
            return None, NOT_APART
        return selected(outcome)

    def prepare(self, tensors: Tensors, seed: int) -> Tensors:
        """The images and their labels; nothing else of a batch is trained on."""
        del seed
        return {"images": tensors["images"], "labels": tensors["labels"]}


@dataclass(kw_only=True)
class ClassJob(ImageJob):
    """An image classifier on its data."""

    mix: BatchMixer
    label_smoothing: float
    class_weights: Tensor | None
    """Weight of each class in the loss, (C,); None where all are alike."""
    distillation: Distillation | None
    """How a teacher takes part in the loss."""

    def prepare(self, tensors: Tensors, seed: int) -> Tensors:
        """Mix the images of a batch, and their labels into shares (B, C), where the recipe asks for it."""
        images, labels = self.mix(tensors["images"], tensors["labels"], seed)
        return {"images": images, "labels": labels}

    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """Cross entropy summed over the images, with a teacher's part in it where there is one."""
        images = tensors["images"]
        logits = forward(images)
        loss = summed_loss(logits, tensors["labels"], self.label_smoothing, self.class_weights)
        return loss if self.distillation is None else self.distillation.blend(loss, logits, images)

    def start_tally(self, loader: Loader) -> ImageTally:
        """An empty tally of right and wrong answers."""
        return ImageTally(len(self.classes), loader.num_examples, complete=self.counts_all)

    def build_report(self, shared: Mapping[str, Any], outcome: Outcome) -> ImageReport:
        """The report with accuracy per class and the most confused classes."""
        num_workers = {loader.split: loader.num_workers for loader in self.loaders}
        return build_image_report(shared, outcome, self.classes, num_workers)

    def details(self, outcome: Outcome) -> ClassDetails:
        """Classes, confusions, calibration and mistakes."""
        assert isinstance(self.final, ImageBatches | FeatureBatches)
        return image_details(self.final.dataset, outcome.evaluation, *self.held_out(outcome))

    def result_files(self, report: Report, evaluation: Evaluation) -> dict[str, Callable[[Path], None]]:
        """The confusion matrix as a table and as a picture, and images with right and wrong answers."""
        assert isinstance(evaluation, ImageEvaluation)
        assert isinstance(self.final, ImageBatches | FeatureBatches)
        examples = choose_examples(evaluation.answers)
        picture = partial(write_gallery, examples=examples, dataset=self.final.dataset)
        title = confusion_title(evaluation.confusion, report.split, "images")
        return {**confusion_files(evaluation.confusion, self.classes, title), "examples.png": picture}


@dataclass(frozen=True)
class OpenedImages:
    """What a task of images makes a job of."""

    recipe: Recipe
    processes: Processes
    train_set: ImageDataset
    """The images to train on."""
    transform: Transform
    """How an image becomes an input of the model, without augmentation."""
    shared: dict[str, Any]
    """Values of the fields of `ImageJob`."""


def open_images(recipe: Recipe, task: ImageTask, processes: Processes) -> ImageJob:
    """Open the data, create the model, inject the adapter, build the loaders.

    Raises:
        ValueError: data, weights or adapter settings that do not fit; the message says which.
    """
    data, backbone = recipe.data, recipe.backbone
    assert isinstance(data, DataSettings) and isinstance(backbone, BackboneSettings)
    img_size = image_size(backbone)
    train_set, selection_set, test_set = open_splits(recipe, task, processes)
    _mention_other_kind(backbone, train_set)
    with processes.main_first():  # may download weights
        model = build_model(recipe, len(train_set.classes))
    preprocessing = {**model_preprocessing(model), "img_size": img_size, "library": task.transforms}
    train_transform = build_transform(task.augmentation, train=True, **preprocessing)
    eval_transform = build_transform("none", train=False, **preprocessing)

    features = _features_once(recipe, task, model, processes)

    def batches(dataset: ImageDataset, train: bool, once: bool) -> Loader:
        if features is not None:
            return open_features(recipe, dataset, eval_transform, processes, features, train=train)
        transform = train_transform if train else eval_transform
        return open_batches(recipe, dataset, transform, processes, train=train, once=once)

    classes = train_set.classes
    selection = batches(selection_set, train=False, once=data.evaluated_once)
    shared = {
        "model": model,
        "train": batches(train_set, train=True, once=False),
        "selection": selection,
        "final": selection
        if test_set is None or test_set is selection_set
        else batches(test_set, train=False, once=True),
        "usual_count": recipe.optimisation.batch_size,
        "outputs": {"classes": classes},
        "saved_with_adapter": {"classes": classes, "preprocessing": eval_transform.config},
        "classes": classes,
        "counts_all": data.on_corrupt == "error",
        "features": features,
    }
    return task.build_job(OpenedImages(recipe, processes, train_set, eval_transform, shared))


def build_class_job(opened: OpenedImages, task: Classification) -> ClassJob:
    """The job of a classifier on what was opened, with its teacher if it has one.

    Raises:
        ValueError: a teacher or class weights that do not fit the classes.
    """
    device, classes = opened.processes.device, opened.train_set.classes
    weights = class_weights(task.class_weights, opened.train_set.targets, classes)
    distillation, readers = None, {}
    if task.teacher is not None:
        autocast = build_autocast(opened.recipe.optimisation.amp, device)
        teacher, readers[TEACHER] = load_teacher(task.teacher, classes, opened.transform, device, autocast)
        distillation = Distillation(
            teacher, task.teacher_targets, task.teacher_weight, task.teacher_temperature
        )
    return ClassJob(
        **opened.shared,
        readers=readers,
        mix=BatchMixer(task.mixup, task.cutmix, len(classes)),
        label_smoothing=task.label_smoothing,
        class_weights=None if weights is None else weights.to(device),
        distillation=distillation,
    )


def demand_labels(task: ImageTask, dataset: ImageDataset) -> None:
    """Make sure that images have as many labels as a task wants.

    Raises:
        ValueError: they have several where the task wants one, or the other way round.
    """
    if task.several_labels and dataset.tags is None:
        raise ValueError(
            f"task {task.name!r} needs images that may have several labels, and these have one each: give a "
            f"data set csv the option separator, or use task classification ({dataset.source})"
        )
    if dataset.tags is not None and not task.several_labels:
        raise ValueError(
            f"these images may have several labels, and task {task.name!r} knows one for each: use task "
            f"multilabel ({dataset.source})"
        )


def _features_once(
    recipe: Recipe, task: ImageTask, model: VisionMamba, processes: Processes
) -> ImagesOrFeatures | None:
    """The model as one that takes features, where those of an image are the same in every epoch."""
    data = recipe.data
    assert isinstance(data, DataSettings)
    # A balanced epoch would not have the features of all images.
    always_alike = task.repeats_itself and not data.balanced
    one_process = processes.world_size == 1 and not recipe.optimisation.shard
    head_alone = all(METHODS.get(name).trains_head_only for name in recipe.method.peft.split("+"))
    once = always_alike and one_process and head_alone and data.on_corrupt == "error"
    if not (once and repeats_its_features(model)):
        return None
    if data.cache in ("host", "device"):
        logger.warning(
            "the features of an image are computed once, because the head alone is trained and nothing is "
            "drawn for it: images are read once and none is kept, so cache = %r has no effect",
            data.cache,
        )
    return ImagesOrFeatures(model)


def open_features(
    recipe: Recipe,
    dataset: ImageDataset,
    transform: Transform,
    processes: Processes,
    model: ImagesOrFeatures,
    train: bool,
) -> FeatureBatches:
    """The batches of a split as those of `open_batches`, with features in the place of images."""
    images = open_batches(recipe, dataset, transform, processes, train=train, once=True)
    seed = derive_seed(recipe.run.seed, "data")
    order = BatchSampler(len(dataset), recipe.optimisation.batch_size, train, False, seed, 0, 1)
    return FeatureBatches(images, order, model, build_autocast(recipe.optimisation.amp, processes.device))


def _mention_other_kind(backbone: BackboneSettings, dataset: ImageDataset) -> None:
    """Warn where the weights at the start have seen drawings alone, and the data set has photographs.

    Nothing is said the other way round: features of photographs are a start for drawings.
    """
    weights = weights_of(backbone.model) if backbone.pretrained and backbone.checkpoint is None else None
    if weights is None or weights.trained_on in (dataset.kind, "photographs"):
        return
    others = [
        each.name for each in WEIGHTS if each.model == weights.model and each.trained_on == dataset.kind
    ]
    better = f"--model {others[0]}" if others else "--checkpoint with weights of such images"
    logger.warning(
        "the weights %s have seen %s, and these images are %s, for which their features say little: use %s",
        weights.name,
        weights.trained_on,
        dataset.kind,
        better,
    )


def open_batches(
    recipe: Recipe,
    dataset: ImageDataset,
    transform: Transform,
    processes: Processes,
    *,
    train: bool,
    once: bool,
) -> ImageBatches:
    """The batches of a split as a recipe wants them; raises what `create_loader` raises.

    Those to `train` on come in another order in every epoch, and those to score say which images they hold. A
    split that is read `once` is not worth a place on the device, unless the recipe asks for that place; it
    then gets one if there is room.
    """
    data = recipe.data
    assert isinstance(data, DataSettings)
    batch_size = recipe.optimisation.batch_size
    seed = derive_seed(recipe.run.seed, "data")
    if data.num_workers == "auto":
        workers = choose_num_workers(
            samples_for(dataset, transform, seed, processes.device),
            batch_size=batch_size,
            world_size=processes.world_size,
            local_size=processes.local_size,
            on_gpu=processes.device.type != "cpu",
            cached=data.cache == "host" and not once,
        )
    else:
        workers = WorkerCount(data.num_workers, AS_ASKED)
    loader = create_loader(
        dataset,
        transform,
        batch_size=batch_size,
        shuffle=train,
        drop_last=False,
        num_workers=workers.number,
        seed=seed,
        rank=processes.rank,
        world_size=processes.world_size,
        cache=data.cache,
        once=once,
        device=processes.device,
        agree=processes.all,
        on_corrupt=data.on_corrupt,
        pin_memory=processes.device.type == "cuda",
        balanced=train and data.balanced,
    )
    return ImageBatches(loader, workers, numbered=not train)


def build_model(recipe: Recipe, num_classes: int) -> VisionMamba:
    """The backbone with its weights, and the adapter of the recipe in it."""
    method = recipe.method
    model = create_backbone(recipe, num_classes)
    torch.manual_seed(derive_seed(recipe.run.seed, "adapter"))
    adapters.inject(model, method.peft, targets=method.targets, layers=method.layers, **method.method_kwargs)
    if recipe.optimisation.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def create_backbone(recipe: Recipe, num_classes: int | None = None, *, head: bool = True) -> VisionMamba:
    """The backbone with its weights, without an adapter.

    Args:
        recipe: which backbone, and its weights.
        num_classes: outputs of its head; those of its weights if None.
        head: whether a checkpoint's head is loaded as well.

    Raises:
        ValueError: weights that are not to be had or do not fit, or without the head that is asked for.
    """
    backbone = recipe.backbone
    assert isinstance(backbone, BackboneSettings)
    options = dict(backbone.model_kwargs)
    if backbone.img_size is not None:
        options["img_size"] = _size_option(backbone.model, image_size(backbone))
    # Seeded apart, so that the adapter starts alike whatever the backbone drew.
    torch.manual_seed(derive_seed(recipe.run.seed, "model"))
    if num_classes is not None:
        options["num_classes"] = num_classes
    if backbone.drop_path > 0:  # a model of another package need not have this option
        options["drop_path_rate"] = backbone.drop_path
    model: VisionMamba = create_listed_model(
        backbone.model,
        options,
        pretrained=backbone.pretrained and backbone.checkpoint is None,
        what="model_kwargs",
    )
    if backbone.checkpoint is None:
        return model
    if head and num_classes is None:
        return load_with_its_head(model, backbone.checkpoint)
    return load_checkpoint(model, backbone.checkpoint, head=head)


def open_base(recipe: Recipe, processes: Processes) -> VisionMamba:
    """The backbone for the classes of the training images; see `Task.open_base`."""
    data, backbone = recipe.data, recipe.backbone
    assert isinstance(data, DataSettings) and isinstance(backbone, BackboneSettings)
    with processes.main_first():  # may download images and weights
        train_set = open_dataset(data, "train", image_size(backbone))
        return create_backbone(recipe, len(train_set.classes))


def image_size(backbone: BackboneSettings) -> tuple[int, int]:
    """Height and width of the images: those of the recipe, or the model's own."""
    if isinstance(backbone.img_size, int):
        return backbone.img_size, backbone.img_size
    if isinstance(backbone.img_size, Sequence):
        return backbone.img_size[0], backbone.img_size[1]
    config = timm.get_pretrained_cfg(backbone.model)
    if config is not None:
        return config.input_size[1], config.input_size[2]
    # The model's module tells timm nothing, and so the model itself is asked.
    model = create_listed_model(backbone.model, backbone.model_kwargs, what="model_kwargs")
    _, height, width = model.pretrained_cfg["input_size"]
    return height, width


def _size_option(model: str, size: tuple[int, int]) -> int | tuple[int, int]:
    """(height, width) as a model takes it: one number for a square if its option is a whole number."""
    annotation = get_type_hints(MODELS.get(model).load_options()).get("img_size")
    takes_number = annotation in (int, int | None)
    return size[0] if takes_number and size[0] == size[1] else size


def open_splits(
    recipe: Recipe, task: ImageTask, processes: Processes
) -> tuple[ImageDataset, ImageDataset, ImageDataset | None]:
    """The images to train on, those that select the best epoch, and those that are scored in the end: the
    second ones once more, or None where the data set has none or the recipe wants none.

    Raises:
        DatasetError: images that are missing or wrong, or fewer than the recipe wants to draw.
        ValueError: splits with other classes, or images with more or fewer labels than the task wants.
    """
    data, backbone = recipe.data, recipe.backbone
    assert isinstance(data, DataSettings) and isinstance(backbone, BackboneSettings)
    img_size = image_size(backbone)
    with processes.main_first():  # may download images
        train = open_dataset(data, data.train_split, img_size)
        selection = open_dataset(data, data.selection_split, img_size)
        test = _open_test(data, selection, img_size)
    demand_labels(task, train)
    for dataset in (selection, test):
        if dataset is not None and dataset.classes != train.classes:
            raise ValueError(
                f"the classes of {dataset.split!r} ({len(dataset.classes)}) are not those of "
                f"{train.split!r} ({len(train.classes)}): {dataset.source}; {train.source}"
            )
    return train, selection, test


def open_dataset(data: DataSettings, split: str, img_size: tuple[int, int]) -> ImageDataset:
    """The images of a split that a recipe asks for.

    Raises:
        DatasetError: what `create_dataset` raises, or there are fewer images than the recipe wants to draw.
    """

    # With folds, data seeds count through the parts of one draw before they begin another.
    seed, fold = divmod(data.data_seed, data.folds or 1)

    def whole(part: str) -> ImageDataset:
        return create_dataset(
            data.dataset,
            part,
            data.data_dir,
            seed=seed,
            img_size=img_size,
            download=data.download,
            **data.dataset_kwargs,
        )

    dataset: ImageDataset
    if data.folds is not None and split in ("train", "val"):
        dataset = take_fold(whole("train+val"), split, data.folds, fold, seed)
    elif data.train_size is not None and split != "test":
        dataset = draw_protocol(whole, split, data.train_size, data.data_seed)
    elif data.shots is not None and split == data.train_split:
        dataset = draw_shots(whole(split), data.shots, data.data_seed)
    else:
        dataset = whole(split)
    return draw_at_most(dataset, data.limit, data.data_seed)


def _open_test(data: DataSettings, selection: ImageDataset, img_size: tuple[int, int]) -> ImageDataset | None:
    """The test split: `selection` itself if it is that one, None where the data set has none or the recipe
    wants none."""
    if selection.split == "test":
        return selection
    if not data.test:
        return None
    try:
        return open_dataset(data, "test", img_size)
    except MissingSplitError:
        return None
