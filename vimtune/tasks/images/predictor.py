"""Classify images with an adapter file, which knows model, head, class names and preprocessing.

A merged file (`vimtune merge`) serves as well. Shape letters: B batch, C classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vimtune.adapters import AdapterFileError, AdapterInfo, read_adapter_info
from vimtune.data import (
    CorruptImageError,
    ImageReadError,
    Transform,
    build_transform,
    images,
    load_image,
    model_preprocessing,
    read_transform,
)
from vimtune.merged import is_merged_file, read_merged
from vimtune.models import VisionMamba, create_listed_model, load_checkpoint
from vimtune.ops import use_backend
from vimtune.origin import Origin, find_base, load_trained
from vimtune.results import Answer, Prediction
from vimtune.tasks.components import PredictOptions
from vimtune.tasks.images.settings import ImagePredictOptions
from vimtune.tasks.predictor import LeftOut, Predictor, check_counts
from vimtune.text import quote
from vimtune.training.settings import derive_seed

logger = logging.getLogger(__name__)

Unreadable = CorruptImageError | ImageReadError
"""Why there is no prediction for an image."""


@dataclass
class ImagePredictor(Predictor):
    """A model with an adapter, ready for images.

    Attributes:
        model: the model, on `device` and in evaluation mode.
        transform: how an image becomes its input.
        classes: names of the classes, one for each output.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
        several_labels: whether each class has a probability of its own, because an image may have several.
    """

    kind: ClassVar[type[Answer]] = Prediction
    all_or_nothing: ClassVar[tuple[type[Exception], ...]] = (CorruptImageError, ImageReadError)

    model: VisionMamba
    transform: Transform
    classes: list[str]
    device: torch.device
    backend: str = "auto"
    several_labels: bool = False

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images -> (B, C) fp32 logits on the CPU."""
        with use_backend(self.backend):
            logits: Tensor = self.model(images.to(self.device))
        return logits.float().cpu()

    def predict(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        top_k: int = 3,
        batch_size: int = 32,
        on_corrupt: Callable[[Unreadable], None] | None = None,
    ) -> Iterator[Prediction]:
        """Classify image files, in order.

        Args:
            paths: image files.
            top_k: classes per image; all of them if there are fewer.
            batch_size: images that go through the model together.
            on_corrupt: called for an image that cannot be decoded or read, which is then left out.

        Raises:
            CorruptImageError: an image cannot be decoded, and `on_corrupt` is None.
            ImageReadError: the system cannot read one, and `on_corrupt` is None.
            ValueError: `top_k` or `batch_size` is no whole number from 1 on, or the model's outputs for an
                image are not finite.
        """
        check_counts(top_k=top_k, batch_size=batch_size)
        return self._predict([os.fspath(path) for path in paths], top_k, batch_size, on_corrupt)

    def _predict(
        self,
        paths: list[str],
        top_k: int,
        batch_size: int,
        on_corrupt: Callable[[Unreadable], None] | None,
    ) -> Iterator[Prediction]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(paths), batch_size):
                batch = paths[start : start + batch_size]
                inputs: list[tuple[str, Tensor]] = []
                for path, image in zip(batch, pool.map(self._read, batch), strict=True):
                    if isinstance(image, Tensor):
                        inputs.append((path, image))
                    elif on_corrupt is None:
                        raise image
                    else:
                        on_corrupt(image)
                if inputs:
                    yield from self._classify(inputs, top_k)

    def _read(self, path: str) -> Tensor | Unreadable:
        try:
            return self.transform(load_image(path))
        except (CorruptImageError, ImageReadError) as error:
            return error

    def _classify(self, inputs: list[tuple[str, Tensor]], top_k: int) -> Iterator[Prediction]:
        logits = self.logits(torch.stack([image for _, image in inputs]))
        for (path, _), finite in zip(inputs, logits.isfinite().all(dim=1).tolist(), strict=True):
            if not finite:
                raise ValueError(
                    f"the model's outputs for {quote(path)} are not finite: the adapter or its base weights "
                    "are damaged or diverged; train again, or give other base weights with --checkpoint"
                )
        probabilities = logits.sigmoid() if self.several_labels else logits.softmax(dim=1)
        best = probabilities.topk(min(top_k, logits.shape[1]), dim=1)
        rows = zip(inputs, best.values.tolist(), best.indices.tolist(), strict=True)
        for (path, _), shares, indices in rows:
            yield Prediction(path, indices, [self.classes[i] for i in indices], shares)

    def answers(
        self, inputs: Sequence[Any], options: PredictOptions, leave_out: Callable[[LeftOut], None]
    ) -> Iterator[Prediction]:
        """Classify the images `inputs` for the command line; see `ImagePredictOptions.on_corrupt`."""
        assert isinstance(options, ImagePredictOptions)
        skips = options.on_corrupt == "skip"

        def note(error: Unreadable) -> None:
            leave_out(LeftOut(error.path, error.reason, skips and isinstance(error, CorruptImageError)))

        return self.predict(
            inputs,
            top_k=options.top_k,
            batch_size=options.batch_size,
            on_corrupt=None if options.on_corrupt == "error" else note,
        )


def build_base(info: AdapterInfo, checkpoint: str | Path | None = None) -> VisionMamba:
    """The model an adapter was trained on, without the adapter.

    Its weights are those of the file `checkpoint`; without it, the model's published weights or the random
    start that the run's seed repeats, whichever the run began with.

    Raises:
        ValueError: the adapter does not say which model it needs, or the weights are not to be had.
    """
    if not info.model:
        raise AdapterFileError(
            "the adapter file does not name its model; create the model yourself, then vimtune.load_adapter"
        )
    origin = Origin.of(info)
    name, options = info.model["name"], info.model["kwargs"]
    published = checkpoint is None and origin.pretrained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(origin.seed, "model"))
        model = create_listed_model(name, options, pretrained=published, error=AdapterFileError)
    return model if checkpoint is None else load_checkpoint(model, checkpoint, head=False)


def load_image_predictor(
    path: Path,
    *,
    checkpoint: Path | None,
    device: torch.device,
    backend: str,
    force: bool,
    several_labels: bool = False,
) -> ImagePredictor:
    """Build everything that an adapter file or a merged file describes.

    Args:
        path: the file.
        checkpoint: base weights of the adapter; those it was trained on if None.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
        force: use the adapter although the base weights differ from those that it was trained on.
        several_labels: whether an image may have several labels.

    Raises:
        ValueError: no such file, base weights that are missing or others than it was trained on, or parts
            that do not fit together.
    """
    if is_merged_file(path):
        if checkpoint is not None:
            raise ValueError(
                f"{quote(str(path))} is a merged file with weights of its own: drop --checkpoint"
            )
        model, merged = read_merged(path)
        classes, preprocessing = merged.classes, merged.preprocessing
    else:
        info = read_adapter_info(path)
        model = build_base(info, find_base(path, info) if checkpoint is None else checkpoint)
        load_trained(model, path, force)
        classes, preprocessing = info.classes, info.preprocessing
    return ImagePredictor(
        model=model.to(device).eval(),
        transform=_transform_for(model, preprocessing, path),
        classes=_classes_for(model, classes, path),
        device=device,
        backend=backend,
        several_labels=several_labels,
    )


def _transform_for(model: VisionMamba, config: dict[str, Any], path: Path) -> Transform:
    """The preprocessing that the file `path` states; the model's own if it states none."""
    own = model_preprocessing(model)
    size = tuple(own["img_size"])
    if not config:
        return build_transform(**own)
    transform = read_transform(config, f"preprocessing of {quote(str(path))}", AdapterFileError)
    if transform.img_size != size:
        raise AdapterFileError(
            f"{quote(str(path))} contradicts itself: images of {' x '.join(map(str, transform.img_size))} "
            f"pixels for a model that takes {' x '.join(map(str, size))}"
        )
    return transform


def _classes_for(model: VisionMamba, classes: list[str], path: Path) -> list[str]:
    """The class names that the file `path` states; numbers if it states none."""
    if model.num_classes < 1:
        raise AdapterFileError(f"{quote(str(path))} holds a model without a head: there are no classes")
    if classes and len(classes) != model.num_classes:
        raise AdapterFileError(
            f"{quote(str(path))} contradicts itself: {len(classes)} class names for a head of "
            f"{model.num_classes} outputs"
        )
    return classes or [str(index) for index in range(model.num_classes)]


def find_images(inputs: Sequence[Path]) -> list[Path]:
    """Image files among `inputs`; folders are searched as those of training data are, in sorted order.

    Raises:
        ValueError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in inputs:
        shown = quote(str(path))
        if path.is_dir():
            inside = images.find_images(path)
            left_out = images.describe_left_out(inside.left_out, path)
            if not inside.paths:
                also = f" It has {left_out}." if left_out else ""
                raise ValueError(f"no images in {shown}.{also} Image types: {' '.join(images.EXTENSIONS)}")
            if left_out:
                logger.warning("left out in %s: %s", shown, left_out)
            found += map(Path, inside.paths)
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"no such image or folder: {shown}")
    return found
