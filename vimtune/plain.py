"""`vimtune merge`: fold an adapter into its base weights and prove that nothing changed.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vimtune
from vimtune.adapters import read_adapter_info
from vimtune.models import create_listed_model
from vimtune.ops import use_backend
from vimtune.predict import adapter_path, load_predictor
from vimtune.utils import atomic_write

TOLERANCE = 1e-3
"""Largest logit error that fp32 rounding explains, relative to the largest logit."""


class MergeError(ValueError):
    """The merged model does not compute what base and adapter compute."""


@dataclass(frozen=True)
class MergeProof:
    """Logits before and after, on a batch of random images."""

    max_error: float
    max_logit: float
    num_images: int

    @property
    def holds(self) -> bool:
        return self.max_error <= TOLERANCE * max(self.max_logit, 1.0)


def merge_to_file(
    adapter: Path,
    output: Path,
    *,
    checkpoint: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    num_images: int = 8,
    force: bool = False,
) -> MergeProof:
    """Write the merged weights as plain safetensors and check the file that was written.

    The file is read back into a fresh model without adapters and has to give the logits of base
    plus adapter on `num_images` random images; otherwise no file is left behind. Its metadata hold
    model name, class names and preprocessing as JSON. With `force` the adapter is merged although the base
    weights differ from those that it was trained on.

    Raises:
        ValueError: the adapter cannot be loaded, or `output` cannot be a weights file.
        MergeError: the logits differ by more than rounding explains.
    """
    path = adapter_path(adapter)
    if output.suffix != ".safetensors":
        raise ValueError(f"cannot write {output}: expected a name ending in .safetensors")
    inputs = [path] if checkpoint is None else [path, Path(checkpoint)]
    if any(output.resolve() == source.resolve() for source in inputs):
        raise ValueError(f"{output} is read as input; choose another --output")
    info = read_adapter_info(path)
    predictor = load_predictor(path, checkpoint=checkpoint, device=device, backend=backend, force=force)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, *predictor.transform.img_size, generator=generator)
    expected = predictor.logits(images)

    merged = vimtune.merge(predictor.model)
    tensors = {name: value.detach().cpu().contiguous() for name, value in merged.state_dict().items()}
    fresh = create_listed_model(info.model["name"], {**info.model["kwargs"], "num_classes": info.num_classes})
    metadata = {
        "format": "pt",
        "model": info.model["name"],
        "options": json.dumps(fresh.options),
        "classes": json.dumps(info.classes, ensure_ascii=False),
        "preprocessing": json.dumps(info.preprocessing),
    }
    proofs: list[MergeProof] = []

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=metadata)
        fresh.load_state_dict(load_file(temporary))
        proofs.append(_prove(fresh.to(predictor.device).eval(), images, expected, backend))
        if not proofs[0].holds:
            raise MergeError(
                f"the merged model differs: maximum logit error {proofs[0].max_error:.1e} at logits up to "
                f"{proofs[0].max_logit:.1f}; nothing was written"
            )

    atomic_write(output, write)
    return proofs[0]


@torch.no_grad()
def _prove(model: nn.Module, images: Tensor, expected: Tensor, backend: str) -> MergeProof:
    """Compare `model` on `images` (B, 3, H, W) with the `expected` logits (B, C)."""
    device = next(model.parameters()).device
    with use_backend(backend):
        found = model(images.to(device)).float().cpu()
    error = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    return MergeProof(error, expected.abs().max().item(), len(images))


def run_merge(
    *, adapter: Path, output: Path, checkpoint: str | None, device: str, backend: str, force: bool
) -> int:
    """`vimtune merge`: write the file, print the proof. Returns the exit code."""
    proof = merge_to_file(adapter, output, checkpoint=checkpoint, device=device, backend=backend, force=force)
    info = read_adapter_info(adapter_path(adapter))
    console = Console(highlight=False, markup=False)
    console.print(f"{info.model['name']} with {info.method} merged into {output}", soft_wrap=True)
    console.print(
        f"maximum logit error {proof.max_error:.1e} on {proof.num_images} replayed images "
        f"(largest logit {proof.max_logit:.1f}), file against base + adapter",
        soft_wrap=True,
    )
    console.print(
        f'load it with: timm.create_model("{info.model["name"]}", num_classes={info.num_classes}, '
        f'checkpoint_path="{output}")',
        soft_wrap=True,
    )
    return 0
