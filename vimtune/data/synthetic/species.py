"""Imaginary flower species: what sets them apart, and what they are called.

Species come in genera of four. A genus fixes the centre, veins and sepals; its members differ in three
two-way traits - petal number, petal outline, pattern - coded so that any two members differ in exactly two
of them. All colours are shared by two neighbouring genera. So neither colour nor any single trait names a
species.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

GENUS_SIZE = 4
"""Number of species in a genus."""
RGB = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""


@dataclass(frozen=True)
class Outline:
    """Petal half-width at u in [0, 1] from base to tip: width * u^base * (1 - u)^tip, scaled to its maximum.

    Attributes:
        width: largest half-width, as a share of the distance between petals (1: they just touch).
        base, tip: exponents; small is blunt, large is tapering.
        notch: how far the tip is cut in, as a share of the length.
        ruffle: amplitude of the wavy edge.
    """

    width: float
    base: float
    tip: float
    notch: float = 0.0
    ruffle: float = 0.0


OUTLINES = {
    "round": Outline(1.25, 0.55, 0.40),
    "heart": Outline(1.20, 0.80, 0.38, notch=0.26),
    "pointed": Outline(0.85, 0.55, 1.15),
    "spoon": Outline(0.95, 1.60, 0.40),
    "lance": Outline(0.55, 0.60, 0.80),
    "frilled": Outline(1.15, 0.70, 0.40, ruffle=0.16),
    "strap": Outline(0.70, 0.35, 0.25),
}
"""Outlines of petals by name."""
_OUTLINE_PAIRS = (
    ("round", "pointed"),
    ("heart", "lance"),
    ("spoon", "pointed"),
    ("strap", "round"),
    ("frilled", "lance"),
    ("heart", "pointed"),
    ("spoon", "strap"),
    ("round", "lance"),
)
"""Pairs of outlines that one genus chooses from; the two are easy to tell apart."""
_COUNT_PAIRS = ((4, 6), (5, 8), (3, 5), (6, 10), (5, 7), (8, 13), (4, 7), (6, 9))
"""Pairs of numbers of petals that one genus chooses from."""
_PATTERNS = ("plain", "eye", "edged", "striped", "tipped", "spotted")
"""Kinds of colouring of a petal."""
_PATTERN_PAIRS = tuple((a, b) for i, a in enumerate(_PATTERNS) for b in _PATTERNS[i + 1 :])
"""Pairs of patterns that one genus chooses from."""
CENTRES = ("disc", "stamens", "corona", "cone", "star")
"""Kinds of the middle of a flower."""

_CENTRE_COLORS = ((0.14, 0.85, 0.95), (0.10, 0.90, 0.80), (0.20, 0.60, 0.75), (0.04, 0.75, 0.40))
"""Colours of the middle of a flower in HSV."""
# Colour families in HSV: petals, contrast colours to choose from, one adjective per member of a genus.
_FAMILIES: tuple[tuple[tuple[float, float, float], tuple[tuple[float, float, float], ...], str], ...] = (
    ((0.985, 0.86, 0.84), ((0.13, 0.75, 1.0), (0.95, 0.9, 0.32)), "crimson scarlet ruby cherry"),
    ((0.070, 0.84, 0.98), ((0.99, 0.85, 0.62), (0.13, 0.5, 1.0)), "amber apricot copper tangerine"),
    ((0.140, 0.80, 0.98), ((0.03, 0.85, 0.70), (0.08, 0.9, 0.85)), "golden lemon saffron canary"),
    ((0.110, 0.08, 0.98), ((0.92, 0.6, 0.85), (0.76, 0.5, 0.70)), "ivory snowy pearl milky"),
    ((0.950, 0.46, 0.97), ((0.93, 0.9, 0.62), (0.12, 0.2, 1.0)), "rosy blush coral salmon"),
    ((0.880, 0.74, 0.86), ((0.86, 0.15, 1.0), (0.80, 0.9, 0.38)), "fuchsia orchid berry magenta"),
    ((0.765, 0.66, 0.74), ((0.15, 0.55, 1.0), (0.76, 0.12, 1.0)), "violet plum royal amethyst"),
    ((0.615, 0.68, 0.90), ((0.58, 0.08, 1.0), (0.70, 0.9, 0.42)), "azure sapphire cobalt cornflower"),
    ((0.730, 0.34, 0.93), ((0.78, 0.8, 0.50), (0.15, 0.35, 1.0)), "lilac lavender mauve wisteria"),
    ((0.095, 0.34, 1.00), ((0.98, 0.65, 0.80), (0.06, 0.8, 0.72)), "peach creamy honey buttermilk"),
)


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    "star moon sun dawn dusk frost ember silver velvet fairy river meadow thorn feather clover wind "
    "rain cloud cedar marsh stone heath forest mirror lantern whisper summer winter shadow bright "
    "iron reef dragon swan wren lark sparrow fox hare elder"
)
"""First parts of the nouns in the names of species."""
_SECOND = _words(
    "bell cup crown wheel lace poppy daisy rose wort slipper lily spear bloom fan cap trumpet tassel "
    "veil crest button goblet ray aster mallow spur"
)
"""Second parts of these nouns."""
_PLACES = _words(
    "mountain coastal desert island alpine northern southern eastern western lowland highland arctic"
)
"""What stands in front of a noun when all of them have been given to a genus."""


@dataclass(frozen=True)
class Species:
    """All that is the same in every image of a species. Colours are RGB in [0, 1].

    Attributes:
        number: number of the species in its world, from 0.
        name: what it is called, such as "crimson starbell".
        petals: petals in a circle.
        whorls: circles of petals, one inside the other.
        outline: shape of a petal.
        pattern: where on a petal the contrast colour lies.
        color: colour of the petals.
        contrast: second colour of the petals.
        veins: strength of the veins on petals, as a share of brightness.
        centre: kind of the middle, one of `CENTRES`.
        centre_size: radius of the middle in petal lengths.
        centre_color: its colour.
        centre_dark: its colour in shade.
        sepals: whether green tips show between the petals.
    """

    number: int
    name: str
    petals: int
    whorls: int
    outline: Outline
    pattern: str
    color: RGB
    contrast: RGB
    veins: float
    centre: str
    centre_size: float
    centre_color: RGB
    centre_dark: RGB
    sepals: bool


@lru_cache(maxsize=8192)
def make_species(seed: int, number: int) -> Species:
    """Species `number` (0, 1, ...) of the world `seed`; a pure function of both."""
    genus, member = divmod(number, GENUS_SIZE)
    pair = (genus + 1) // 2
    family = _FAMILIES[_walk(seed, 0, len(_FAMILIES), pair)]
    contrast = family[1][_walk(seed, 1, len(family[1]), pair)]
    centre_hsv = _CENTRE_COLORS[_walk(seed, 2, len(_CENTRE_COLORS), pair)]
    counts = _COUNT_PAIRS[_walk(seed, 3, len(_COUNT_PAIRS), genus)]
    outlines = _OUTLINE_PAIRS[_walk(seed, 4, len(_OUTLINE_PAIRS), genus)]
    patterns = _PATTERN_PAIRS[_walk(seed, 5, len(_PATTERN_PAIRS), genus)]
    centre = CENTRES[_walk(seed, 6, len(CENTRES), genus)]
    draw = np.random.default_rng([seed, 101, genus])
    centre_size = float(draw.uniform(0.20, 0.30))
    veins = float(draw.choice([0.0, 0.10, 0.22]))
    sepals = bool(draw.random() < 0.5)
    whorls = 2 if draw.random() < 0.3 else 1
    which_count, which_pattern = (member >> 1) & 1, member & 1

    own = np.random.default_rng([seed, 102, number])
    hue, saturation, value = family[0]
    color = (
        hue + float(own.uniform(-0.012, 0.012)),
        saturation * float(own.uniform(0.93, 1.07)),
        value * float(own.uniform(0.96, 1.02)),
    )
    return Species(
        number=number,
        name=species_name(seed, number),
        petals=counts[which_count],
        whorls=whorls,
        outline=OUTLINES[outlines[which_count ^ which_pattern]],
        pattern=patterns[which_pattern],
        color=_rgb(*color),
        contrast=_rgb(*contrast),
        veins=veins,
        centre=centre,
        centre_size=centre_size,
        centre_color=_rgb(*centre_hsv),
        centre_dark=_rgb(centre_hsv[0] - 0.03, min(1.0, centre_hsv[1] + 0.1), centre_hsv[2] * 0.5),
        sepals=sepals,
    )


def species_name(seed: int, number: int) -> str:
    """A name such as "crimson starbell"; different species never share one."""
    genus, member = divmod(number, GENUS_SIZE)
    adjective = _FAMILIES[_walk(seed, 0, len(_FAMILIES), (genus + 1) // 2)][2].split()[member]
    num_nouns = len(_FIRST) * len(_SECOND)
    noun = _walk(seed, 7, num_nouns, genus % num_nouns)
    first, second = divmod(noun, len(_SECOND))
    words = [adjective, _FIRST[first] + _SECOND[second]]
    lap = genus // num_nouns
    while lap:  # With thousands of species the nouns start over, with a place in front.
        lap, place = divmod(lap - 1, len(_PLACES))
        words.insert(1, _PLACES[place])
    return " ".join(words)


def _walk(seed: int, stream: int, size: int, step: int) -> int:
    """A number below `size`: every `size` steps visit all of them, so that neighbours differ."""
    return int(_shuffled(seed, stream, size, step // size)[step % size])


@lru_cache(maxsize=1024)
def _shuffled(seed: int, stream: int, size: int, lap: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, lap]).permutation(size)


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    return colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
