"""The command `embed`: images as vectors in a file, and which images of such a file are most like others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from vimtune.commands.predict import load_predictor
from vimtune.console import build_console, print_line
from vimtune.output import check_output
from vimtune.run_folder import adapter_path
from vimtune.runtime.device import resolve_device
from vimtune.tasks.answers import FORMATS as ANSWERS
from vimtune.tasks.answers import Neighbours, print_answers, write_answers
from vimtune.tasks.images.embeddings import FORMATS, Embeddings, read_embeddings
from vimtune.tasks.images.inputs import Unreadable, find_images
from vimtune.tasks.images.predictor import ImagePredictor, load_backbone
from vimtune.text import printable

logger = logging.getLogger(__name__)


def run_embed(
    *,
    inputs: Sequence[Path],
    adapter: Path | None,
    model: str | None,
    checkpoint: Path | None,
    among: Path | None,
    top_k: int,
    batch_size: int,
    outputs: Sequence[Path],
    device: str,
    backend: str,
    force: bool,
) -> int:
    """`vimtune embed`: write vectors, or find neighbours and print them. Returns the exit code.

    Args:
        inputs: images and folders of images.
        adapter: an adapter file, a run folder or a merged file, whose model makes the vectors.
        model: a registered model that does so without an adapter.
        checkpoint: weights of the one or the other.
        among: a file of vectors in which neighbours are searched; None to write vectors.
        top_k: how many neighbours each image gets.
        batch_size: images that go through the model together.
        outputs: .npz or .csv files for vectors, .csv or .json files for neighbours.
        device: where it computes.
        backend: scan backend, see `vimtune.ops`.
        force: use the adapter although base weights are others.

    Raises:
        ValueError: an input, the model or the adapter does not allow it, or a file cannot be written.
    """
    if (adapter is None) == (model is None):
        raise ValueError(
            "give either --adapter (adapter file, run folder or merged file) or --model (a model)"
        )
    if among is None and not outputs:
        raise ValueError(
            "give --output FILE.npz for the vectors, or --among FILE.npz to find neighbours there"
        )
    sources = [path for path in (*inputs, checkpoint, among) if path is not None]
    for output in outputs:
        check_output(output, FORMATS if among is None else ANSWERS, sources)
    known = None if among is None else read_embeddings(among)
    images = find_images(inputs)
    predictor = _open(adapter, model, checkpoint, device, backend, force)
    left_out: list[Unreadable] = []
    found = predictor.embed(images, batch_size=batch_size, on_corrupt=left_out.append)
    console = build_console(is_result=known is not None and not outputs)
    if known is None:
        for output in outputs:
            found.save(output)
    else:
        answers = _neighbours(known, found, top_k)
        for output in outputs:
            write_answers(output, answers, Neighbours)
        print_answers(answers, Neighbours, console)
    for output in outputs:
        what = f"{len(found)} vectors of {found.vectors.shape[1]} numbers" if known is None else "neighbours"
        print_line(console, f"{what} written to {output}")
    for error in left_out:
        logger.warning("left out %s: %s", printable(error.path), printable(error.reason))
    if left_out:
        logger.warning("%d of %d images could not be read", len(left_out), len(images))
    return 1 if left_out else 0


def _open(
    adapter: Path | None, model: str | None, checkpoint: Path | None, device: str, backend: str, force: bool
) -> ImagePredictor:
    if adapter is None:
        assert model is not None
        where = resolve_device(device)
        return load_backbone(model, checkpoint=checkpoint, device=where, backend=backend)
    predictor = load_predictor(
        adapter_path(adapter), checkpoint=checkpoint, device=device, backend=backend, force=force
    )
    if not isinstance(predictor, ImagePredictor):
        raise ValueError(f"--adapter {printable(str(adapter))} is one of texts, and embed is about images")
    return predictor


def _neighbours(known: Embeddings, found: Embeddings, top_k: int) -> list[Neighbours]:
    rows = zip(found.names, *(each.tolist() for each in known.nearest(found, top_k)), strict=True)
    answers = []
    for name, indices, cosines in rows:
        there = [index for index in indices if index >= 0]
        answers.append(Neighbours(name, [known.names[index] for index in there], cosines[: len(there)]))
    return answers
