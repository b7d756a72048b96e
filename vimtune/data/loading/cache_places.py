"""Where the decoded images of a data set may be kept between epochs. Without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vimtune import parsers

CACHES = ("auto", "none", "host", "device")
"""Nowhere, in the memory of the host, or on the device that trains, which then augments them, too. "auto" is
the device where that is a GPU with room for them, and else nowhere."""

Agreement = Callable[[bool], bool]
"""Is told in every rank whether the images fit there, and says whether they fit in all of them."""


def cache_place(value: Any) -> str:
    """One of `CACHES`. What could be said before there were several is still understood: true is the host,
    false none.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, str) and value in CACHES:
        return value
    try:
        return "host" if parsers.boolean(value) else "none"
    except ValueError:
        raise ValueError(f"expected one of {', '.join(CACHES)}") from None
