"""Paints flowers: analytic, anti-aliased shapes on a float canvas, at any size.

Coordinates: the shorter side of the image spans [-1, 1], x to the right, y downwards; `px` is a pixel's side
in these units. A canvas is float32 (3, H, W), RGB in [0, 1]. Shapes are drawn inside their bounding box only.
Petals are drawn in polar form: every pixel evaluates the petal of its own sector and, where petals overlap,
the two neighbours, so the cost does not grow with the number of petals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vimtune.data.synthetic.species import RGB, Outline, Species

TAU = 2 * math.pi
"""A full turn in radians."""
_TABLE = 512
"""Entries of the tables along a petal."""


class Canvas:
    """A picture in progress."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        side = min(height, width)
        self.px = 2.0 / side
        self.half_w, self.half_h = width / side, height / side
        self.pixels = np.empty((3, height, width), np.float32)
        self.x, self.y = _axes(height, width)

    def window(self, cx: float, cy: float, radius: float) -> tuple[slice, slice] | None:
        """Rows and columns of a square around (cx, cy); None when it lies outside."""
        x0 = max(int((cx - radius + self.half_w) / self.px), 0)
        x1 = min(int((cx + radius + self.half_w) / self.px) + 2, self.width)
        y0 = max(int((cy - radius + self.half_h) / self.px), 0)
        y1 = min(int((cy + radius + self.half_h) / self.px) + 2, self.height)
        return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None

    def blend(self, area: tuple[slice, slice], color: RGB | np.ndarray, cover: np.ndarray) -> None:
        """Lay `color` (one RGB, or (3, h, w)) over `area` with opacity `cover` (h, w)."""
        part = self.pixels[:, area[0], area[1]]
        source = color if isinstance(color, np.ndarray) else np.array(color, np.float32).reshape(3, 1, 1)
        part += cover * (source - part)


@lru_cache(maxsize=16)
def _axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    side = min(height, width)
    x = ((np.arange(width, dtype=np.float32) + 0.5) * 2 - width) / side
    y = ((np.arange(height, dtype=np.float32) + 0.5) * 2 - height) / side
    return x[None, :], y[:, None]


@lru_cache(maxsize=64)
def _stretch(size: int, knots: int) -> np.ndarray:
    """Matrix (size, knots) of smooth interpolation from `knots` values to `size`."""
    position = np.linspace(0, knots - 1, size, dtype=np.float32)
    left = np.minimum(position.astype(int), knots - 2)
    t = position - left
    t = t * t * (3 - 2 * t)
    matrix = np.zeros((size, knots), np.float32)
    matrix[np.arange(size), left] = 1 - t
    matrix[np.arange(size), left + 1] += t
    return matrix


def smooth_noise(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch a small grid (..., a, b) smoothly to (..., height, width)."""
    values = values.astype(np.float32)
    stretched: np.ndarray = _stretch(height, values.shape[-2]) @ values @ _stretch(width, values.shape[-1]).T
    return stretched


def mix(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, t: float) -> RGB:
    """Colour between `a` (t = 0) and `b` (t = 1)."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def scale_color(color: Sequence[float], factor: float) -> RGB:
    """Brighter or darker, kept in [0, 1]."""
    r, g, b = (min(max(c * factor, 0.0), 1.0) for c in color)
    return r, g, b


def unit(values: np.ndarray) -> np.ndarray:
    """Clip an array of our own to [0, 1], in place (`np.clip` costs more than the arithmetic around it)."""
    np.maximum(values, 0, out=values)
    np.minimum(values, 1, out=values)
    return values


# --------------------------------------------------------------------------- simple things


def paint_disc(
    canvas: Canvas, cx: float, cy: float, radius: float, color: RGB, soft: float, opacity: float
) -> None:
    """A disc whose edge fades over `soft`."""
    soft = max(soft, canvas.px)
    area = canvas.window(cx, cy, radius + soft)
    if area is None:
        return
    distance = np.hypot(canvas.x[:, area[1]] - cx, canvas.y[area[0]] - cy)
    canvas.blend(area, color, unit((radius - distance) / soft + 0.5) * opacity)


def paint_ring(
    canvas: Canvas, cx: float, cy: float, radius: float, color: RGB, soft: float, opacity: float
) -> None:
    """An out-of-focus highlight: a disc that is brighter at its rim."""
    area = canvas.window(cx, cy, radius + soft)
    if area is None:
        return
    distance = np.hypot(canvas.x[:, area[1]] - cx, canvas.y[area[0]] - cy)
    inside = unit((radius - distance) / max(soft, canvas.px) + 0.5)
    canvas.blend(area, color, inside * opacity * (0.6 + 0.4 * unit(distance / radius) ** 3))


def paint_leaf(
    canvas: Canvas,
    cx: float,
    cy: float,
    angle: float,
    length: float,
    width: float,
    color: RGB,
    soft: float = 0.0,
    opacity: float = 1.0,
) -> None:
    """A lens-shaped leaf from (cx, cy) along `angle`, with a midrib and side veins, one half in shade."""
    soft = max(soft, canvas.px)
    mx, my = cx + math.cos(angle) * length / 2, cy + math.sin(angle) * length / 2
    area = canvas.window(mx, my, length / 2 + width + soft)
    if area is None:
        return
    dx, dy = canvas.x[:, area[1]] - mx, canvas.y[area[0]] - my
    along = (dx * math.cos(angle) + dy * math.sin(angle)) * (2 / length)
    across = dy * math.cos(angle) - dx * math.sin(angle)
    half = width * np.maximum(1 - along * along, 0) * (1 - 0.25 * along)
    cover = unit((half - np.abs(across)) / soft + 0.5) * (np.abs(along) < 1) * opacity
    rib = np.exp(-((across / (0.06 * width + 0.6 * soft)) ** 2))
    veins = 0.06 * np.cos((along * length / width * 1.6 - np.abs(across) / width * 2.2) * TAU)
    shade = np.where(across > 0, 0.84, 1.04) + veins * (width > 4 * canvas.px) + 0.22 * rib
    canvas.blend(area, np.array(color, np.float32).reshape(3, 1, 1) * shade, cover)


def paint_blade(
    canvas: Canvas,
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    bend: float,
    width: float,
    color: RGB,
    soft: float,
) -> None:
    """A tapering curved stroke from (x0, y0), where it is `width` wide, to (x1, y1): grass or a stem."""
    soft = max(soft, canvas.px)
    length = math.hypot(x1 - x0, y1 - y0)
    mx, my = (x0 + x1) / 2, (y0 + y1) / 2
    area = canvas.window(mx, my, length / 2 + abs(bend) + width + soft)
    if area is None:
        return
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    dx, dy = canvas.x[:, area[1]] - x0, canvas.y[area[0]] - y0
    along = (dx * ux + dy * uy) / length
    across = dy * ux - dx * uy - 4 * bend * along * (1 - along)
    half = width * (1 - 0.75 * np.minimum(np.maximum(along, 0), 1))
    cover = unit((half - np.abs(across)) / soft + 0.5) * unit((1 - along) * length / soft)
    cover *= unit(along * length / soft + 1)
    shade = 1 - 0.25 * np.minimum(np.maximum(across / width, -1), 1)
    canvas.blend(area, np.array(color, np.float32).reshape(3, 1, 1) * shade, cover)


# --------------------------------------------------------------------------- flowers


@lru_cache(maxsize=256)
def _outline_table(outline: Outline) -> tuple[np.ndarray, np.ndarray]:
    """Half-width at u (maximum 1), and |its slope|, along a petal."""
    u = (np.arange(_TABLE) + 0.5) / _TABLE
    shape = u**outline.base * (1 - u) ** outline.tip
    shape /= shape.max()
    if outline.ruffle:
        shape *= 1 + outline.ruffle * np.sin(u * 26) * u
    slope = np.abs(np.gradient(shape, 1 / _TABLE))
    return shape.astype(np.float32), slope.astype(np.float32)


def _petal_colors(species: Species, tint: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """RGB (3, _TABLE) along the middle of a petal: shading and the patterns that depend on u only."""
    u = ((np.arange(_TABLE, dtype=np.float32) + 0.5) / _TABLE)[None]
    base = (np.array(species.color, np.float32) * tint)[:, None]
    colors = base * (0.74 + 0.36 * np.sqrt(u))
    if species.pattern == "eye":
        colors = colors + (contrast - colors) * unit((0.50 - u) / 0.12 + 0.5)
    elif species.pattern == "tipped":
        colors = colors + (contrast - colors) * unit((u - 0.72) / 0.16 + 0.5)
    clipped: np.ndarray = np.minimum(colors, 1).astype(np.float32)
    return clipped


def _pattern_mask(pattern: str, u: np.ndarray, s: np.ndarray, sharp: float) -> np.ndarray | None:
    """Where the contrast colour lies, for patterns that depend on s, the position across (-1 to 1), too."""
    mask: np.ndarray | None = None
    if pattern == "edged":
        mask = unit((np.maximum(np.abs(s), (u - 0.28) / 0.66) - 0.74) / 0.12 + 0.5)
    elif pattern == "striped":
        mask = np.exp(-((s / 0.24) ** 2)) * unit((0.92 - u) * 6)
    elif pattern == "spotted":
        dots = np.cos(u * (TAU * 4.2)) * np.cos(s * (TAU * 1.05))
        mask = unit((dots - 0.35) * 5 * sharp) * unit((0.85 - u) * 6)
    return mask


class Pose:
    """Where and how a flower stands. Angles in radians, lengths in canvas units.

    Attributes:
        cx, cy, radius: centre and petal length.
        roll: rotation in the flower's plane.
        squash: apparent height over width, 1 when seen from the front.
        tilt: direction in which it is squashed.
        light: direction from which the light comes.
        blur: how far edges are smeared, in canvas units.
    """

    def __init__(
        self,
        cx: float,
        cy: float,
        radius: float,
        roll: float,
        squash: float,
        tilt: float,
        light: float,
        blur: float = 0.0,
    ) -> None:
        self.cx, self.cy, self.radius = cx, cy, radius
        self.roll, self.squash, self.tilt = roll, squash, tilt
        self.light, self.blur = light, blur


def paint_flower(canvas: Canvas, species: Species, pose: Pose, rng: np.random.Generator) -> None:
    """Paint one flower; `rng` gives petals their small differences."""
    jitter = rng.random((3, species.whorls, species.petals), dtype=np.float32) * 2 - 1
    tint = 1 + (rng.random(3, dtype=np.float32) * 2 - 1) * 0.14
    # Patterns fade differently from plant to plant.
    contrast = np.array(
        mix(species.color, species.contrast, float(rng.uniform(0.55, 1))), np.float32
    ).reshape(3, 1)
    area = canvas.window(pose.cx, pose.cy, pose.radius * 1.05)
    if area is None:
        return
    dx, dy = (canvas.x[:, area[1]] - pose.cx) / pose.radius, (canvas.y[area[0]] - pose.cy) / pose.radius
    # Undo the tilt: stretch along the direction in which the flower is foreshortened.
    cos_t, sin_t = math.cos(pose.tilt), math.sin(pose.tilt)
    a, b = dx * cos_t + dy * sin_t, (dy * cos_t - dx * sin_t) / pose.squash
    square = a * a + b * b
    inside = np.nonzero(square < 1.04)
    if not len(inside[0]):
        return
    # From here on, arrays hold one value per pixel inside the flower: shape (n,), colours (3, n).
    view = canvas.pixels[:, area[0], area[1]]
    part = view[:, inside[0], inside[1]]
    radius = np.sqrt(square[inside])
    theta = np.arctan2(b[inside], a[inside]) - np.float32(pose.roll)
    edge = max(canvas.px, pose.blur) / pose.radius / math.sqrt(pose.squash)
    light = pose.light - pose.tilt - pose.roll

    if species.sepals:
        _paint_sepals(part, radius, theta, species.petals, edge)
    for whorl in range(species.whorls):
        shrink = 1.0 - 0.32 * whorl
        # The inner circle stands in the gaps of the outer one and touches the middle of the flower only.
        near = slice(None) if not whorl else np.flatnonzero(radius < shrink * 1.02)
        ring = part[:, near]
        _paint_whorl(
            ring,
            radius[near] / np.float32(shrink),
            theta[near] - np.float32(whorl * math.pi / species.petals),
            species,
            tint * np.float32(1.0 if whorl else 0.93),
            contrast,
            jitter[:, whorl],
            edge / shrink,
            light,
        )
        part[:, near] = ring
    near = np.flatnonzero(radius < 1.6 * species.centre_size)
    middle = part[:, near]
    _paint_centre(
        middle,
        radius[near] / np.float32(species.centre_size),
        theta[near],
        species,
        edge / species.centre_size,
    )
    part[:, near] = middle
    view[:, inside[0], inside[1]] = part


def _lay(part: np.ndarray, color: Sequence[float] | np.ndarray, cover: np.ndarray) -> None:
    """Lay `color`, one RGB or (3, n), over `part` (3, n) with opacity `cover` (n,)."""
    source = color if isinstance(color, np.ndarray) else np.array(color, np.float32).reshape(3, 1)
    part += cover * (source - part)


def _paint_sepals(part: np.ndarray, radius: np.ndarray, theta: np.ndarray, petals: int, edge: float) -> None:
    """Green tips in the gaps between petals."""
    step = TAU / petals
    turned = theta / np.float32(step) % 1.0 * np.float32(step) - np.float32(step / 2)
    u = unit(radius * np.cos(turned) / 0.86)
    half = 0.26 * np.sqrt(u) * (1 - u)
    _lay(part, (0.30, 0.46, 0.18), unit((half - np.abs(radius * np.sin(turned))) / edge + 0.5) * (u < 1))


def _paint_whorl(
    part: np.ndarray,
    radius: np.ndarray,
    theta: np.ndarray,
    species: Species,
    tint: np.ndarray,
    contrast: np.ndarray,
    jitter: np.ndarray,
    edge: float,
    light: float,
) -> None:
    """One circle of petals; each lies over its left neighbour, as in a twisted bud.

    Args:
        part: (3, n) colours, painted in place.
        radius, theta: (n,) polar coordinates, petal length 1.
        tint: (3,) factors on the petals' colour.
        contrast: (3, 1) colour of the pattern.
        jitter: (3, petals) in [-1, 1]: angle, length, brightness.
        edge: width of a pixel in petal lengths.
    """
    outline, num = species.outline, species.petals
    shape, slope = _outline_table(outline)
    step = TAU / num
    width = min(outline.width * math.sin(min(step / 2, 1.2)) * 0.72, 0.62)
    # Width of the edge's ramp: a pixel, seen along the petal's half-width. Capped, since tips end vertically.
    ramp = 1 / (edge * np.sqrt(1 + np.minimum(slope * width, 3) ** 2)).astype(np.float32)
    colors = _petal_colors(species, tint, contrast)
    angles, lengths = jitter[0] * np.float32(0.09 * step), 1 - 0.07 * (jitter[1] + 1) / 2
    glow = (1 + 0.06 * jitter[2] + 0.10 * np.cos(np.arange(num) * step - light)).astype(np.float32)
    sector = theta / np.float32(step)
    nearest = np.floor(sector + 0.5)
    within = (sector - nearest) * np.float32(step)
    nearest = nearest.astype(np.int32)
    veins = species.veins * min(0.08 / edge - 1, 1) if edge < 0.08 else 0.0
    for offset in (-1, 0, 1) if outline.width > 0.6 else (0,):
        petal = (nearest + offset) % num
        angle = within - (np.float32(offset * step) + angles[petal])
        u = radius * np.cos(angle) / lengths[petal]
        v = radius * np.sin(angle)
        if outline.notch:
            u += u * outline.notch * np.exp(-((v / (0.45 * width)) ** 2)) * unit(u * 2 - 1)
        index = np.minimum(np.maximum(u * _TABLE, 0), _TABLE - 1).astype(np.int32)
        half = shape[index] * np.float32(width)
        depth = half - np.abs(v)
        tip = 1 - u
        front = u > 0
        cover = unit(depth * ramp[index] + 0.5) * unit(tip / edge) * front
        shadow = unit(np.minimum(depth, tip) / 0.12 + 0.4) * front
        part *= 1 - 0.38 * shadow * (1 - cover)
        s = np.minimum(np.maximum(v / (half + 1e-3), -1), 1)
        color = colors[:, index]
        mask = _pattern_mask(species.pattern, u, s, min(0.12 / edge, 1.0))
        if mask is not None:
            color += mask * (contrast - color)
        relief = 1.04 - 0.16 * s * s - 0.10 * np.exp(-((s / 0.16) ** 2))
        if veins:
            relief -= veins * np.cos(s * 11) ** 2 * unit(tip)
        color *= relief * glow[petal]
        part += cover * (color - part)


def _paint_centre(
    part: np.ndarray, radius: np.ndarray, theta: np.ndarray, species: Species, edge: float
) -> None:
    """The flower's middle; `radius` is 1 at its rim."""
    color = np.array(species.centre_color, np.float32).reshape(3, 1)
    dark = np.array(species.centre_dark, np.float32).reshape(3, 1)
    part *= 1 - 0.35 * unit((1.35 - radius) / 0.5)  # This paints a soft shade around it.

    def within(limit: float | np.ndarray, distance: np.ndarray, soft: float = edge) -> np.ndarray:
        return unit((limit - distance) / soft + 0.5)

    if species.centre == "disc":
        seeds = np.cos(theta * 13 + radius * 17) * np.cos(theta * 8 - radius * 17)
        _lay(
            part,
            dark + (color - dark) * unit(0.75 + 0.35 * seeds - 0.35 * (radius < 0.45)),
            within(1, radius),
        )
    elif species.centre == "stamens":
        _lay(part, dark, within(0.42, radius))
        spoke = np.abs((theta * (12 / TAU)) % 1.0 - 0.5) * (TAU / 12) * radius
        _lay(part, mix(species.centre_color, (1, 1, 0.9), 0.5), within(0.07, spoke) * (radius < 1.2) * 0.85)
        _lay(part, color, within(0.20, np.hypot(spoke, radius - 1.2)))
    elif species.centre == "corona":
        wave = np.cos(theta * 10)
        _lay(part, color * (0.55 + 0.36 * radius + 0.08 * wave), within(1.25 + 0.10 * wave, radius))
        _lay(part, dark * 0.8, within(0.72, radius, max(edge, 0.3)))
        _lay(part, mix(species.centre_color, (1, 1, 0.8), 0.4), within(0.25, radius))
    elif species.centre == "cone":
        ring = np.abs((theta * (16 / TAU)) % 1.0 - 0.5) * (TAU / 16) * radius
        _lay(part, dark * (0.6 + 0.5 * unit(1 - radius)), within(1, radius))
        _lay(part, color, within(0.13, np.hypot(ring, radius - 0.86)))
        _lay(part, color, within(0.22, radius, max(edge, 0.2)) * 0.6)
    else:  # The last kind is the star.
        _lay(part, color, within(0.72 + 0.40 * np.cos(theta * 5), radius))
        _lay(part, dark, within(0.30, radius))
