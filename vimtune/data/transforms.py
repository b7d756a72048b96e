"""Image preprocessing: one evaluation pipeline, three training presets in two libraries.

H, W: height and width of the model's input.

| preset | what a training image goes through |
|---|---|
| none   | the evaluation pipeline, no randomness |
| light  | crop of 60-100 % of the area, resize, horizontal flip, mild colour jitter with 80 % chance |
| strong | crop of 8-100 % of the area, resize, flip, two random operations as in RandAugment (magnitude |
|        | 9 of 30), and with 25 % chance a rectangle of 2-33 % of the area erased to the mean colour |

Evaluation, for both libraries the same code (Pillow, anti-aliased): resize so that the image covers
(H, W) / crop_pct with its aspect ratio kept, cut (H, W) from the middle; with crop_pct = 1 resize to (H, W)
directly. Then scale to [0, 1] and normalise with mean and std.

The two libraries draw different random numbers and resample differently in detail, so they agree in
distribution, not pixel by pixel.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vimtune.data.resize import resize_region
from vimtune.utils import suggest

PRESETS = ("none", "light", "strong")
LIBRARIES = ("albumentations", "torchvision")
_PILLOW_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_SCALE = {"light": (0.6, 1.0), "strong": (0.08, 1.0)}
_JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}
_JITTER_CHANCE = 0.8
_ERASE_CHANCE = 0.25

Augmentation = Callable[[Image.Image, int], np.ndarray]


class Transform:
    """Turns a PIL image into a normalised tensor. Made by `build_transform`.

    Attributes:
        config: the arguments of `build_transform` as plain values; `build_transform(**config)` rebuilds it.
    """

    def __init__(self, config: dict[str, Any], augment: Augmentation | None) -> None:
        self.config = config
        self.img_size: tuple[int, int] = (config["img_size"][0], config["img_size"][1])
        self._augment = augment
        self._mean = torch.tensor(config["mean"], dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(config["std"], dtype=torch.float32).view(3, 1, 1)

    def __call__(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        """Return a float32 tensor (3, H, W); a pure function of the image and `seed`."""
        if self._augment is None:
            pixels = _evaluation_crop(
                image, self.img_size, self.config["crop_pct"], _PILLOW_FILTERS[self.config["interpolation"]]
            )
        else:
            pixels = self._augment(image, seed)
        tensor = (
            torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        )
        return tensor.div_(255).sub_(self._mean).div_(self._std)

    def __repr__(self) -> str:
        return f"Transform({', '.join(f'{key}={value!r}' for key, value in self.config.items())})"


def build_transform(
    preset: str = "none",
    img_size: Sequence[int] = (224, 224),
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    *,
    train: bool = False,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    library: str = "albumentations",
) -> Transform:
    """Build the preprocessing of one split.

    Args:
        preset: "none", "light" or "strong" (see the table in this module's docstring).
        img_size: (H, W) of the result.
        mean, std: per RGB channel, of values in [0, 1].
        train: False gives the evaluation pipeline whatever the preset.
        crop_pct: share of the resized image that the evaluation crop keeps, in (0, 1].
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        library: who draws and applies the augmentation, "albumentations" or "torchvision".

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    for what, value, known in (
        ("augmentation preset", preset, PRESETS),
        ("transform library", library, LIBRARIES),
        ("interpolation", interpolation, tuple(_PILLOW_FILTERS)),
    ):
        if value not in known:
            raise ValueError(
                f"unknown {what} {value!r}; choose from {', '.join(known)}.{suggest(value, known)}"
            )
    if len(img_size) != 2 or min(img_size) < 1:
        raise ValueError(f"img_size={tuple(img_size)} must be two positive numbers (height, width).")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} must lie in (0, 1].")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean={tuple(mean)} and std={tuple(std)} must be 3 numbers each, std positive.")
    config: dict[str, Any] = {
        "preset": preset,
        "img_size": [int(side) for side in img_size],
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "train": bool(train),
        "crop_pct": float(crop_pct),
        "interpolation": interpolation,
        "library": library,
    }
    augment = None
    if train and preset != "none":
        build = _build_albumentations if library == "albumentations" else _build_torchvision
        augment = build(preset, (config["img_size"][0], config["img_size"][1]), config["mean"], interpolation)
    return Transform(config, augment)


def _evaluation_crop(
    image: Image.Image, img_size: tuple[int, int], crop_pct: float, resample: Image.Resampling
) -> np.ndarray:
    """Resize and centre-crop; returns uint8 (H, W, 3)."""
    height, width = img_size
    if crop_pct == 1.0:
        return _to_array(resize_region(image, (width, height), (0, 0, width, height), resample))
    cover_h, cover_w = round(height / crop_pct), round(width / crop_pct)
    if cover_h * image.width >= cover_w * image.height:
        new_w, new_h = cover_h * image.width // image.height, cover_h
    else:
        new_w, new_h = cover_w, cover_w * image.height // image.width
    left, top = round((new_w - width) / 2), round((new_h - height) / 2)
    region = (left, top, left + width, top + height)
    return _to_array(resize_region(image, (new_w, new_h), region, resample))


def _to_array(image: Image.Image) -> np.ndarray:
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # a writable copy


def _crop_ratio(img_size: tuple[int, int]) -> tuple[float, float]:
    """Aspect ratios (width / height) of random crops: within 3:4 and 4:3 of the result's own."""
    aspect = img_size[1] / img_size[0]
    return 3 / 4 * aspect, 4 / 3 * aspect


# --------------------------------------------------------------------------- albumentations


class _Albumentations:
    def __init__(self, compose: Any) -> None:
        self._compose = compose

    def __call__(self, image: Image.Image, seed: int) -> np.ndarray:
        # One pair of generators shared by all steps: Compose's own seeding would give every step the same
        # numbers, tying e.g. the flip to the crop.
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return np.ascontiguousarray(self._compose(image=_to_array(image))["image"])


def _import_albumentations() -> Any:
    """Import albumentations without its version check over the network; the environment stays as it was."""
    key = "NO_ALBUMENTATIONS_UPDATE"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        import albumentations
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
    return albumentations


def _build_albumentations(
    preset: str, img_size: tuple[int, int], mean: Sequence[float], interpolation: str
) -> Augmentation:
    A = _import_albumentations()
    import cv2

    flag = {
        "nearest": cv2.INTER_NEAREST,
        "bilinear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "lanczos": cv2.INTER_LANCZOS4,
    }[interpolation]
    fill = tuple(round(255 * value) for value in mean)
    steps = [
        A.RandomResizedCrop(
            size=img_size,
            scale=_CROP_SCALE[preset],
            ratio=_crop_ratio(img_size),
            interpolation=flag,
            area_for_downscale="image",  # OpenCV does not anti-alias otherwise, the evaluation pipeline does
        ),
        A.HorizontalFlip(p=0.5),
    ]
    if preset == "light":
        steps.append(A.ColorJitter(**_JITTER, p=_JITTER_CHANCE))
    else:
        warp = {"interpolation": cv2.INTER_LINEAR, "fill": fill, "p": 1.0}
        operations = [
            A.Affine(rotate=(-9, 9), **warp),
            A.Affine(shear={"x": (-5, 5), "y": (0, 0)}, **warp),
            A.Affine(shear={"x": (0, 0), "y": (-5, 5)}, **warp),
            A.Affine(translate_percent={"x": (-0.14, 0.14), "y": (0, 0)}, **warp),
            A.Affine(translate_percent={"x": (0, 0), "y": (-0.14, 0.14)}, **warp),
            A.ColorJitter(brightness=0.27, contrast=0, saturation=0, hue=0, p=1.0),
            A.ColorJitter(brightness=0, contrast=0.27, saturation=0, hue=0, p=1.0),
            A.ColorJitter(brightness=0, contrast=0, saturation=0.27, hue=0, p=1.0),
            A.Sharpen(alpha=(0.1, 0.3), lightness=(1.0, 1.0), p=1.0),
            A.Posterize(num_bits=6, p=1.0),
            A.Solarize(threshold_range=(0.7, 1.0), p=1.0),
            A.AutoContrast(p=1.0),
            A.Equalize(p=1.0),
            A.NoOp(p=1.0),
        ]
        steps.append(A.SomeOf(operations, n=2, replace=True, p=1.0))
        steps.append(A.Erasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), fill=fill, p=_ERASE_CHANCE))
    return _Albumentations(A.Compose(steps))


# --------------------------------------------------------------------------- torchvision


class _Torchvision:
    def __init__(self, compose: Any) -> None:
        self._compose = compose

    def __call__(self, image: Image.Image, seed: int) -> np.ndarray:
        # torchvision draws from torch's global CPU generator: lend it the seed, then put it back.
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            tensor = self._compose(image)
        finally:
            torch.set_rng_state(state)
        return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())


def _build_torchvision(
    preset: str, img_size: tuple[int, int], mean: Sequence[float], interpolation: str
) -> Augmentation:
    from torchvision.transforms import v2

    fill = [round(255 * value) for value in mean]
    steps = [
        v2.RGB(),
        v2.RandomResizedCrop(
            list(img_size),
            scale=_CROP_SCALE[preset],
            ratio=_crop_ratio(img_size),
            interpolation=v2.InterpolationMode(interpolation),
            antialias=True,
        ),
        v2.RandomHorizontalFlip(0.5),
    ]
    if preset == "light":
        steps += [v2.RandomApply([v2.ColorJitter(**_JITTER)], _JITTER_CHANCE), v2.PILToTensor()]
    else:
        steps += [
            v2.RandAugment(num_ops=2, magnitude=9, interpolation=v2.InterpolationMode.BILINEAR, fill=fill),
            v2.PILToTensor(),
            v2.RandomErasing(p=_ERASE_CHANCE, scale=(0.02, 0.33), ratio=(0.3, 3.3), value=fill),
        ]
    return _Torchvision(v2.Compose(steps))
