"""Classify images with an adapter file, which knows model, head, class names and preprocessing.

A merged file (`vimtune merge`) serves as well. Shape letters: B batch, C classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vimtune.adapters import (
    AdapterFileError,
    AdapterInfo,
    base_hash,
    has_base,
    load_adapter,
    read_adapter_info,
)
from vimtune.data import (
    CorruptImageError,
    ImageReadError,
    Transform,
    build_transform,
    model_preprocessing,
    read_transform,
)
from vimtune.fields import options_of
from vimtune.models import MODELS, VisionMamba, create_listed_model, load_checkpoint
from vimtune.models.merged import is_merged_file, read_merged
from vimtune.ops import use_backend
from vimtune.runtime.seeds import derive_seed
from vimtune.tasks.answers import Answer, Prediction
from vimtune.tasks.components import PredictOptions
from vimtune.tasks.images.embeddings import Embeddings
from vimtune.tasks.images.inputs import Asked, Picture, Unreadable, asked_about, leave_out_of_folder
from vimtune.tasks.images.settings import ImagePredictOptions
from vimtune.tasks.origin import Origin, find_base
from vimtune.tasks.predictor import LeftOut, Predictor, check_counts
from vimtune.text import quote


@dataclass
class ImagePredictor(Predictor):
    """A model with an adapter, ready for images.

    Attributes:
        model: the model, on `device` and in evaluation mode.
        transform: how an image becomes its input.
        classes: names of the classes, one for each output.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
        origin: what the weights come from: files, and names of models or hashes of their weights.
    """

    kind: ClassVar[type[Answer]] = Prediction
    all_or_nothing: ClassVar[tuple[type[Exception], ...]] = (CorruptImageError, ImageReadError)

    model: VisionMamba
    transform: Transform
    classes: list[str]
    device: torch.device
    backend: str = "auto"
    origin: Sequence[str | Path] = ()

    @cached_property
    def digest(self) -> str:
        """Hash of what the weights come from, by which embeddings of another model are known."""
        found = hashlib.sha256()
        for part in self.origin:
            found.update(
                hashlib.sha256(part.encode() if isinstance(part, str) else part.read_bytes()).digest()
            )
        return found.hexdigest()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images -> (B, C) fp32 logits on the CPU."""
        with use_backend(self.backend):
            logits: Tensor = self.model(images.to(self.device))
        return logits.float().cpu()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images -> (B, D) fp32 features before the head, on the CPU."""
        with use_backend(self.backend):
            found: Any = self.model.forward_features(images.to(self.device))
            features: Tensor = self.model.forward_head(found, pre_logits=True)
        return features.float().cpu()

    def predict(
        self,
        inputs: Picture | Iterable[Picture],
        *,
        top_k: int = 3,
        batch_size: int = 32,
        temperature: float = 1.0,
        on_corrupt: Callable[[Unreadable], None] | None = None,
    ) -> Iterator[Prediction]:
        """Classify images, in order.

        Args:
            inputs: one image or several: paths of files, of folders, whose images are classified in sorted
                order, bytes, open binary files, images of Pillow, arrays (see `Picture`). What has no path is
                called by its place, such as "inputs[2]".
            top_k: classes per image; all of them if there are fewer.
            batch_size: images that go through the model together.
            temperature: what the logits are divided by, such as the one that `vimtune.evaluate` fits.
            on_corrupt: called for an image that cannot be decoded or read, which is then left out. None
                leaves out those of folders, with a warning.

        Raises:
            CorruptImageError: an image that was named by itself cannot be decoded, and `on_corrupt` is None.
            ImageReadError: the system cannot read one, likewise.
            ValueError: an input that is no picture, `top_k` or `batch_size` is no whole number from 1 on,
                `temperature` is not above 0, or the model's outputs for an image are not finite.
        """
        check_counts(top_k=top_k, batch_size=batch_size)
        read = self._read(asked_about(inputs), batch_size, on_corrupt)
        batches = self._judge(read, PredictOptions(temperature=temperature).temperature)
        return (answer for names, found in batches for answer in self._rank(names, found, top_k))

    def embed(
        self,
        inputs: Picture | Iterable[Picture],
        *,
        batch_size: int = 32,
        on_corrupt: Callable[[Unreadable], None] | None = None,
    ) -> Embeddings:
        """The features of images before the head of the model; arguments and errors as for `predict`."""
        check_counts(batch_size=batch_size)
        names: list[str] = []
        found: list[Tensor] = []
        for batch in self._read(asked_about(inputs), batch_size, on_corrupt):
            found.append(self.features(torch.stack([image for _, image in batch])))
            names += [name for name, _ in batch]
            _demand_finite(found[-1], names[-len(batch) :])
        vectors = torch.cat(found) if found else torch.zeros(0, self.model.num_features)
        return Embeddings(names, vectors.numpy(), self.digest)

    def _read(
        self, asked: list[Asked], batch_size: int, on_corrupt: Callable[[Unreadable], None] | None
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Batches of the images that can be read, as inputs of the model with their names."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(asked), batch_size):
                batch = asked[start : start + batch_size]
                inputs: list[tuple[str, Tensor]] = []
                for each, image in zip(batch, pool.map(self._prepare, batch), strict=True):
                    if isinstance(image, Tensor):
                        inputs.append((each.name, image))
                    elif on_corrupt is None:
                        leave_out_of_folder(each, image)
                    else:
                        on_corrupt(image)
                if inputs:
                    yield inputs

    def _prepare(self, asked: Asked) -> Tensor | Unreadable:
        image = asked.read()
        return image if isinstance(image, Exception) else self.transform(image)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, C) -> probabilities (B, C), which are 1 together, because an image has one class."""
        return logits.softmax(dim=1)

    def _judge(
        self, batches: Iterable[list[tuple[str, Tensor]]], temperature: float
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Names and probabilities (B, C) of the images of each batch, whose logits `temperature` divides."""
        for batch in batches:
            names = [name for name, _ in batch]
            logits = self.logits(torch.stack([image for _, image in batch]))
            _demand_finite(logits, names)
            yield names, self.probabilities(logits / temperature)

    def _rank(self, names: Sequence[str], probabilities: Tensor, top_k: int) -> Iterator[Prediction]:
        """The most probable classes of each image of a batch, from probabilities (B, C)."""
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        for name, shares, indices in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
            yield Prediction(name, indices, [self.classes[i] for i in indices], shares)

    def answers(
        self, inputs: Sequence[Any], options: PredictOptions, leave_out: Callable[[LeftOut], None]
    ) -> Iterator[Prediction]:
        """Classify the images `inputs` for the command line; see `ImagePredictOptions.on_corrupt`."""
        assert isinstance(options, ImagePredictOptions)
        skips = options.on_corrupt == "skip"
        others = {name: getattr(options, name) for name in options_of(type(options)) if name != "on_corrupt"}

        def note(error: Unreadable) -> None:
            leave_out(LeftOut(error.path, error.reason, skips and isinstance(error, CorruptImageError)))

        return self.predict(inputs, on_corrupt=None if options.on_corrupt == "error" else note, **others)


def _demand_finite(outputs: Tensor, names: Sequence[str]) -> None:
    """Raise ValueError, with the name of the image, if outputs of the model (B, ...) are not finite."""
    for name, finite in zip(names, outputs.isfinite().all(dim=1).tolist(), strict=True):
        if not finite:
            raise ValueError(
                f"the model's outputs for {quote(name)} are not finite: the adapter or its base weights "
                "are damaged or diverged; train again, or give other base weights with --checkpoint"
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


def open_trained(
    path: Path, checkpoint: str | Path | None, force: bool
) -> tuple[VisionMamba, list[str], dict[str, Any]]:
    """The model of an adapter file or a merged file, and the classes and the preprocessing that it states.

    Args:
        path: the file.
        checkpoint: base weights of the adapter; None for those of its model. A merged file has its own.
        force: use the adapter although the base weights differ from those that it was trained on.

    Raises:
        ValueError: no such file, or weights that do not fit.
    """
    if is_merged_file(path):
        if checkpoint is not None:
            raise ValueError(
                f"{quote(str(path))} is a merged file with weights of its own: drop --checkpoint"
            )
        model, merged = read_merged(path)
        return model, merged.classes, merged.preprocessing
    info = read_adapter_info(path)
    model = build_base(info, checkpoint)
    load_adapter(model, path, force=force)
    return model, info.classes, info.preprocessing


def load_image_predictor(
    path: Path,
    *,
    checkpoint: Path | None,
    device: torch.device,
    backend: str,
    force: bool,
    kind: type[ImagePredictor] = ImagePredictor,
) -> ImagePredictor:
    """Build everything that an adapter file or a merged file describes.

    Args:
        path: the file.
        checkpoint: base weights of the adapter; those it was trained on if None.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
        force: use the adapter although the base weights differ from those that it was trained on.
        kind: what answers with the model, an `ImagePredictor` that takes the same fields.

    Raises:
        ValueError: no such file, base weights that are missing or others than it was trained on, or parts
            that do not fit together.
    """
    if not is_merged_file(path) and checkpoint is None:
        checkpoint = find_base(path, read_adapter_info(path))
    model, classes, preprocessing = open_trained(path, checkpoint, force)
    origin: list[str | Path] = [path]
    if force and not is_merged_file(path) and not _has_its_base(model, path):
        origin.append(base_hash(model))  # The file says nothing of these weights, and vectors depend on them.
    return kind(
        model=model.to(device).eval(),
        transform=transform_for(model, preprocessing, path),
        classes=_classes_for(model, classes, path),
        device=device,
        backend=backend,
        origin=origin,
    )


def _has_its_base(model: VisionMamba, adapter: Path) -> bool:
    """Whether the weights below the adapter of a model are those that its file was trained on."""
    info = read_adapter_info(adapter)
    return has_base(model, info.base_hash, info.base_origin)


def transform_for(model: VisionMamba, config: dict[str, Any], path: Path) -> Transform:
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


def load_backbone(
    name: str, *, checkpoint: Path | None, device: torch.device, backend: str
) -> ImagePredictor:
    """A model without any adapter, for its features.

    Args:
        name: a registered model.
        checkpoint: its weights; those that are published for it if None.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.

    Raises:
        ValueError: no such model, or its weights are not to be had.
    """
    model: VisionMamba = create_listed_model(MODELS.parse(name), {}, pretrained=checkpoint is None)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, head=False)
    return ImagePredictor(
        model=model.to(device).eval(),
        transform=build_transform(**model_preprocessing(model)),
        classes=[str(index) for index in range(model.num_classes)],
        device=device,
        backend=backend,
        origin=[name] if checkpoint is None else [name, checkpoint],
    )
