"""Image preprocessing: one evaluation pipeline, four training presets in two libraries.

H, W: height and width of the model's input.

| preset | what a training image goes through |
|---|---|
| none   | the evaluation pipeline, no randomness |
| light  | crop of 60-100 % of the area, resize, horizontal flip, mild colour jitter with 80 % chance |
| medium | crop of 25-100 % of the area, resize, flip, colour jitter with 80 % chance, and with 25 %   |
|        | chance a rectangle of 2-33 % of the area erased to the mean colour                          |
| strong | crop of 8-100 % of the area, resize, flip, two random operations as in RandAugment (magnitude |
|        | 9 of 30), and with 25 % chance a rectangle of 2-33 % of the area erased to the mean colour |

Evaluation, for both libraries the same code (Pillow, anti-aliased): resize, cut (H, W) from the middle, scale
to [0, 1], normalise with mean and std. The crop mode says to which size the image is resized:

| crop mode | size before the cut |
|---|---|
| center         | the smallest that covers (H, W) / crop_pct with the image's aspect ratio, as in timm |
| squash         | (H, W) / crop_pct; the aspect ratio is lost, as in timm |
| center_rounded | as center, but sizes are rounded as adapter files without a crop mode expect |

With the first two, timm's own evaluation transform of the same settings gives the same pixels.

The two libraries draw different random numbers, so they agree in distribution, not pixel by pixel. Crops are
resized with the filter that is asked for in both, against aliasing as in evaluation.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vimtune.data.normalisation import Normalisation
from vimtune.data.resize import PILLOW_FILTERS, resize_region
from vimtune.preprocessing import Preprocessing
from vimtune.schema import check

if TYPE_CHECKING:
    from torch import nn

JITTER_CHANCE = 0.8
"""Probability that the colours of an image vary."""
ERASE_CHANCE = 0.25
"""Probability that a rectangle of an image is erased."""
ERASE_SCALE = (0.02, 0.33)
"""Smallest and largest part of an image's area that is erased."""
ERASE_RATIO = (0.3, 3.3)
"""Smallest and largest height / width of the rectangle."""


@dataclass(frozen=True)
class Changes:
    """What a preset does to a training image between the crop and the normalisation, in this order."""

    crop_scale: tuple[float, float]
    """Smallest and largest part of the area that the random crop takes."""
    jitter: Mapping[str, float] | None = None
    """How far colours may vary at random, in torchvision's and albumentations' terms."""
    operations: int = 0
    """How many operations of RandAugment follow."""
    erases: bool = False
    """Whether a rectangle may be erased."""


CHANGES: Mapping[str, Changes] = {
    "light": Changes((0.6, 1.0), {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}),
    "medium": Changes(
        (0.25, 1.0), {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.0}, erases=True
    ),
    "strong": Changes((0.08, 1.0), operations=2, erases=True),
}
"""The presets with augmentation."""

Augmentation = Callable[[Image.Image, int], np.ndarray]
"""Makes uint8 pixels (H, W, 3) out of an image and a seed."""


class Transform:
    """Turns a PIL image into a normalised tensor. Made by `build_transform` and `read_transform`.

    Attributes:
        normalise: the last step, bytes (..., H, W, 3) to float32 (..., 3, H, W) on any device.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        height, width = preprocessing.img_size
        self.img_size: tuple[int, int] = (height, width)
        self.normalise = Normalisation(preprocessing.mean, preprocessing.std)
        self._augment = _build_augmentation(preprocessing)

    @property
    def config(self) -> dict[str, Any]:
        """The settings as plain values, for a file; `build_transform(**config)` rebuilds the transform."""
        return dataclasses.asdict(self.preprocessing)

    def __call__(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        """Return a float32 tensor (3, H, W); a pure function of the image and `seed`."""
        return self.normalise(self.pixels(image, seed))

    def pixels(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        """Return what comes before the normalisation, uint8 (H, W, 3); as pure a function."""
        if self._augment is None:
            return torch.from_numpy(evaluation_crop(image, self.preprocessing))
        return torch.from_numpy(self._augment(image, seed))

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
    crop_mode: str | None = None,
    interpolation: str = "bicubic",
    library: str = "albumentations",
) -> Transform:
    """Build the preprocessing of one split.

    Args:
        preset: "none", "light", "medium" or "strong" (see the table in this module's docstring).
        img_size: (H, W) of the result.
        mean: per RGB channel, of values in [0, 1].
        std: per RGB channel, of values in [0, 1].
        train: False gives the evaluation pipeline whatever the preset.
        crop_pct: share of the resized image that the evaluation crop keeps, in (0, 1].
        crop_mode: "center", "squash" or "center_rounded" (see the second table there). None means what it
            means in files without a crop mode: "squash" where `crop_pct` is 1, else "center_rounded".
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        library: who draws and applies the augmentation, "albumentations" or "torchvision".

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    return Transform(
        Preprocessing(
            preset=preset,
            img_size=[int(side) for side in img_size],
            mean=[float(value) for value in mean],
            std=[float(value) for value in std],
            train=bool(train),
            crop_pct=float(crop_pct),
            crop_mode=crop_mode,
            interpolation=interpolation,
            library=library,
        )
    )


def read_transform(config: Any, what: str, error: type[ValueError] = ValueError) -> Transform:
    """Build the evaluation preprocessing that a file asks for.

    Args:
        config: what the file holds, as plain values; `Transform.config` of the one who wrote it.
        what: the file and the part of it, for the message.
        error: the class of the error.

    Raises:
        ValueError: (or the subclass `error`) `config` is not of the form of `Preprocessing`.
    """
    return Transform(dataclasses.replace(check(Preprocessing, config, what, error), train=False))


def model_preprocessing(model: nn.Module) -> dict[str, Any]:
    """Arguments of `build_transform` for the preprocessing that a timm model's `pretrained_cfg` describes."""
    from timm.data.config import resolve_model_data_config  # Transforming images does without it.

    config = resolve_model_data_config(model)
    return {
        "img_size": config["input_size"][1:],
        **{name: config[name] for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")},
    }


def evaluation_crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and centre-crop; returns uint8 (H, W, 3)."""
    height, width = preprocessing.img_size
    new_h, new_w = _resized_size(image, preprocessing)
    left, top = round((new_w - width) / 2), round((new_h - height) / 2)
    region = (left, top, left + width, top + height)
    resample = PILLOW_FILTERS[preprocessing.interpolation]
    resized = resize_region(image, (new_w, new_h), region, resample)
    return np.array(as_rgb(resized))  # This makes a writable copy.


def _resized_size(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of `image` before the cut; see the table of crop modes."""
    mode = preprocessing.crop_mode
    rounding = round if mode == "center_rounded" else math.floor
    height, width = (rounding(side / preprocessing.crop_pct) for side in preprocessing.img_size)
    if mode == "squash":
        return height, width
    if mode == "center" and height != width:
        ratio = min(image.height / height, image.width / width)
        return round(image.height / ratio), round(image.width / ratio)
    if height * image.width >= width * image.height:
        return height, height * image.width // image.height
    return width * image.height // image.width, width


def as_rgb(image: Image.Image) -> Image.Image:
    """An image that is not RGB as Pillow converts it; what comes out of files is RGB already."""
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy what is RGB already


def crop_ratio(img_size: tuple[int, int]) -> tuple[float, float]:
    """Aspect ratios (width / height) of random crops: within 3:4 and 4:3 of the result's own."""
    aspect = img_size[1] / img_size[0]
    return 3 / 4 * aspect, 4 / 3 * aspect


def is_random(preprocessing: Preprocessing) -> bool:
    """Whether images go through something else than the evaluation pipeline."""
    return preprocessing.train and preprocessing.preset != "none"


def _build_augmentation(preprocessing: Preprocessing) -> Augmentation | None:
    """What a training image goes through instead of the evaluation pipeline, if anything."""
    if not is_random(preprocessing):
        return None
    build = _build_albumentations if preprocessing.library == "albumentations" else _build_torchvision
    height, width = preprocessing.img_size
    return build(preprocessing.preset, (height, width), preprocessing.mean, preprocessing.interpolation)


# --------------------------------------------------------------------------- albumentations


class _Albumentations:
    def __init__(self, compose: Any) -> None:
        self._compose = compose

    def __call__(self, image: Image.Image, seed: int) -> np.ndarray:
        # One pair of generators shared by all steps: Compose's own seeding would give every step the same
        # numbers, tying e.g. the flip to the crop.
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return np.ascontiguousarray(self._compose(image=np.asarray(as_rgb(image)))["image"])


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

    from vimtune.data.random_crop import RandomCrop  # This imports albumentations.

    fill = tuple(round(255 * value) for value in mean)
    changes = CHANGES[preset]
    steps = [
        RandomCrop(img_size, changes.crop_scale, crop_ratio(img_size), interpolation),
        A.HorizontalFlip(p=0.5),
    ]
    if changes.jitter:
        steps.append(A.ColorJitter(**changes.jitter, p=JITTER_CHANCE))
    if changes.operations:
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
        steps.append(A.SomeOf(operations, n=changes.operations, replace=True, p=1.0))
    if changes.erases:
        steps.append(A.Erasing(scale=ERASE_SCALE, ratio=ERASE_RATIO, fill=fill, p=ERASE_CHANCE))
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
    changes = CHANGES[preset]
    steps = [
        v2.RGB(),
        v2.RandomResizedCrop(
            list(img_size),
            scale=changes.crop_scale,
            ratio=crop_ratio(img_size),
            interpolation=v2.InterpolationMode(interpolation),
            antialias=True,
        ),
        v2.RandomHorizontalFlip(0.5),
    ]
    if changes.jitter:
        steps.append(v2.RandomApply([v2.ColorJitter(**changes.jitter)], JITTER_CHANCE))
    if changes.operations:
        filling = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": fill}
        steps.append(v2.RandAugment(num_ops=changes.operations, magnitude=9, **filling))
    steps.append(v2.PILToTensor())
    if changes.erases:
        steps.append(v2.RandomErasing(p=ERASE_CHANCE, scale=ERASE_SCALE, ratio=ERASE_RATIO, value=fill))
    return _Torchvision(v2.Compose(steps))
