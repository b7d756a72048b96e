"""Adapter files as training leaves them, and photos for them; shared by the tests of predict and merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vimtune
from vimtune.adapters import adapter_parameters
from vimtune.data import build_transform, model_preprocessing
from vimtune.recipe import Recipe
from vimtune.tasks.images.job import build_model

SPECIES = 5


def make_adapter(path: Path, scale: float = 0.1, **values) -> torch.nn.Module:
    """Adapter and recipe as a training run leaves them, moved away from its start; returns the model."""
    recipe = Recipe(**{"model": "test_vim", "pretrained": False, "peft": "lora", **values})
    model = build_model(recipe, SPECIES).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for entry in adapter_parameters(model):
            entry.parameter.add_(scale * torch.randn(entry.parameter.shape, generator=generator))
    transform = build_transform("none", **model_preprocessing(model))
    vimtune.save_adapter(
        model,
        path,
        classes=[f"species {index}" for index in range(SPECIES)],
        preprocessing=transform.config,
        extra={"recipe": recipe.to_share()},
    )
    recipe.save(path.with_name("recipe.yaml"))
    return model


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what an adapter file says about itself, as somebody else could."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    info = json.loads(metadata["info"])
    change(info)
    save_file(load_file(path), path, metadata={**metadata, "info": json.dumps(info)})


def write_photos(folder: Path) -> list[Path]:
    """Images of noise with large shapes, none of them square."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, size in enumerate([(90, 120), (61, 40), (200, 70)]):
        coarse = np.random.default_rng(number).integers(0, 255, (7, 9, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(paths[-1])
    return paths
