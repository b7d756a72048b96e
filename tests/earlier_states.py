"""What earlier versions did: states that did not hold all options of a method, and other pixels."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def forget_options(checkpoint: Path) -> None:
    """Make of a state one whose recipe states no option in `peft_kwargs`, and which does not hold any."""
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    recipe = json.dumps(json.loads(metadata["recipe"]) | {"peft_kwargs": {}})
    facts = json.dumps(json.loads(metadata["facts"]) | {"methods": {}})
    save_file(load_file(checkpoint), checkpoint, {**metadata, "recipe": recipe, "facts": facts})


def resize_by_opencv(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize a bicubic random crop as albumentations did it before it was left to `resize_pixels`."""
    assert interpolation == "bicubic"
    shrinks = pixels.shape[0] > size[0] or pixels.shape[1] > size[1]
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
