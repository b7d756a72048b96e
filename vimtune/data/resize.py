"""Resizing in memory that is bounded by the sizes of image and result, whatever their shapes."""

from __future__ import annotations

import math

from PIL import Image

_PLAIN = 64
"""Up to this multiple of the result's area the whole image is resized before it is cut."""
_SUPPORT = 3
"""Pixels of the coarser grid that the widest of Pillow's filters reaches to each side."""


def resize_region(
    image: Image.Image,
    resized: tuple[int, int],
    region: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """What `image.resize(resized, resample).crop(region)` gives, without ever holding a huge resized image.

    For the aspect ratios of photos it is exactly that. Of an extreme shape, such as 3000 x 1 pixels, only
    what `region` needs is computed; pixels may then differ by rounding.

    Args:
        image: what to resize.
        resized: (width, height) of the whole image after resizing.
        region: (left, top, right, bottom) of what is wanted of that, inside of it.
        resample: Pillow's filter.
    """
    left, top, right, bottom = region
    width, height = right - left, bottom - top
    # Pillow resizes rows before columns, so image.height rows of the new width lie in between.
    largest = resized[0] * max(resized[1], image.height)
    if largest <= max(_PLAIN * width * height, image.width * image.height):
        return image.resize(resized, resample).crop(region)
    first_x, last_x = _needed(left, right, image.width, resized[0])
    first_y, last_y = _needed(top, bottom, image.height, resized[1])
    scale_x, scale_y = image.width / resized[0], image.height / resized[1]
    part = image.crop((first_x, first_y, last_x, last_y))
    columns = max(0.0, left * scale_x - first_x), min(float(part.width), right * scale_x - first_x)
    rows = max(0.0, top * scale_y - first_y), min(float(part.height), bottom * scale_y - first_y)
    if part.width * height < width * part.height:  # Columns come before rows, which leaves less in between.
        part = part.resize((part.width, height), resample, (0, rows[0], part.width, rows[1]))
        rows = 0, height
    return part.resize((width, height), resample, (columns[0], rows[0], columns[1], rows[1]))


def _needed(start: int, stop: int, size: int, resized: int) -> tuple[int, int]:
    """The pixels along one side of `size` from which `start` to `stop` of its resized form are made."""
    scale = size / resized
    margin = _SUPPORT * max(scale, 1.0) + 1
    return max(0, math.floor(start * scale - margin)), min(size, math.ceil(stop * scale + margin))
