"""One photograph of a generated flower: background, company, the flower itself, what is in front, and light.

A flower is seen in changing pose, size, light and place, before foliage, grass, bokeh or soil, next to other
flowers, and sometimes half hidden.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from vimtune.data.synthetic.painting import (
    TAU,
    Canvas,
    Pose,
    mix,
    paint_blade,
    paint_disc,
    paint_flower,
    paint_leaf,
    paint_ring,
    scale_color,
    smooth_noise,
)
from vimtune.data.synthetic.species import GENUS_SIZE, RGB, Species, make_species

_SPLIT_CODES = {"train": 0, "val": 1, "test": 2}
"""The number by which a split enters the seed of its images; a change would repaint all of them."""
_FIRST_STRANGER = 1_000_000_000
"""Number of the first of the species that are seen only far behind a subject and are in no data set."""
_GREENS: tuple[RGB, ...] = (
    (0.20, 0.42, 0.16),
    (0.33, 0.52, 0.20),
    (0.13, 0.30, 0.16),
    (0.42, 0.55, 0.30),
    (0.24, 0.40, 0.30),
)
"""Colours of leaves and stems in RGB, each varied in brightness."""
_SCENES: dict[str, tuple[RGB, RGB]] = {
    "meadow": ((0.55, 0.66, 0.42), (0.22, 0.40, 0.14)),
    "foliage": ((0.16, 0.32, 0.14), (0.08, 0.20, 0.08)),
    "bokeh": ((0.36, 0.50, 0.34), (0.14, 0.26, 0.18)),
    "soil": ((0.42, 0.34, 0.25), (0.27, 0.19, 0.13)),
    "sky": ((0.56, 0.74, 0.92), (0.70, 0.80, 0.78)),
    "dusk": ((0.36, 0.30, 0.46), (0.16, 0.20, 0.22)),
}
"""The colours of each background in RGB, at the top and at the bottom."""


def render_flower(seed: int, number: int, split: str, index: int, img_size: tuple[int, int]) -> Image.Image:
    """Image `index` of species `number`: RGB of size (H, W) = `img_size`.

    The scene depends on (seed, number, split, index) only; `img_size` sets its resolution and aspect.
    """
    rng = np.random.default_rng([seed, number, _SPLIT_CODES[split], index])
    species = make_species(seed, number)
    canvas = Canvas(*img_size)
    light = float(rng.uniform(0, TAU))
    pose = Pose(
        cx=float(rng.uniform(-0.26, 0.26)) * canvas.half_w,
        cy=float(rng.uniform(-0.26, 0.26)) * canvas.half_h,
        radius=float(rng.uniform(0.52, 0.88)),
        roll=float(rng.uniform(0, TAU)),
        squash=float(rng.uniform(0.62, 1.0)),
        tilt=float(rng.uniform(0, TAU)),
        light=light,
        blur=float(rng.choice([0.0, 0.0, 0.03, 0.05])),
    )
    scene = str(rng.choice(list(_SCENES)))
    _paint_background(canvas, scene, rng)
    _paint_company(canvas, species, seed, light, rng)
    _paint_stem(canvas, pose, rng)
    paint_flower(canvas, species, pose, rng)
    _paint_foreground(canvas, pose, rng)
    return _develop(canvas, light, rng)


def _paint_background(canvas: Canvas, scene: str, rng: np.random.Generator) -> None:
    top, bottom = _SCENES[scene]
    top, bottom = scale_color(top, rng.uniform(0.75, 1.25)), scale_color(bottom, rng.uniform(0.75, 1.25))
    ramp = (canvas.y / canvas.half_h + 1) / 2
    for channel in range(3):
        canvas.pixels[channel] = top[channel] + (bottom[channel] - top[channel]) * ramp
    canvas.pixels *= 1 + smooth_noise(rng.uniform(-0.28, 0.28, (7, 7)), canvas.height, canvas.width)
    canvas.pixels += smooth_noise(rng.uniform(-0.05, 0.05, (3, 5, 5)), canvas.height, canvas.width)

    def spot() -> tuple[float, float]:
        return float(rng.uniform(-1, 1)) * canvas.half_w, float(rng.uniform(-1, 1)) * canvas.half_h

    def green() -> RGB:
        return scale_color(_GREENS[rng.integers(len(_GREENS))], rng.uniform(0.7, 1.3))

    if scene == "foliage":
        for _ in range(rng.integers(7, 12)):
            x, y = spot()
            length = rng.uniform(0.5, 1.1)
            paint_leaf(
                canvas, x, y, rng.uniform(0, TAU), length, length * rng.uniform(0.16, 0.3), green(), 0.03
            )
    elif scene == "meadow":
        for _ in range(rng.integers(8, 14)):
            x, y = spot()
            lean = rng.uniform(-0.4, 0.4)
            paint_blade(
                canvas,
                x,
                canvas.half_h + 0.1,
                x + lean,
                y,
                lean * 0.3,
                rng.uniform(0.02, 0.05),
                green(),
                0.03,
            )
    elif scene in ("bokeh", "dusk"):
        for _ in range(rng.integers(6, 12)):
            x, y = spot()
            color = mix(green(), rng.random(3), rng.uniform(0, 0.6))
            glow = mix(color, (1, 1, 0.85), rng.uniform(0.1, 0.6))
            paint_ring(canvas, x, y, rng.uniform(0.08, 0.32), glow, 0.04, rng.uniform(0.15, 0.5))
    elif scene == "soil":
        for _ in range(rng.integers(8, 16)):
            x, y = spot()
            grey = rng.uniform(0.25, 0.6)
            paint_disc(canvas, x, y, rng.uniform(0.03, 0.14), (grey, grey * 0.92, grey * 0.82), 0.05, 0.7)
    else:
        for _ in range(rng.integers(2, 5)):
            x, y = spot()
            paint_disc(canvas, x, y, rng.uniform(0.2, 0.6), (0.95, 0.96, 0.97), 0.5, rng.uniform(0.2, 0.5))


def _paint_company(
    canvas: Canvas, species: Species, seed: int, light: float, rng: np.random.Generator
) -> None:
    """Smaller flowers behind, out of focus: of the same genus, so that colours mislead, or strangers."""
    for _ in range(rng.integers(0, 4)):
        cousin = species.number - species.number % GENUS_SIZE + int(rng.integers(GENUS_SIZE))
        stranger = _FIRST_STRANGER + int(rng.integers(400))
        other = make_species(seed, cousin if rng.random() < 0.5 else stranger)
        side = 1 if rng.random() < 0.5 else -1
        pose = Pose(
            cx=side * float(rng.uniform(0.55, 1.0)) * canvas.half_w,
            cy=float(rng.uniform(-1.0, 1.0)) * canvas.half_h,
            radius=float(rng.uniform(0.16, 0.34)),
            roll=float(rng.uniform(0, TAU)),
            squash=float(rng.uniform(0.6, 1.0)),
            tilt=float(rng.uniform(0, TAU)),
            light=light,
            blur=float(rng.uniform(0.06, 0.12)),
        )
        paint_flower(canvas, other, pose, rng)


def _paint_stem(canvas: Canvas, pose: Pose, rng: np.random.Generator) -> None:
    green = scale_color(_GREENS[rng.integers(len(_GREENS))], rng.uniform(0.9, 1.3))
    foot = pose.cx + float(rng.uniform(-0.5, 0.5))
    paint_blade(
        canvas, foot, canvas.half_h + 0.2, pose.cx, pose.cy, float(rng.uniform(-0.15, 0.15)), 0.07, green, 0.0
    )
    for _ in range(rng.integers(0, 3)):
        angle = float(rng.uniform(0, TAU))
        length = pose.radius * float(rng.uniform(0.9, 1.35))
        paint_leaf(
            canvas, pose.cx, pose.cy, angle, length, length * 0.2, scale_color(green, rng.uniform(0.7, 1.1))
        )


def _paint_foreground(canvas: Canvas, pose: Pose, rng: np.random.Generator) -> None:
    """Things in front: a blade or a leaf, dew, a ladybird."""
    green = scale_color(_GREENS[rng.integers(len(_GREENS))], rng.uniform(0.8, 1.4))
    chance = rng.random(4)
    at = rng.uniform(-1, 1, 8)
    if chance[0] < 0.3:
        x = pose.cx + at[0] * 0.9
        paint_blade(
            canvas, x, canvas.half_h + 0.1, x + at[1] * 0.8, at[2] * 0.9 - 0.2, at[3] * 0.2, 0.07, green, 0.05
        )
    if chance[1] < 0.2:
        corner_x, corner_y = math.copysign(canvas.half_w, at[4]), math.copysign(canvas.half_h, at[5])
        angle = math.atan2(pose.cy - corner_y, pose.cx - corner_x) + at[6] * 0.5
        paint_leaf(canvas, corner_x, corner_y, angle, 0.9, 0.26, green, 0.06)
    if chance[2] < 0.2:
        for spot in rng.uniform(-0.7, 0.7, (5, 2)):
            x, y = pose.cx + spot[0] * pose.radius, pose.cy + spot[1] * pose.radius
            paint_disc(canvas, x, y, 0.035, (0.9, 0.95, 1.0), 0.03, 0.35)
            paint_disc(canvas, x - 0.012, y - 0.012, 0.012, (1, 1, 1), 0.012, 0.9)
    if chance[3] < 0.08:
        x, y = pose.cx + at[6] * 0.5 * pose.radius, pose.cy + at[7] * 0.5 * pose.radius
        paint_disc(canvas, x, y - 0.07, 0.045, (0.08, 0.07, 0.07), 0.02, 1.0)
        paint_disc(canvas, x, y, 0.085, (0.80, 0.10, 0.06), 0.02, 1.0)
        for dot_x, dot_y in ((-0.04, -0.02), (0.04, -0.02), (-0.03, 0.04), (0.03, 0.04), (0.0, 0.0)):
            paint_disc(canvas, x + dot_x, y + dot_y, 0.016, (0.08, 0.07, 0.07), 0.012, 1.0)


def _develop(canvas: Canvas, light: float, rng: np.random.Generator) -> Image.Image:
    """Light, colour cast, vignette, contrast and grain; float canvas to 8 bit."""
    strength = float(rng.uniform(0.0, 0.22))
    slope = 1 + strength * (canvas.x * math.cos(light) + canvas.y * math.sin(light))
    vignette = 1 - float(rng.uniform(0.0, 0.12)) * (canvas.x**2 + canvas.y**2)
    cast = 1 + rng.uniform(-0.07, 0.07) * np.array([1.0, 0.1, -1.0], np.float32)
    gain = (float(rng.uniform(0.70, 1.20)) * cast).astype(np.float32).reshape(3, 1, 1)
    contrast = np.float32(rng.uniform(0.85, 1.12))
    grain = float(rng.uniform(0.004, 0.02))
    saturation = np.float32(rng.uniform(0.7, 1.1))
    pixels = canvas.pixels * (slope * vignette) * gain
    grey = pixels.mean(axis=0)
    pixels = grey + (pixels - grey) * saturation
    pixels = (pixels - 0.45) * contrast + 0.45
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(grain)
    pixels = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
