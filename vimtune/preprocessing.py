"""How images become a model's input: the settings, and their schema in files.

What the settings do is written in `vimtune.data.transforms`; files of several kinds hold them, so the schema
stands apart. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vimtune.schema import STRICT
from vimtune.text import quote, suggest

PRESETS = ("none", "light", "medium", "strong")
"""Strengths of augmentation."""
LIBRARIES = ("albumentations", "torchvision")
"""Libraries that can draw and apply the augmentation."""
CROP_MODES = ("center", "squash", "center_rounded")
"""Ways in which the size before the evaluation crop is computed."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
"""Filters with which images are resized."""
MAX_SIDE = 8192
"""Largest height and width of a model's input, in pixels."""
_LARGEST = 1e6
"""Largest mean and standard deviation; the smallest standard deviation is one over this."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes a model's input: the settings of a `Transform`, and their schema in files.

    The fields are the arguments of `build_transform`. Files written before there were crop modes have no
    `crop_mode`: they mean "squash" where `crop_pct` is 1, else "center_rounded".
    """

    __pydantic_config__ = STRICT

    preset: str = "none"
    img_size: list[int] = dataclasses.field(default_factory=lambda: [224, 224])
    mean: list[float] = dataclasses.field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = dataclasses.field(default_factory=lambda: [0.229, 0.224, 0.225])
    train: bool = False
    crop_pct: float = 0.875
    crop_mode: str | None = None
    interpolation: str = "bicubic"
    library: str = "albumentations"

    def __post_init__(self) -> None:
        crop_mode = self.crop_mode
        if crop_mode is None:
            crop_mode = "squash" if self.crop_pct == 1 else "center_rounded"
            object.__setattr__(self, "crop_mode", crop_mode)
        for what, value, known in (
            ("augmentation preset", self.preset, PRESETS),
            ("transform library", self.library, LIBRARIES),
            ("crop mode", crop_mode, CROP_MODES),
            ("interpolation", self.interpolation, INTERPOLATIONS),
        ):
            if value not in known:
                raise ValueError(
                    f"unknown {what} {quote(value)}; choose from {', '.join(known)}.{suggest(value, known)}"
                )
        if len(self.img_size) != 2 or not all(1 <= side <= MAX_SIDE for side in self.img_size):
            raise ValueError(
                f"img_size={quote(self.img_size)} must be two numbers (height, width) from 1 to {MAX_SIDE}."
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct} must lie in (0, 1].")
        if (
            not len(self.mean) == len(self.std) == 3
            or not all(abs(value) <= _LARGEST for value in self.mean)
            or not all(1 / _LARGEST <= value <= _LARGEST for value in self.std)
        ):
            raise ValueError(
                f"mean={quote(self.mean)} and std={quote(self.std)} must be 3 finite numbers each, "
                "std positive."
            )
