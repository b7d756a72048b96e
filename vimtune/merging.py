"""`vimtune merge`: fold an adapter into its base weights and prove that nothing changed.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vimtune
from vimtune import parsers
from vimtune.adapters import read_adapter_info
from vimtune.console import build_console, print_line
from vimtune.merged import MergedInfo, is_merged_file, read_merged, read_merged_info, write_merged
from vimtune.models import create_listed_model
from vimtune.ops import use_backend
from vimtune.origin import adapter_path, find_base
from vimtune.output import OutputError, check_output, write_output
from vimtune.tasks.images.predictor import load_image_predictor
from vimtune.text import quote
from vimtune.training.distributed import resolve_device

TOLERANCE = 1e-3
"""Largest logit error that fp32 rounding explains, relative to the largest logit."""


class MergeError(ValueError):
    """The merged model does not compute what base and adapter compute."""


@dataclass(frozen=True)
class MergeProof:
    """Logits before and after, on a batch of random images.

    Attributes:
        max_error: largest absolute difference of two logits.
        max_logit: largest absolute logit before merging.
        num_images: images in the batch.
    """

    max_error: float
    max_logit: float
    num_images: int

    @property
    def holds(self) -> bool:
        """Whether the error is within what rounding explains."""
        return self.max_error <= TOLERANCE * max(self.max_logit, 1.0)


def merge_to_file(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str = "auto",
    backend: str = "auto",
    num_images: int = 8,
    force: bool = False,
) -> MergeProof:
    """Write the merged weights as plain safetensors and check the file that was written.

    The file (see `vimtune.merged`) is read back into a fresh model without adapters and has to give the
    logits of base plus adapter on `num_images` random images; otherwise no file is left behind. With
    `force` the adapter is merged although the base weights differ from those that it was trained on.

    Raises:
        ValueError: the adapter cannot be loaded, or `output` cannot be a weights file.
        MergeError: the logits differ by more than rounding explains.
    """
    path, output = adapter_path(adapter), Path(parsers.path(output))
    if is_merged_file(path):
        raise ValueError(f"{quote(str(path))} is merged already: there is no adapter in it")
    info = read_adapter_info(path)
    base = find_base(path, info) if checkpoint is None else Path(parsers.path(checkpoint))
    check_output(output, (".safetensors",), [path] if base is None else [path, base])
    if not _is_utf8(output.absolute()):
        raise OutputError(
            f"cannot write {quote(str(output))}: its path is not UTF-8, as safetensors needs it"
        )
    predictor = load_image_predictor(
        path, checkpoint=base, device=resolve_device(device), backend=backend, force=force
    )
    generator = torch.Generator().manual_seed(0)
    config: Any = predictor.model.pretrained_cfg
    shape = (num_images, config["input_size"][0], *predictor.transform.img_size)
    images = torch.randn(shape, generator=generator)
    expected = predictor.logits(images)
    merged: Any = vimtune.merge(predictor.model)
    written = MergedInfo(
        model=info.model["name"],
        options={**merged.creation["kwargs"], "num_classes": merged.num_classes},
        classes=info.classes,
        preprocessing=predictor.transform.config,
    )
    proofs: list[MergeProof] = []

    def write(temporary: Path) -> None:
        write_merged(temporary, merged.state_dict(), written)
        fresh, _ = read_merged(temporary)
        proofs.append(_prove(fresh.to(predictor.device).eval(), images, expected, backend))
        if not proofs[0].holds:
            raise MergeError(
                f"the merged model differs: maximum logit error {proofs[0].max_error:.1e} at logits up to "
                f"{proofs[0].max_logit:.1f}; nothing was written"
            )

    write_output(output, write)
    return proofs[0]


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@torch.no_grad()
def _prove(model: nn.Module, images: Tensor, expected: Tensor, backend: str) -> MergeProof:
    """Compare `model` on `images` (B, 3, H, W) with the `expected` logits (B, C)."""
    device = next(model.parameters()).device
    with use_backend(backend):
        found = model(images.to(device)).float().cpu()
    error = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    return MergeProof(error, expected.abs().max().item(), len(images))


def loading_code(path: Path, info: MergedInfo) -> str:
    """Python that loads a merged file as a plain model, with timm's own loader."""
    with torch.device("meta"):  # Only the options are of interest.
        usual = create_listed_model(info.model, {}).creation["kwargs"]
    options = {
        name: value for name, value in info.options.items() if name not in usual or value != usual[name]
    }
    arguments = {"checkpoint_path": str(path), **options}
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"import timm, vimtune\nmodel = timm.create_model({info.model!r}, {shown})"


def run_merge(
    *, adapter: Path, output: Path, checkpoint: Path | None, device: str, backend: str, force: bool
) -> int:
    """`vimtune merge`: write the file, print the proof. Returns the exit code."""
    proof = merge_to_file(adapter, output, checkpoint=checkpoint, device=device, backend=backend, force=force)
    info, merged = read_adapter_info(adapter_path(adapter)), read_merged_info(output)
    console = build_console()
    print_line(console, f"{merged.model} with {info.method} merged into {output}")
    print_line(
        console,
        f"maximum logit error {proof.max_error:.1e} on {proof.num_images} replayed images "
        f"(largest logit {proof.max_logit:.1f}), file against base + adapter",
    )
    print_line(console, "load it with:")
    for line in loading_code(output, merged).splitlines():
        print_line(console, f"    {line}", wrap=False)
    return 0
