"""The analyses by name. Nothing here imports torch, because `--help` shows this table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from vimtune.text import quote, suggest

if TYPE_CHECKING:
    from vimtune.analysis.subject import Subject
    from vimtune.pages.section import Section

ANALYSES: dict[str, str] = {
    "components": "how far each group of parameters has moved, layer by layer",
    "transformation": "T = pinv(W) W' of each adapted projector: near the identity, its change diagonal?",
    "gradient": "the gradient of T at the identity on training batches: is it diagonal?",
    "similarity": "CKA of the features of each block before and after",
    "scan_maps": "what each token reads from where, in both directions of the scans",
    "cost": "FLOPs with the scan, parameters, memory of activations",
}
"""What each analysis is about, in the order of the report. The module of that name in this package has a
function `analyze`."""

NUM_IMAGES = 256
"""Images that are looked at unless a user says otherwise."""
NUM_BATCHES = 4
"""Training batches whose gradients are looked at unless a user says otherwise."""


def load_analysis(name: str) -> Callable[[Subject], Section]:
    """The function of an analysis of the table; its module is imported now."""
    function: Callable[[Subject], Section] = import_module(f"vimtune.analysis.{name}").analyze
    return function


def parse_names(text: str) -> list[str]:
    """Names of analyses as a flag gives them, "cost,similarity", in the order of the table.

    Raises:
        ValueError: a name that is not in the table.
    """
    given: Sequence[str] = [name.strip() for name in text.split(",")]
    for name in given:
        if name not in ANALYSES:
            hint = suggest(name, ANALYSES)
            raise ValueError(f"unknown analysis {quote(name)}.{hint} Known: {', '.join(ANALYSES)}")
    return [name for name in ANALYSES if name in given]
