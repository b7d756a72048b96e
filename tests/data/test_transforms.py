"""Transforms are pure functions of a seed, and both libraries evaluate alike."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from vimtune.data import LIBRARIES, PRESETS, build_transform, model_preprocessing, read_transform
from vimtune.models import MODELS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(height: int = 90, width: int = 120) -> Image.Image:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = np.stack([np.sin(x / 9) + np.cos(y / 7), np.cos(x / 11 + y / 13), np.sin(y / 5)], -1)
    return Image.fromarray((127 + 60 * waves).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("img_size", [(32, 32), (24, 48)])
def test_randomness_is_a_pure_function_of_the_seed(library: str, preset: str, img_size) -> None:
    def build():
        return build_transform(preset, img_size, MEAN, STD, train=True, crop_pct=0.9, library=library)

    one, two, image = build(), build(), photo()
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    first = [one(image, seed) for seed in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    np.random.seed(5)
    again = [two(image, seed) for seed in reversed(range(12))][::-1]
    for a, b in zip(first, again, strict=True):
        assert a.shape == (3, *img_size) and a.dtype == torch.float32 and a.is_contiguous()
        assert torch.equal(a, b)
    distinct = {tuple(a.flatten()[::7].tolist()) for a in first}
    assert len(distinct) == (1 if preset == "none" else 12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_flip_does_not_depend_on_the_crop(library: str) -> None:
    """All four combinations of flipped and left/right crop occur: the steps draw independently."""
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (120, 1, 3)))
    transform = build_transform("light", (16, 16), (0, 0, 0), (1, 1, 1), train=True, library=library)
    seen = set()
    for seed in range(80):
        grey = transform(ramp, seed).mean(0)
        seen.add((bool(grey[:, 0].mean() > grey[:, -1].mean()), bool(grey.mean() > 0.47)))
    assert len(seen) == 4


@pytest.mark.parametrize("preset", ["light", "medium", "strong"])
def test_libraries_agree_in_distribution(preset: str) -> None:
    means, stds = [], []
    for library in LIBRARIES:
        transform = build_transform(preset, (32, 32), MEAN, STD, train=True, library=library)
        batch = torch.stack([transform(photo(), seed) for seed in range(150)])
        means.append(batch.mean((0, 2, 3)))
        stds.append(batch.std((0, 2, 3)))
    torch.testing.assert_close(means[0], means[1], atol=0.15, rtol=0)
    torch.testing.assert_close(stds[0], stds[1], atol=0.15, rtol=0)


def test_libraries_agree_in_sharpness() -> None:
    """Also of crops that are hardly larger than the result, or larger along one side only."""
    grain = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).resize((80, 80))
    edges = []
    for library in LIBRARIES:
        transform = build_transform("light", (64, 64), MEAN, STD, train=True, library=library)
        batch = torch.stack([transform(grain, seed) for seed in range(60)])
        edges.append(float(batch.diff(dim=3).abs().mean()))
    assert 0.94 < edges[0] / edges[1] < 1.06


@pytest.mark.parametrize("preset", ["light", "medium", "strong"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_evaluation_is_the_same_for_both_libraries_and_presets(preset: str, crop_pct: float) -> None:
    outputs = [
        build_transform(p, (32, 40), MEAN, STD, train=train, crop_pct=crop_pct, library=library)(photo(), 3)
        for library in LIBRARIES
        for p, train in ((preset, False), ("none", True), ("none", False))
    ]
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [(50, 70), (300, 200), (61, 61), (97, 333)])
def test_evaluation_equals_torchvision(crop_pct: float, size: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    image = photo(*size)
    resize = [v2.Resize((64, 64), interpolation=v2.InterpolationMode.BICUBIC)]
    if crop_pct < 1:
        resize = [
            v2.Resize(round(64 / crop_pct), interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(64),
        ]
    oracle = v2.Compose(
        [*resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    ours = build_transform("none", (64, 64), MEAN, STD, train=False, crop_pct=crop_pct)(image)
    torch.testing.assert_close(ours, torch.as_tensor(oracle(image)), atol=1e-5, rtol=0)


def test_evaluation_crops_the_middle_of_wide_and_tall_images() -> None:
    for size in ((40, 160), (160, 40)):
        image = Image.new("RGB", size[::-1], "white")
        image.paste("black", (size[1] // 2 - 2, size[0] // 2 - 2, size[1] // 2 + 2, size[0] // 2 + 2))
        out = build_transform("none", (32, 24), (0,) * 3, (1,) * 3, crop_pct=0.8)(image)
        ys, xs = torch.nonzero(out[0] < 0.3, as_tuple=True)
        assert abs(ys.float().mean() - 15.5) < 0.6 and abs(xs.float().mean() - 11.5) < 0.6


@pytest.mark.parametrize("library", LIBRARIES)
def test_config_rebuilds_and_pickles(library: str) -> None:
    transform = build_transform("strong", (20, 24), MEAN, STD, train=True, crop_pct=0.9, library=library)
    assert transform.config["img_size"] == [20, 24]
    expected = transform(photo(), 9)
    assert torch.equal(build_transform(**transform.config)(photo(), 9), expected)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(photo(), 9), expected)


def test_strong_erases_to_the_mean_now_and_then() -> None:
    for library in LIBRARIES:
        transform = build_transform("strong", (32, 32), MEAN, STD, train=True, library=library)
        white = Image.new("RGB", (64, 64), (255, 255, 255))
        grey = sum(bool((transform(white, s).abs().amax(0) < 0.02).float().mean() > 0.015) for s in range(80))
        assert 8 <= grey <= 60


def test_bad_values_are_named() -> None:
    for wrong, message in (
        ({"preset": "lite"}, "Did you mean 'light'"),
        ({"library": "albumentation"}, "Did you mean 'albumentations'"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"crop_pct": 0.0}, "crop_pct=0.0"),
        ({"img_size": (0, 4)}, "img_size"),
        ({"std": (0, 1, 1)}, "std"),
    ):
        with pytest.raises(ValueError, match=message):
            build_transform(**wrong)


def test_albumentations_is_imported_late_offline_and_without_side_effects() -> None:
    code = """
import os, sys, socket
socket.socket.connect = lambda *a: sys.exit('network call')
import vimtune.data as d
assert 'albumentations' not in sys.modules
import cv2
state = (cv2.getNumThreads(), dict(os.environ))
d.build_transform('strong', (8, 8), train=True)
assert 'albumentations' in sys.modules
assert (cv2.getNumThreads(), dict(os.environ)) == state
"""
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --- timm's own evaluation transform of the same settings

PHOTOS = [(90, 120), (120, 77), (50, 333), (61, 61), (301, 77), (64, 63), (20, 31)]
"""Heights and widths of images, most of them not square."""
SIZES = [None, 100, (48, 80)]
"""Values of `img_size`; None is the model's own."""


def small(name: str, img_size=None) -> torch.nn.Module:
    """A registered model with its own preprocessing, but hardly any weights."""
    options = {} if img_size is None else {"img_size": img_size}
    return timm.create_model(name, depth=1, embed_dim=16, d_state=2, num_classes=3, **options)


def pixels(tensor: torch.Tensor) -> torch.Tensor:
    """Back from normalised values to levels from 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (tensor * std + mean) * 255


@pytest.mark.parametrize("img_size", SIZES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_timm_gives_the_same_pixels_from_the_models_own_configuration(name: str, img_size) -> None:
    model = small(name, img_size)
    oracle = create_transform(**resolve_model_data_config(model))
    ours = build_transform("none", **model_preprocessing(model))
    assert ours.img_size == model.patch_embed.img_size
    for size in PHOTOS[:3]:
        image = photo(*size)
        torch.testing.assert_close(pixels(ours(image)), pixels(oracle(image)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("img_size", [(64, 64), (50, 50), (33, 77), (96, 56), (14, 15)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_timm_gives_the_same_pixels_for_all_settings(crop_mode, crop_pct, img_size) -> None:
    for number, size in enumerate(PHOTOS):
        interpolation = ("bicubic", "bilinear", "nearest", "lanczos")[number % 4]
        settings = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
        oracle = create_transform((3, *img_size), mean=MEAN, std=STD, **settings)
        ours, image = build_transform("none", img_size, MEAN, STD, **settings), photo(*size)
        torch.testing.assert_close(pixels(ours(image)), pixels(oracle(image)), atol=1e-3, rtol=0)


def before_crop_modes(image: Image.Image, img_size: tuple[int, int], crop_pct: float) -> np.ndarray:
    """The evaluation crop as it was when adapter files had no crop mode."""
    height, width = img_size
    if crop_pct == 1.0:
        return np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    cover_h, cover_w = round(height / crop_pct), round(width / crop_pct)
    if cover_h * image.width >= cover_w * image.height:
        new_w, new_h = cover_h * image.width // image.height, cover_h
    else:
        new_w, new_h = cover_w, cover_w * image.height // image.width
    left, top = round((new_w - width) / 2), round((new_h - height) / 2)
    resized = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("img_size", [(64, 64), (50, 50), (33, 77), (96, 56)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_a_file_without_a_crop_mode_means_what_it_meant(img_size, crop_pct: float) -> None:
    config = {
        "preset": "none",
        "img_size": list(img_size),
        "mean": list(MEAN),
        "std": list(STD),
        "train": False,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "library": "albumentations",
    }
    read = read_transform(config, "preprocessing")
    again = read_transform(json.loads(json.dumps(read.config)), "preprocessing")  # as a file written from it
    for size in PHOTOS:
        image = photo(*size)
        expected = torch.from_numpy(before_crop_modes(image, img_size, crop_pct)).permute(2, 0, 1).float()
        for transform in (read, again, build_transform(**config)):
            torch.testing.assert_close(pixels(transform(image)), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_size": [0, 32]}, "img_size"),
        ({"img_size": [32, 10**9]}, "img_size"),
        ({"img_size": [32]}, "img_size"),
        ({"img_size": [32.5, 32]}, "img_size"),
        ({"img_size": "32"}, "img_size"),
        ({"mean": [0.5, 0.5]}, "3 finite numbers"),
        ({"mean": [1e300, 0.5, 0.5]}, "3 finite numbers"),
        ({"mean": [float("nan"), 0.5, 0.5]}, "not finite"),
        ({"std": [0.0, 0.5, 0.5]}, "std positive"),
        ({"std": [1e-40, 0.5, 0.5]}, "std positive"),
        ({"std": [float("inf"), 0.5, 0.5]}, "not finite"),
        ({"std": [True, 0.5, 0.5]}, "std"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"crop_pct": None}, "crop_pct"),
        ({"crop_mode": "centre"}, "Did you mean 'center'"),
        ({"interpolation": "cubic"}, "Did you mean 'bicubic'"),
        ({"library": "os"}, "transform library"),
        ({"preset": 3}, "preset"),
        ({"size": 32}, "size"),
    ],
    ids=str,
)
def test_what_a_file_says_about_preprocessing_is_checked(change, words: str) -> None:
    config = build_transform("none", (32, 32)).config | change
    with pytest.raises(ValueError, match=words) as caught:
        read_transform(config, "preprocessing of x.safetensors")
    assert str(caught.value).startswith("preprocessing of x.safetensors ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [None, [], "none", 3, {"img_size": {"a": []}}], ids=str)
def test_preprocessing_of_another_form_is_refused(config) -> None:
    with pytest.raises(ValueError, match="expected form"):
        read_transform(config, "preprocessing of x.safetensors")


def test_a_file_cannot_ask_for_augmentation() -> None:
    config = build_transform("strong", (32, 32), train=True).config
    transform = read_transform(config, "preprocessing")
    plain = build_transform("none", (32, 32))
    assert torch.equal(transform(photo(), 1), plain(photo(), 2))


def test_a_process_that_gets_a_transform_gets_nothing_on_a_device() -> None:
    """The images of another loader were normalised on a GPU before, and a worker would open that GPU."""
    transform = build_transform("none", (8, 8), train=False)
    pixels = torch.arange(192, dtype=torch.uint8).view(8, 8, 3)
    expected = transform.normalise(pixels)
    assert transform.normalise(pixels.to("meta")).device.type == "meta"
    received = pickle.loads(pickle.dumps(transform))
    assert received.normalise._on_devices == {}
    assert torch.equal(received.normalise(pixels), expected)


@pytest.mark.parametrize("library", ["albumentations", "torchvision"])
@pytest.mark.parametrize("img_size", [(32, 128), (128, 32), (16, 400)])
def test_narrow_images_are_cropped_for_models_of_another_shape(img_size, library: str) -> None:
    """The box in the middle, where no other fits, had no pixel."""
    transform = build_transform("light", img_size, train=True, library=library)
    for size in [(1, 1), (1, 99), (99, 1), (2, 99), (99, 2), (3, 500), (500, 3)]:
        for seed in range(3):
            image = transform(Image.new("RGB", size), seed)
            assert image.shape[1:] == img_size and image.isfinite().all()
