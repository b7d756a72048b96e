"""Classify images with an adapter file, which knows model, head, class names and preprocessing.

    predictor = load_predictor("runs/my-run/adapter.safetensors")
    for prediction in predictor.predict(["flower.jpg"], top_k=3):
        print(prediction.path, prediction.classes[0], prediction.probabilities[0])

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vimtune
from vimtune.adapters import AdapterFileError, AdapterInfo, read_adapter_info
from vimtune.data import CorruptImageError, Transform, build_transform, images, load_image
from vimtune.models import VisionMamba, load_checkpoint
from vimtune.ops import use_backend
from vimtune.train.distributed import resolve_device
from vimtune.train.settings import derive_seed
from vimtune.utils import atomic_write, suggest

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 40
"""Rows of the printed table; the files written hold all of them."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    path: str
    indices: list[int]
    classes: list[str]
    probabilities: list[float]


@dataclass
class Predictor:
    """A model with an adapter, ready for images."""

    model: nn.Module
    transform: Transform
    classes: list[str]
    device: torch.device
    backend: str = "auto"

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed images -> (B, C) fp32 logits on the CPU."""
        with use_backend(self.backend):
            return self.model(images.to(self.device)).float().cpu()

    def predict(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        top_k: int = 3,
        batch_size: int = 32,
        on_corrupt: Callable[[CorruptImageError], None] | None = None,
    ) -> Iterator[Prediction]:
        """Classify image files, in order.

        Args:
            paths: image files.
            top_k: classes per image; all of them if there are fewer.
            batch_size: images that go through the model together.
            on_corrupt: called for an unreadable image, which is then left out.

        Raises:
            CorruptImageError: an image cannot be read and `on_corrupt` is None.
            ValueError: `top_k` or `batch_size` below 1.
        """
        for name, value in {"top_k": top_k, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: expected a whole number >= 1")
        return self._predict([os.fspath(path) for path in paths], top_k, batch_size, on_corrupt)

    def _predict(
        self,
        paths: list[str],
        top_k: int,
        batch_size: int,
        on_corrupt: Callable[[CorruptImageError], None] | None,
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

    def _read(self, path: str) -> Tensor | CorruptImageError:
        try:
            return self.transform(load_image(path))
        except CorruptImageError as error:
            return error

    def _classify(self, inputs: list[tuple[str, Tensor]], top_k: int) -> Iterator[Prediction]:
        logits = self.logits(torch.stack([image for _, image in inputs]))
        best = logits.softmax(dim=1).topk(min(top_k, logits.shape[1]), dim=1)
        rows = zip(inputs, best.values.tolist(), best.indices.tolist(), strict=True)
        for (path, _), probabilities, indices in rows:
            yield Prediction(path, indices, [self.classes[i] for i in indices], probabilities)


# ---------------------------------------------------------------------------------------------
# From an adapter file to a model


def adapter_path(path: Path) -> Path:
    """The adapter file that `path` means: a file, or the one in a run folder."""
    return path / "adapter.safetensors" if path.is_dir() else path


def build_base(info: AdapterInfo, checkpoint: str | None = None) -> VisionMamba:
    """The model an adapter was trained on, without the adapter.

    Its weights are those of `checkpoint` if given, else those the training run started from: a
    file, the model's published weights, or a random start that the run's seed repeats.

    Raises:
        ValueError: the adapter does not say which model it needs, or the weights are not to be had.
    """
    if not info.model:
        raise AdapterFileError(
            "the adapter file does not name its model; create the model yourself, then vimtune.load_adapter"
        )
    name, options = info.model["name"], info.model["kwargs"]
    recipe: dict[str, Any] = info.extra.get("recipe", {})
    checkpoint = checkpoint or recipe.get("checkpoint")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise AdapterFileError(
            f"the base weights {checkpoint!r} are not there; give their present place with --checkpoint"
        )
    published = checkpoint is None and recipe.get("pretrained", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.get("seed", 0), "model"))
        model = timm.create_model(name, pretrained=published, **options)
    assert isinstance(model, VisionMamba), "every model that an adapter file names is one of ours"
    return model if checkpoint is None else load_checkpoint(model, checkpoint)


def load_predictor(
    adapter: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    device: str = "auto",
    backend: str = "auto",
) -> Predictor:
    """Build everything that an adapter file (or run folder) describes.

    Raises:
        ValueError: no adapter file, base weights that are missing or others than it was trained on,
            or a device or backend that is not there.
    """
    path = adapter_path(Path(adapter))
    info = read_adapter_info(path)
    where = resolve_device(device)
    model = build_base(info, checkpoint)
    try:
        vimtune.load_adapter(model, path)
    except AdapterFileError as error:
        raise AdapterFileError(f"{error} (on the command line: --checkpoint)") from error
    return Predictor(
        model=model.to(where).eval(),
        transform=build_transform(**info.preprocessing),
        classes=info.classes or [str(index) for index in range(info.num_classes)],
        device=where,
        backend=backend,
    )


def find_images(inputs: Sequence[Path]) -> list[Path]:
    """Image files among `inputs`, folders searched with all their subfolders, in sorted order.

    Raises:
        ValueError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = images.find_images(path).paths
            if not inside:
                raise ValueError(f"no images in {path}; image types are {' '.join(images.EXTENSIONS)}")
            found += map(Path, inside)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"no such image or folder: {path}")
    return found


# ---------------------------------------------------------------------------------------------
# Output


def to_csv(predictions: Sequence[Prediction]) -> str:
    """One row per image: path, class1, probability1, class2, probability2, ..."""
    ranks = range(1, max((len(p.classes) for p in predictions), default=0) + 1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *(f"{name}{rank}" for rank in ranks for name in ("class", "probability"))])
    for p in predictions:
        pairs = zip(p.classes, p.probabilities, strict=True)
        writer.writerow([p.path, *(cell for name, value in pairs for cell in (name, f"{value:.6f}"))])
    return text.getvalue()


def to_json(predictions: Sequence[Prediction]) -> str:
    """A list of {"path", "predictions": [{"class", "index", "probability"}, ...]}."""
    rows = [
        {
            "path": p.path,
            "predictions": [
                {"class": name, "index": index, "probability": value}
                for name, index, value in zip(p.classes, p.indices, p.probabilities, strict=True)
            ],
        }
        for p in predictions
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


WRITERS: dict[str, Callable[[Sequence[Prediction]], str]] = {".csv": to_csv, ".json": to_json}


def _check_outputs(outputs: Sequence[Path]) -> None:
    for path in outputs:
        if path.suffix.lower() not in WRITERS:
            raise ValueError(f"cannot write {path}: expected a name ending in {' or '.join(WRITERS)}")
        folder = path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"cannot write {path}: {folder} is not a writable folder")


def _write(output: Path, predictions: Sequence[Prediction]) -> None:
    text = WRITERS[output.suffix.lower()](predictions)

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    atomic_write(output, write)


def _print_table(console: Console, predictions: Sequence[Prediction]) -> None:
    shown = predictions[:SHOWN_IMAGES]
    folder = (
        os.path.commonpath([os.path.abspath(os.path.dirname(p.path)) for p in shown])
        if len(shown) > 1
        else ""
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"image in {folder}" if folder else "image", overflow="fold")
    table.add_column("class")
    table.add_column("", justify="right")
    if any(len(p.classes) > 1 for p in shown):
        table.add_column("then")
    for p in shown:
        pairs = list(zip(p.classes, p.probabilities, strict=True))
        others = ", ".join(f"{name} {100 * value:.0f} %" for name, value in pairs[1:])
        first = [
            os.path.relpath(p.path, folder) if folder else p.path,
            pairs[0][0],
            f"{100 * pairs[0][1]:.1f} %",
        ]
        table.add_row(*first, *([others] if len(table.columns) > 3 else []))
    console.print(table)
    if len(predictions) > SHOWN_IMAGES:
        console.print(f"... and {len(predictions) - SHOWN_IMAGES} more images; --output writes all of them")


def run_predict(
    *,
    inputs: Sequence[Path],
    adapter: Path,
    checkpoint: str | None,
    outputs: Sequence[Path],
    top_k: int,
    batch_size: int,
    on_corrupt: str,
    device: str,
    backend: str,
) -> int:
    """`vimtune predict`: print a table, write the files asked for. Returns the exit code."""
    if on_corrupt not in ("error", "skip"):
        raise ValueError(
            f"--on-corrupt {on_corrupt}: expected error or skip.{suggest(on_corrupt, ['error', 'skip'])}"
        )
    _check_outputs(outputs)
    paths = find_images(inputs)
    predictor = load_predictor(adapter, checkpoint=checkpoint, device=device, backend=backend)
    skipped: list[CorruptImageError] = []
    predictions = list(
        predictor.predict(
            paths,
            top_k=top_k,
            batch_size=batch_size,
            on_corrupt=skipped.append if on_corrupt == "skip" else None,
        )
    )
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe or a file has room
    if predictions:
        _print_table(console, predictions)
    for error in skipped:
        logger.warning("skipped %s: %s", error.path, error.reason)
    for output in outputs:
        _write(output, predictions)
        console.print(f"{len(predictions)} predictions written to {output}", soft_wrap=True)
    return 0
