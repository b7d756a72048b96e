"""From the pixels of any Pillow mode to 8-bit RGB.

| mode | becomes |
|---|---|
| 1, L, P, RGB, RGBX, CMYK, YCbCr, HSV | what Pillow's conversion gives |
| LAB | sRGB, by LittleCMS |
| LA, La, PA, RGBA, RGBa, and a transparent colour or palette entry in any mode | laid over white |
| I;16 in both byte orders | the upper byte: 0 to 65535 become 0 to 255 |
| I (32-bit whole numbers) | scaled as below, with the ranges 0 to 255 and 0 to 65535 |
| F (32-bit floating point) | scaled as below, with the ranges 0 to 1, 0 to 255 and 0 to 65535 |

Files do not say which number of an I or F image is white. It is taken from the image: the smallest of the
listed ranges that holds all its values becomes 0 to 255; values beyond all of them are stretched, the
lowest to 0 and the highest to 255. PNG and PPM files do say it: they count to 65535. Not-a-number becomes
black, infinity the end of the range on its side.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

_COUNT_TO_65535 = ("PNG", "PPM")
"""Formats whose pixels of mode I always count to 65535, however dark the image is."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert `image`, of any mode, to mode RGB (see this module's docstring); it is returned if it is so.

    Raises:
        ValueError: a mode that Pillow cannot convert, or no finite number in the image.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_numbers(image)
    if image.mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy what is RGB already


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow has no direct way from here to RGBA.
        image = image.convert("LA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    try:
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise ValueError(f"its LAB colours cannot be converted ({error})") from error
    assert converted is not None, "only a conversion in place returns nothing"
    return converted


def _from_numbers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        grey = _scale(values, (1.0, 255.0, 65535.0))
    elif image.mode == "I" and image.format not in _COUNT_TO_65535:
        grey = _scale(values, (255, 65535))
    else:
        grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _scale(values: np.ndarray, whites: tuple[float, ...]) -> np.ndarray:
    """Grey of 8 bits from numbers of an unknown range; see this module's docstring."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("none of its pixels is a finite number")
    low, high = float(finite.min()), float(finite.max())
    fitting = [white for white in whites if high <= white]
    black, white = (0.0, fitting[0]) if low >= 0 and fitting else (low, high)
    shares = (values.astype(np.float64) - black) / max(white - black, np.finfo(np.float32).tiny)
    shares = np.clip(np.nan_to_num(shares, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
    grey: np.ndarray = np.rint(255 * shares).astype(np.uint8)
    return grey
