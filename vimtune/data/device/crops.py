"""Boxes of images, cut out, mirrored and resized for a whole batch at once.

Resizing with anti-aliasing is a weighted mean along each axis, and the weights of all pixels of an axis are a
matrix. So a batch of boxes, each of its own size, is resized by two batched matrix products. The weights are
those of Pillow's filters, taken over the box alone. B images, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vimtune.data.device.draws import Draws

TRIES = 10
"""Boxes that are drawn for each image until one fits into it, as torchvision does."""
DRAWS_OF_A_BOX = 2 * TRIES + 2
"""Numbers that `draw_boxes` draws for each image."""


class Boxes(NamedTuple):
    """A box of each image, in pixels: four tensors (B,) float32 with whole numbers."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def draw_boxes(
    draws: Draws,
    heights: Tensor | float,
    widths: Tensor | float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    margin: int = 0,
) -> tuple[Boxes, Tensor]:
    """Draw boxes of a random share of the area and a random shape, anywhere in the images.

    As in torchvision, the share is uniform, the logarithm of the aspect ratio is uniform, and boxes are drawn
    until one fits.

    Args:
        draws: gives `DRAWS_OF_A_BOX` numbers.
        heights, widths: of the images; tensors (B,), or one size for all.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        margin: pixels by which a box has to be smaller than the image in both directions.

    Returns:
        The boxes, and whether any of the `TRIES` fitted, (B,) bool. Where none did, the box is as large as
        the last one that was drawn.
    """
    shares, shapes = draws.take(TRIES), draws.take(TRIES)
    heights, widths = _column(heights, shares), _column(widths, shares)
    areas = heights * widths * (scale[0] + (scale[1] - scale[0]) * shares)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = torch.exp(low + (high - low) * shapes)
    box_heights, box_widths = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()
    fits = (box_heights >= 1) & (box_heights <= heights - margin)
    fits &= (box_widths >= 1) & (box_widths <= widths - margin)
    first = fits.byte().argmax(1, keepdim=True)
    height, width = box_heights.gather(1, first)[:, 0], box_widths.gather(1, first)[:, 0]
    top = (draws.one() * (heights[:, 0] - height + 1)).floor()
    left = (draws.one() * (widths[:, 0] - width + 1)).floor()
    return Boxes(top, left, height, width), fits.any(1)


def _column(sizes: Tensor | float, like: Tensor) -> Tensor:
    """Sizes of B images as a column (B, 1) float32 beside `like`, (B, ...)."""
    if isinstance(sizes, Tensor):
        return sizes[:, None].float()
    return like.new_full((len(like), 1), sizes)


def middle_boxes(heights: Tensor, widths: Tensor, ratio: tuple[float, float]) -> Boxes:
    """The largest box in the middle of each image whose width / height lies within `ratio`.

    Of an image of a pixel or two there may be none; the box has a pixel then.
    """
    heights, widths = heights.float(), widths.float()
    height = torch.minimum(heights, (widths / ratio[0]).round().clamp(min=1))
    width = torch.minimum(widths, (heights * ratio[1]).round().clamp(min=1))
    return Boxes(((heights - height) / 2).floor(), ((widths - width) / 2).floor(), height, width)


def resize_boxes(
    pixels: Tensor, boxes: Boxes, size: tuple[int, int], interpolation: str, mirrored: Tensor
) -> Tensor:
    """Cut boxes out of images and resize them.

    Args:
        pixels: uint8 (B, H, W, 3); what lies outside of the boxes does not matter.
        boxes: one for each image, inside of it.
        size: (height, width) of the result.
        interpolation: name of the filter, a key of `FILTERS`.
        mirrored: which images are mirrored from left to right, (B,) bool.

    Returns:
        float32 (B, 3, height, width) with whole numbers from 0 to 255.
    """
    count, in_height, in_width, _ = pixels.shape
    height, width = size
    rows = _weights(boxes.top, boxes.height, in_height, height, interpolation)
    columns = _weights(boxes.left, boxes.width, in_width, width, interpolation, mirrored)
    planes = pixels.transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    narrowed = torch.bmm(planes.view(count, in_height * 3, in_width), columns.transpose(1, 2))
    resized = torch.bmm(rows, narrowed.view(count, in_height, 3 * width)).clamp_(0, 255).round_()
    return resized.view(count, height, 3, width).transpose(1, 2).contiguous()


def _weights(
    start: Tensor,
    length: Tensor,
    inputs: int,
    outputs: int,
    interpolation: str,
    reverse: Tensor | None = None,
) -> Tensor:
    """The share of each pixel of an axis in each pixel of the result: (B, outputs, inputs), rows sum to 1.

    Few pixels of a row are near enough to count. Their shares alone are computed, and put among zeros.

    Args:
        start, length: of the box along the axis, (B,).
        inputs, outputs: pixels along the axis before and after.
        interpolation: name of the filter.
        reverse: of which images the axis is reversed, (B,) bool.
    """
    kernel = FILTERS[interpolation]
    places = torch.arange(outputs, device=start.device) + 0.5
    if reverse is not None:
        places = torch.where(reverse[:, None], outputs - places, places)
    start, end = start[:, None, None], (start + length)[:, None, None]
    # Multiplied first, centres on the border of two pixels are exact.
    centres = start + (places * length[:, None] / outputs)[:, :, None]
    if kernel.stretches:
        scales = (length / outputs).clamp(min=1)[:, None, None]
    else:
        centres, scales = centres.floor() + 0.5, torch.ones_like(start)
    near = min(inputs, math.ceil(2 * kernel.reach * max(1.0, inputs / outputs)) + 1)
    first = (centres - kernel.reach * scales).floor().clamp_(0, inputs - near)
    pixels = first + torch.arange(near, device=start.device)
    middles = pixels + 0.5
    weights = kernel.weight((middles - centres) / scales)
    weights *= (middles > start) & (middles < end)
    weights /= weights.sum(2, keepdim=True)
    return weights.new_zeros(*pixels.shape[:2], inputs).scatter_(2, pixels.long(), weights)


def _nearest(distance: Tensor) -> Tensor:
    return (distance.abs() < 0.5).float()


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2."""
    x = distance.abs().clamp(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def _lanczos(distance: Tensor) -> Tensor:
    return torch.where(distance.abs() < 3, torch.sinc(distance) * torch.sinc(distance / 3), 0)


class Filter(NamedTuple):
    """How much pixels count that lie around a place."""

    weight: Callable[[Tensor], Tensor]
    """The weight of a pixel at a distance, in pixels of the coarser grid."""
    reach: float
    """The distance from which on the weight is 0."""
    stretches: bool = True
    """Whether that grid may be the one of the result, against aliasing."""


FILTERS: dict[str, Filter] = {
    "nearest": Filter(_nearest, 0.5, stretches=False),
    "bilinear": Filter(_bilinear, 1),
    "bicubic": Filter(_bicubic, 2),
    "lanczos": Filter(_lanczos, 3),
}
"""The filters by the names of interpolations."""
