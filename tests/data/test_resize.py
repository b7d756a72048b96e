"""Resizing gives what Pillow gives, within bounded memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vimtune.data import LIBRARIES, build_transform
from vimtune.data.resize import resize_pixels, resize_region

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3))
    smooth = (values + np.roll(values, 1, 0) + np.roll(values, 1, 1)) // 3
    return Image.fromarray(smooth.astype(np.uint8))


def plain(image: Image.Image, size: tuple[int, int], crop_pct: float, name: str) -> np.ndarray:
    """The documented formula, with the whole resized image."""
    height, width = size
    resample = Image.Resampling[name.upper()]
    if crop_pct == 1.0:
        return np.asarray(image.resize((width, height), resample))
    cover_h, cover_w = round(height / crop_pct), round(width / crop_pct)
    if cover_h * image.width >= cover_w * image.height:
        new_w, new_h = cover_h * image.width // image.height, cover_h
    else:
        new_w, new_h = cover_w, cover_w * image.height // image.width
    left, top = round((new_w - width) / 2), round((new_h - height) / 2)
    return np.asarray(image.resize((new_w, new_h), resample).crop((left, top, left + width, top + height)))


def evaluated(image: Image.Image, size: tuple[int, int], crop_pct: float, name: str) -> np.ndarray:
    transform = build_transform("none", size, (0, 0, 0), (1, 1, 1), crop_pct=crop_pct, interpolation=name)
    return (transform(image) * 255).round().byte().permute(1, 2, 0).numpy()


@settings(max_examples=60, deadline=None)
@given(
    short=st.integers(1, 90),
    ratio=st.floats(1, 16),
    wide=st.booleans(),
    size=st.sampled_from([(32, 32), (24, 48), (64, 40)]),
    crop_pct=st.sampled_from([0.8, 0.875, 1.0]),
    name=st.sampled_from(FILTERS),
)
@example(short=1, ratio=1, wide=True, size=(32, 32), crop_pct=0.875, name="bicubic")
@example(short=90, ratio=16, wide=False, size=(24, 48), crop_pct=1.0, name="lanczos")
def test_photos_are_resized_exactly_as_ever(short, ratio, wide, size, crop_pct, name) -> None:
    long = round(short * ratio)
    image = noise(long, short) if wide else noise(short, long)
    expected = plain(image, size, crop_pct, name)
    assert np.array_equal(evaluated(image, size, crop_pct, name), expected)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("shape", [(900, 1), (1, 900), (2000, 7), (7, 2000), (1500, 3), (5, 1234), (1, 5000)])
def test_extreme_shapes_are_equal_up_to_rounding(shape, crop_pct, name) -> None:
    image = noise(*shape)
    expected = plain(image, (32, 48), crop_pct, name).astype(int)
    difference = abs(evaluated(image, (32, 48), crop_pct, name).astype(int) - expected)
    if name == "nearest":  # may take the neighbour where both are equally near
        assert (difference.max(-1) > 0).mean() < 0.1
    else:
        assert difference.max() <= 2


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_the_region_may_lie_anywhere(resample) -> None:
    image = noise(3000, 4)
    whole = image.resize((24_000, 32), resample)
    for left in (0, 1, 777, 12_000, 24_000 - 32):
        region = (left, 0, left + 32, 32)
        cut = np.asarray(resize_region(image, whole.size, region, resample)).astype(int)
        assert abs(cut - np.asarray(whole.crop(region)).astype(int)).max() <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_memory_is_bounded_by_image_and_result() -> None:
    """Both shapes took gigabytes: 3000 x 1 in a crop, 1 x a million squashed and cropped."""
    code = """
import resource
from PIL import Image
from vimtune.data import build_transform
transforms = [build_transform("none", (224, 224), crop_pct=crop_pct) for crop_pct in (0.875, 1.0)]
transforms[0](Image.new("RGB", (300, 200)))
images = [Image.new("RGB", size) for size in ((3000, 1), (1, 3000), (1_000_000, 1), (1, 1_000_000))]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for image in images:
    for transform in transforms:
        assert transform(image).shape == (3, 224, 224)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 60_000  # KiB


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("preset", ["light", "medium", "strong"])
@pytest.mark.parametrize("shape", [(3000, 1), (1, 3000), (1, 1), (40_000, 2)])
def test_training_takes_extreme_shapes_too(shape, preset: str, library: str) -> None:
    transform = build_transform(preset, (32, 32), train=True, library=library)
    image = Image.new("RGB", shape, "white")
    for seed in range(8):
        assert transform(image, seed).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (150, 170)])
@pytest.mark.parametrize("name", FILTERS)
def test_pixels_are_resized_as_pillow_does_it(name: str, size: tuple[int, int]) -> None:
    """Up to rounding; of pixels that are part of a larger image, and not to be written to."""
    whole = np.asarray(noise(140, 120))
    assert not whole.flags.writeable
    part = whole[3:103, 5:115]
    found = resize_pixels(part, size, name)
    expected = np.asarray(Image.fromarray(part).resize(size[::-1], Image.Resampling[name.upper()]))
    assert found.dtype == np.uint8 and found.flags.writeable and found.flags.c_contiguous
    different = np.abs(found.astype(int) - expected)
    assert different.max() <= 1 and (different > 0).mean() < 0.02


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (24, 24)])
def test_pixels_of_any_shape_are_resized(size: tuple[int, int]) -> None:
    pixels = np.full((*size, 3), (10, 120, 250), np.uint8)
    assert np.array_equal(
        resize_pixels(pixels, (24, 24), "bicubic"), np.broadcast_to(pixels[0, 0], (24, 24, 3))
    )
