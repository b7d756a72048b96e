"""Names, descriptions and options of models, methods and data sets, from their registries."""

from __future__ import annotations

from typing import Any

from vimtune.data import list_datasets
from vimtune.methods import METHODS as METHODS_OF_PACKAGE
from vimtune.methods import method_fields
from vimtune.models.registry import list_models

Fields = dict[str, tuple[str, Any, str]]
"""Fields of a method: name -> (type as it is written, default, help)."""


def _methods() -> tuple[dict[str, str], dict[str, Fields]]:
    """Summaries and fields of all methods."""
    summaries = {name: method.summary for name, method in METHODS_OF_PACKAGE.items()}
    return summaries, {name: method_fields(name) for name in summaries}


MODELS: dict[str, str] = list_models()
METHODS, METHOD_FIELDS = _methods()
DATASETS: dict[str, str] = list_datasets()
