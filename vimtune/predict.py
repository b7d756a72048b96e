"""Classify images with an adapter file, which knows model, head, class names and preprocessing.

    predictor = load_predictor("runs/my-run/adapter.safetensors")
    for prediction in predictor.predict(["flower.jpg"], top_k=3):
        print(prediction.path, prediction.classes[0], prediction.probabilities[0])

A merged file (`vimtune merge`) serves as well.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Len
from torch import Tensor

import vimtune
from vimtune import parsers
from vimtune.adapters import AdapterFileError, AdapterInfo, read_adapter_info
from vimtune.console import build_console, print_line
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
from vimtune.output import check_output
from vimtune.results import FORMATS, Prediction, print_predictions, write_predictions
from vimtune.schema import STRICT, Count, check
from vimtune.strict_yaml import read_yaml
from vimtune.text import printable, quote
from vimtune.training.distributed import resolve_device
from vimtune.training.folder import RunFolder
from vimtune.training.settings import derive_seed
from vimtune.utils import suggest

logger = logging.getLogger(__name__)

Unreadable = CorruptImageError | ImageReadError
"""Why there is no prediction for an image."""

ON_CORRUPT = ("report", "skip", "error")
"""What `vimtune predict` does about corrupt images: it names them and classifies the others, and its exit
code is 1 (report) or 0 (skip); or it stops at the first one and writes nothing (error). The exit code is
never 0 when the system cannot read an image, for want of a permission say, or when no image is left."""


@dataclass
class Predictor:
    """A model with an adapter, ready for images.

    Attributes:
        model: the model, on `device` and in evaluation mode.
        transform: how an image becomes its input.
        classes: names of the classes, one for each output.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
    """

    model: VisionMamba
    transform: Transform
    classes: list[str]
    device: torch.device
    backend: str = "auto"

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
        _check_counts(top_k=top_k, batch_size=batch_size)
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
        best = logits.softmax(dim=1).topk(min(top_k, logits.shape[1]), dim=1)
        rows = zip(inputs, best.values.tolist(), best.indices.tolist(), strict=True)
        for (path, _), probabilities, indices in rows:
            yield Prediction(path, indices, [self.classes[i] for i in indices], probabilities)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {quote(value)}: expected a whole number >= 1")


# ---------------------------------------------------------------------------------------------
# From a file to a model


def adapter_path(path: str | os.PathLike[str]) -> Path:
    """The adapter file that `path` means: a file, or the one in a run folder; `~` is the home folder."""
    found = Path(parsers.path(path))
    return RunFolder(found).adapter if found.is_dir() else found


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Base weights of a training run: the fields of its recipe that say where they came from."""

    __pydantic_config__ = STRICT

    checkpoint: Annotated[str, Len(1, 4096)] | None = None
    """Name of the file; in older adapter files the path as it was given."""
    pretrained: bool = True
    """Whether the run began with the model's published weights, where it names no checkpoint."""
    seed: Count = 0
    """Seed of random weights, where it began with neither."""

    @classmethod
    def of(cls, info: AdapterInfo) -> Origin:
        """What an adapter file says.

        Raises:
            AdapterFileError: it says so in another form.
        """
        recipe = info.extra.get("recipe", {})
        names = {field.name for field in dataclasses.fields(cls)}
        if isinstance(recipe, dict):
            recipe = {name: value for name, value in recipe.items() if name in names}
        return check(cls, recipe, "the recipe in the adapter file", AdapterFileError)


def find_base(path: Path, info: AdapterInfo) -> Path | None:
    """The file of base weights that the adapter `path` was trained on; None if they came from no file.

    An adapter file may be passed on, so it has only the name of that file (older ones have the path). The
    recipe of the run, which lies beside the adapter in a run folder, has its place.

    Raises:
        AdapterFileError: the file is not there.
    """
    checkpoint = Origin.of(info).checkpoint
    if checkpoint is None:
        return None
    places = [Path(checkpoint)]
    recipe = RunFolder(path.parent).recipe
    if recipe.is_file():
        place = read_yaml(recipe).get("checkpoint")
        if isinstance(place, str) and Path(place).name == places[0].name:
            places.insert(0, Path(place))
    for place in places:
        if place.exists():
            return place
    raise AdapterFileError(
        f"the adapter was trained on the weights in {quote(places[0].name)}, and they are not at their "
        "former place; give their present place with --checkpoint"
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


def load_predictor(
    adapter: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str = "auto",
    backend: str = "auto",
    force: bool = False,
) -> Predictor:
    """Build everything that an adapter file (or run folder), or a merged file, describes.

    Args:
        adapter: the file, or the folder of a run.
        checkpoint: base weights of the adapter; those it was trained on if None.
        device: "auto", "cpu", "cuda", "cuda:<index>" or "mps".
        backend: scan backend, see `vimtune.ops`.
        force: use the adapter although the base weights differ from those that it was trained on.

    Raises:
        ValueError: no such file, base weights that are missing or others than it was trained on, parts that
            do not fit together, or a device or backend that is not there.
    """
    path = adapter_path(adapter)
    where = resolve_device(device)
    if is_merged_file(path):
        if checkpoint is not None:
            raise ValueError(
                f"{quote(str(path))} is a merged file with weights of its own: drop --checkpoint"
            )
        model, merged = read_merged(path)
        classes, preprocessing = merged.classes, merged.preprocessing
    else:
        info = read_adapter_info(path)
        model = build_base(
            info, find_base(path, info) if checkpoint is None else Path(parsers.path(checkpoint))
        )
        try:
            vimtune.load_adapter(model, path, force=force)
        except AdapterFileError as error:
            raise AdapterFileError(f"{error} (on the command line: --checkpoint, or --force)") from error
        classes, preprocessing = info.classes, info.preprocessing
    return Predictor(
        model=model.to(where).eval(),
        transform=_transform_for(model, preprocessing, path),
        classes=_classes_for(model, classes, path),
        device=where,
        backend=backend,
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


# ---------------------------------------------------------------------------------------------
# The command


def run_predict(
    *,
    inputs: Sequence[Path],
    adapter: Path,
    checkpoint: Path | None,
    outputs: Sequence[Path],
    top_k: int,
    batch_size: int,
    on_corrupt: str,
    device: str,
    backend: str,
    force: bool,
) -> int:
    """`vimtune predict`: write the files asked for, print a table. Returns the exit code (see `ON_CORRUPT`).

    The files come first, so that no trouble with the terminal can lose them. When the run is interrupted or
    fails between two images, they hold what is known by then.
    """
    if on_corrupt not in ON_CORRUPT:
        raise ValueError(
            f"--on-corrupt {quote(on_corrupt)}: expected {', '.join(ON_CORRUPT)}."
            f"{suggest(on_corrupt, ON_CORRUPT)}"
        )
    _check_counts(top_k=top_k, batch_size=batch_size)
    sources = [*inputs, adapter_path(adapter), *([] if checkpoint is None else [Path(checkpoint)])]
    for output in outputs:
        check_output(output, FORMATS, sources)
    paths = find_images(inputs)
    predictor = load_predictor(adapter, checkpoint=checkpoint, device=device, backend=backend, force=force)
    failed: list[Unreadable] = []
    predictions: list[Prediction] = []
    try:
        for prediction in predictor.predict(
            paths,
            top_k=top_k,
            batch_size=batch_size,
            on_corrupt=None if on_corrupt == "error" else failed.append,
        ):
            predictions.append(prediction)
    except BaseException as error:  # Ctrl-C is among these, too.
        if predictions and outputs and not isinstance(error, Unreadable):
            _write_all(outputs, predictions)
            logger.warning("stopped after %d of %d images; those are written", len(predictions), len(paths))
        raise
    _write_all(outputs, predictions)
    for failure in failed:
        logger.warning("left out %s: %s", printable(failure.path), printable(failure.reason))
    console = build_console(is_result=not outputs)
    print_predictions(predictions, console)
    for output in outputs:
        print_line(console, f"{len(predictions)} predictions written to {output}")
    if failed:
        logger.warning("%d of %d images could not be read", len(failed), len(paths))
    corrupt = all(isinstance(failure, CorruptImageError) for failure in failed)
    passed_over = on_corrupt == "skip" and corrupt and predictions
    return 1 if failed and not passed_over else 0


def _write_all(outputs: Sequence[Path], predictions: Sequence[Prediction]) -> None:
    for output in outputs:
        write_predictions(output, predictions)
