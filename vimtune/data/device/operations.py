"""What augmentation does to the pixels of a batch, with settings of its own for each image.

All functions take and give float32 (B, 3, H, W) with whole numbers from 0 to 255, as if every step stored 8
bits, which the libraries on the host do. They follow Pillow, with which torchvision augments there. An image
whose setting is the neutral one comes out as it was, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.data.device.draws import Draws

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the brightness of a pixel (ITU-R 601-2)."""
_LEVELS = 256
"""Values that a channel of a pixel can have."""

BRIGHTNESS, CONTRAST, SATURATION, SHARPNESS = range(4)
"""What `blend` changes."""
_BLENDS = {
    "brightness": BRIGHTNESS,
    "contrast": CONTRAST,
    "saturation": SATURATION,
    "sharpness": SHARPNESS,
}
"""Operations that are blends."""

_OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""The operations of RandAugment (Cubuk et al. 2020), in torchvision's order. Each has the same chance."""
_SHARE = 9 / 30
"""Magnitude 9 of 30, as a share of the largest."""
_SHEAR = 0.3 * _SHARE
"""Tangent of the angle of shearing."""
_SHIFT = 150 / 331 * _SHARE
"""Distance of translation, as a share of the side."""
_ANGLE = math.radians(30 * _SHARE)
"""Angle of rotation."""
_BLEND = 0.9 * _SHARE
"""How far the factors of brightness, saturation, contrast and sharpness lie from 1."""
_POSTERIZE_STEP = 2 ** round(4 * _SHARE)
"""Distance of the levels that posterizing leaves."""
_SOLARIZE_FROM = 255 * (1 - _SHARE)
"""Level from which solarizing inverts."""

DRAWS_OF_AN_OPERATION = 2
"""Numbers that `random_operation` draws for each image."""
DRAWS_OF_JITTER = 8
"""Numbers that `jitter` draws for each image."""


def jitter(
    images: Tensor,
    draws: Draws,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    chance: float,
) -> Tensor:
    """Vary brightness, contrast and saturation in random order, then the hue, as torchvision's ColorJitter.

    There the hue has a random place among the others, too.

    Args:
        images: see this module's docstring.
        draws: gives `DRAWS_OF_JITTER` numbers.
        brightness, contrast, saturation: largest distance of the factors from 1.
        hue: largest turn, 1 being the whole circle.
        chance: probability that an image is changed at all.
    """
    changed = draws.take(1) < chance
    order = draws.take(3).argsort(1)
    spreads = (brightness, contrast, saturation)
    offsets = torch.stack([(2 * draws.one() - 1) * spread for spread in spreads], 1)
    factors = torch.where(changed, 1 + offsets, 1).gather(1, order)
    turns = torch.where(changed[:, 0], (2 * draws.one() - 1) * hue, 0)
    for place in range(3):
        images = blend(images, order[:, place], factors[:, place])
    return turn_hue(images, turns) if hue else images


def random_operation(images: Tensor, draws: Draws, fill: Tensor) -> Tensor:
    """One operation of RandAugment on each image, of magnitude 9 of 30 and random sign.

    Args:
        images: see this module's docstring.
        draws: gives `DRAWS_OF_AN_OPERATION` numbers.
        fill: the colour of what moves in from outside, (3, 1, 1).
    """
    chosen = (draws.one() * len(_OPERATIONS)).long()
    sign = torch.where(draws.one() < 0.5, -1.0, 1.0)

    def of(name: str) -> Tensor:
        return chosen == _OPERATIONS.index(name)

    def amount(name: str, size: float) -> Tensor:
        return torch.where(of(name), size * sign, 0)

    height, width = images.shape[2:]
    images = move(
        images,
        shear=(amount("shear_x", _SHEAR), amount("shear_y", _SHEAR)),
        shift=(
            amount("translate_x", float(int(_SHIFT * width))),
            amount("translate_y", float(int(_SHIFT * height))),
        ),
        angle=amount("rotate", _ANGLE),
        fill=fill,
    )
    kinds = torch.zeros_like(chosen)
    factors = torch.ones_like(sign)
    for name, kind in _BLENDS.items():
        kinds = torch.where(of(name), kind, kinds)
        factors = factors + amount(name, _BLEND)
    images = blend(images, kinds, factors, sharpness=True)
    return look_up(images, {name: of(name) for name in TABLES})


def grey(images: Tensor) -> Tensor:
    """Brightness of the pixels: (B, 1, H, W), whole numbers."""
    red, green, blue = images.split(1, 1)
    sums: Tensor = _LUMA[0] * red
    return sums.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).round_()


def blend(images: Tensor, kinds: Tensor, factors: Tensor, *, sharpness: bool = False) -> Tensor:
    """Change the distance of each image from what lacks one of its qualities.

    That is black for brightness, the mean grey for contrast, the grey image for saturation, and the smoothed
    image for sharpness.

    Args:
        images: see this module's docstring.
        kinds: which quality, `BRIGHTNESS` and so on, (B,).
        factors: of the distance; 1 changes nothing, (B,).
        sharpness: whether that is among them; without, it costs nothing.
    """
    kinds, factors = kinds[:, None, None, None], factors[:, None, None, None]
    greys = grey(images)
    means = (greys.mean((2, 3), keepdim=True) + 0.5).floor()
    others = torch.where(kinds == SATURATION, greys, torch.where(kinds == CONTRAST, means, 0))
    if sharpness:
        others = torch.where(kinds == SHARPNESS, smooth(images), others)
    return torch.lerp(others.expand_as(images), images, factors).clamp_(0, 255).floor_()


def smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH filter: the pixel counts 5, its eight neighbours 1 each. The border stays."""
    smoothed = images.clone()
    inner = images[:, :, 1:-1, 1:-1]
    if inner.numel():
        mean = F.avg_pool2d(images, 3, 1, divisor_override=13)
        smoothed[:, :, 1:-1, 1:-1] = mean.add_(inner, alpha=4 / 13).round_()
    return smoothed


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of each image by a part of the circle, (B,)."""
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    sector = torch.where(
        high == red,
        green - blue,
        torch.where(high == green, 2 * chroma + blue - red, 4 * chroma + red - green),
    ) / chroma.clamp(min=1)
    # The channels are one function of the hue, 5, 3 and 1 sectors apart.
    apart = 5 - 2 * torch.arange(3, device=images.device)
    places = (sector[:, None] + 6 * turns[:, None, None, None] + apart[:, None, None]) % 6
    share = torch.minimum(places, 4 - places).clamp(0, 1)
    return torch.addcmul(high[:, None], chroma[:, None], share, value=-1).round_()


def move(
    images: Tensor, shear: tuple[Tensor, Tensor], shift: tuple[Tensor, Tensor], angle: Tensor, fill: Tensor
) -> Tensor:
    """Shear each image from its upper left corner, shift it, or rotate it about its middle; bilinear.

    Args:
        images: see this module's docstring.
        shear: tangents along x and y, (B,) each.
        shift: pixels along x and y, (B,) each.
        angle: in radians, (B,).
        fill: the colour of what comes from outside, (3, 1, 1).
    """
    height, width = images.shape[2:]
    cosine, sine = angle.cos(), angle.sin()
    # The place in the input of a place in the result: A (x, y) + b, in pixels.
    xx, xy, yx, yy = cosine, shear[0] - sine, shear[1] + sine, cosine
    bx = ((1 - cosine) * width + sine * height) / 2 - shift[0]
    by = ((1 - cosine) * height - sine * width) / 2 - shift[1]
    rows = (torch.arange(height, device=images.device) + 0.5)[:, None]
    columns = torch.arange(width, device=images.device) + 0.5
    # grid_sample counts each side from -1 to 1. A batched product could be rounded to TF32.
    grid = torch.stack(
        [
            (xx[:, None, None] * columns + (xy[:, None, None] * rows + bx[:, None, None])) * (2 / width) - 1,
            (yy[:, None, None] * rows + (yx[:, None, None] * columns + by[:, None, None])) * (2 / height) - 1,
        ],
        3,
    )
    # Outside of the images grid_sample finds zeros.
    return F.grid_sample(images - fill, grid, align_corners=False).add_(fill).round_()


def look_up(images: Tensor, chosen: dict[str, Tensor]) -> Tensor:
    """Replace the values of each image by those of a table, which is how all changes of single values work.

    Args:
        images: see this module's docstring.
        chosen: the images, (B,) bool, to which each of `TABLES` applies; to an image at most one of them.
    """
    count, channels, height, width = images.shape
    values = images.reshape(count * channels, height * width).long()
    one = torch.ones((), dtype=torch.int32, device=images.device)
    counts = one.new_zeros(count * channels, _LEVELS).scatter_add_(1, values, one.expand_as(values))
    counts = counts.view(count, channels, _LEVELS)
    table = _levels(counts).expand(counts.shape)
    for name, of_images in chosen.items():
        table = torch.where(of_images[:, None, None], TABLES[name](counts), table)
    return table.reshape(count * channels, _LEVELS).gather(1, values).view_as(images)


def _levels(counts: Tensor) -> Tensor:
    return torch.arange(_LEVELS, dtype=torch.float32, device=counts.device)


def _posterize(counts: Tensor) -> Tensor:
    """Keep the upper bits of each value."""
    levels = _levels(counts)
    return levels - levels.remainder(_POSTERIZE_STEP)


def _solarize(counts: Tensor) -> Tensor:
    """Invert the values from the threshold on."""
    levels = _levels(counts)
    return torch.where(levels >= _SOLARIZE_FROM, 255 - levels, levels)


def _range(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The darkest and the brightest value of each channel: two tensors (B, 3, 1)."""
    levels, there = _levels(counts), counts > 0
    darkest = 255 - (there * (255 - levels)).amax(2, keepdim=True)
    return darkest, (there * levels).amax(2, keepdim=True)


def _autocontrast(counts: Tensor) -> Tensor:
    """Stretch each channel so that its darkest value becomes 0 and its brightest 255."""
    levels, (low, high) = _levels(counts), _range(counts)
    # The small number keeps 254.9999 from being cut to 254.
    stretched = ((levels - low) * (255 / (high - low).clamp(min=1)) + 1e-3).floor().clamp(0, 255)
    return torch.where(high > low, stretched, levels)


def _equalize(counts: Tensor) -> Tensor:
    """Spread the values of each channel so that all are about equally frequent, by Pillow's rule."""
    brightest = counts.gather(2, _range(counts)[1].long())
    step = (counts.sum(2, keepdim=True) - brightest) // (_LEVELS - 1)
    before = counts.cumsum(2) - counts
    spread = ((step // 2 + before) // step.clamp(min=1)).clamp(max=_LEVELS - 1).float()
    return torch.where(step > 0, spread, _levels(counts))


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
"""What becomes of the 256 values, by the name of the operation. Each takes how often the values occur in the
channels of the images, int32 (B, 3, 256), and gives the new values, float32 (B, 3, 256) or (256,)."""


def erase(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, fill: Tensor) -> Tensor:
    """Give a rectangle of each image one colour.

    Args:
        images: see this module's docstring.
        top, left, height, width: the rectangles, (B,); without height they are empty.
        fill: the colour, (3, 1, 1).
    """
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    of_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    of_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    return torch.where((of_rows[:, :, None] & of_columns[:, None])[:, None], fill, images)
