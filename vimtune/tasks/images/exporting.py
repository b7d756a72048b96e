"""Export a model of images, and check the file before it is kept.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimtune import adapters
from vimtune.adapters.folding import UnmergeableError
from vimtune.adapters.slots import base_parameters
from vimtune.data import build_transform, model_preprocessing
from vimtune.export.formats import FORMATS, About, format_of
from vimtune.models import MODELS, create_listed_model, load_checkpoint
from vimtune.models.checkpoint import CheckpointError, extract_state_dict, read_checkpoint
from vimtune.output import check_output, write_output
from vimtune.tasks.exporting import TOLERANCE, Exported, ExportError
from vimtune.tasks.images.predictor import ImagePredictor, load_image_predictor
from vimtune.tasks.merging import prove
from vimtune.text import quote

BATCHES = (1, 3)
"""Sizes of the batches of random images on which a file has to compute what the model does. It is traced with
another one."""
RUNS = 3
"""How often an image is timed; the shortest time counts, for whatever else the machine does adds to it."""

_CPU = torch.device("cpu")
_APPLIED = ("img_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
"""What of the preprocessing says how an image is prepared for evaluation."""


def export_images(source: Path, output: Path, base: Mapping[str, Any], force: bool, task: str) -> Exported:
    """Write the merged model, run the file, and keep it if it gives the model's logits.

    An adapter that cannot be merged becomes part of the graph.

    Args:
        source: an adapter file, a merged file, or a plain checkpoint whose model `base` names.
        output: the file, `.onnx` or `.pt2`.
        base: "checkpoint", the base weights of an adapter, or "model", the model of a plain checkpoint.
        force: use the adapter although the base weights differ from those that it was trained on.
        task: what the file says that the model was trained for.

    Raises:
        ValueError: the model cannot be loaded, `output` cannot be written, or a package is missing.
        MergeError: the merged model computes something else than base and adapter.
        ExportError: the file computes something else than the model.
    """
    checkpoint = base.get("checkpoint")
    check_output(output, tuple(FORMATS), [source] if checkpoint is None else [source, checkpoint])
    format = format_of(output)
    predictor = _open(source, base, force)
    model: Any = predictor.model
    shape = (model.pretrained_cfg["input_size"][0], *predictor.transform.img_size)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn((count, *shape), generator=generator) for count in BATCHES]
    adapted = torch.cat([predictor.logits(batch) for batch in images])
    left_beside = None
    try:
        adapters.merge(model)
    except UnmergeableError as error:
        left_beside = str(error).partition(";")[0]  # without the advice
    expected = torch.cat([predictor.logits(batch) for batch in images])
    inputs = f"{sum(BATCHES)} random images"
    prove(expected, adapted, inputs)
    seconds_before = _fastest(predictor.logits, images[0])
    name = MODELS.get(model.creation["name"]).architecture
    about = About(
        task=task,
        model=name,
        options={**model.creation["kwargs"], "num_classes": model.num_classes},
        classes=predictor.classes,
        preprocessing={key: predictor.transform.config[key] for key in _APPLIED},
    )
    results: list[Exported] = []

    def write(temporary: Path) -> None:
        format.write(model, shape, about, temporary)
        run = format.open(temporary)
        error = _largest_error(torch.cat([run(batch) for batch in images]), expected)
        exported = Exported(
            model=name,
            left_beside=left_beside,
            max_error=error,
            max_logit=expected.abs().max().item(),
            inputs=inputs,
            size=temporary.stat().st_size,
            weights=sum(4 * parameter.numel() for parameter in model.parameters()),
            seconds=_fastest(run, images[0]),
            seconds_before=seconds_before,
        )
        if not error <= TOLERANCE * max(exported.max_logit, 1.0):
            raise ExportError(
                f"the exported model differs: maximum logit error {error:.1e} at logits up to "
                f"{exported.max_logit:.1f}; nothing was written"
            )
        results.append(exported)

    write_output(output, write)
    return results[0]


def _open(source: Path, base: Mapping[str, Any], force: bool) -> ImagePredictor:
    """The model with its adapter and preprocessing, on the CPU.

    Raises:
        ValueError: it cannot be loaded.
    """
    if "model" not in base:
        checkpoint = base.get("checkpoint")
        return load_image_predictor(source, checkpoint=checkpoint, device=_CPU, backend="auto", force=force)
    if "checkpoint" in base:
        raise ValueError(
            f"{quote(str(source))} is taken for a plain checkpoint, because --model names its model: drop "
            "--checkpoint, or --model where it is an adapter"
        )
    model = _plain_model(source, base["model"])
    classes = [str(index) for index in range(model.num_classes)]
    transform = build_transform(**model_preprocessing(model))
    return ImagePredictor(model=model.eval(), transform=transform, classes=classes, device=_CPU)


def _plain_model(source: Path, name: str) -> Any:
    """The model of this name with the weights of a plain checkpoint, and with as many classes as they have.

    Raises:
        ValueError: no such model, or a checkpoint that does not fit or has no head.
    """
    usual = create_listed_model(name, {})
    weights = extract_state_dict(read_checkpoint(source), (path for path, _ in base_parameters(usual)))
    head = weights.get("head.weight")
    if head is None:
        raise CheckpointError(f"{quote(str(source))} holds a model without a head: there are no classes")
    return load_checkpoint(create_listed_model(name, {"num_classes": len(head)}), source)


def _largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference of logits (B, C); infinite if they are of other shapes or no numbers."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    return (found - expected).abs().max().item()


def _fastest(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Seconds that `run` takes for `images` at best."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return min(times)
