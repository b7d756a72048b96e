"""The style of all pictures, and how they are saved.

Matplotlib's objects are used directly: pyplot would keep a list of figures for the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator

from vimtune.files import atomic_write
from vimtune.run_folder import writing

FALLBACK_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans CJK KR",
    "WenQuanYi Micro Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Nirmala UI",
    "Arial Unicode MS",
)
"""Fonts with many scripts, one of which most systems have, for names that DejaVu Sans cannot show."""


def font_families() -> list[str]:
    """The fonts of pictures that this system has, in the order in which they are asked for a character."""
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(family for family in FALLBACK_FONTS if family in installed)]


@contextmanager
def picture_style() -> Iterator[None]:
    """Matplotlib's own style, whatever the user has set, and no name is read as a formula."""
    changes = {"text.parse_math": False, "font.family": font_families()}
    with matplotlib.style.context(["default", changes]):
        yield


def whole_numbers() -> MaxNLocator:
    """Ticks for an axis of whole numbers."""
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def save_picture(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG file, in one step."""
    FigureCanvasAgg(figure)
    with picture_style(), writing(path):
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
