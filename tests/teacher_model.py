"""The teacher that configs name: a model of a package of a user's own, known only where it is wanted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vimtune.models.registry import MODELS
from vimtune.plugins import import_package

sys.path.append(str(Path(__file__).resolve().parent.parent))
TEACHER = "resnet_gn_64"
"""Name of the model."""
import_package("benchmarks.teacher")
_ENTRY = MODELS._things.pop(TEACHER)  # other tests go through all models


@contextmanager
def teacher_known() -> Iterator[None]:
    """The model is registered for a while."""
    MODELS.add(TEACHER, _ENTRY)
    try:
        yield
    finally:
        MODELS._things.pop(TEACHER)
