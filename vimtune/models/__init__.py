"""Vision Mamba backbones in timm's registry, and the table of all models that vimtune knows.

The table (`registry.py`) and the options (`options.py`) do without torch; everything else is imported on
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vimtune.models.registry import MODELS, ModelEntry, list_models, register_model

if TYPE_CHECKING:
    from vimtune.models.checkpoint import (
        CheckpointError,
        checkpoint_filter_fn,
        load_checkpoint,
        read_checkpoint,
        resize_pos_embed,
    )
    from vimtune.models.creation import create_listed_model
    from vimtune.models.mixer import BiMambaMixer
    from vimtune.models.vim import VisionMamba

_HOMES = {
    "CheckpointError": "checkpoint",
    "checkpoint_filter_fn": "checkpoint",
    "load_checkpoint": "checkpoint",
    "read_checkpoint": "checkpoint",
    "resize_pos_embed": "checkpoint",
    "create_listed_model": "creation",
    "BiMambaMixer": "mixer",
    "VisionMamba": "vim",
}
"""In which module the names are that need torch."""

__all__ = [
    "MODELS",
    "BiMambaMixer",
    "CheckpointError",
    "ModelEntry",
    "VisionMamba",
    "checkpoint_filter_fn",
    "create_listed_model",
    "list_models",
    "load_checkpoint",
    "read_checkpoint",
    "register_model",
    "resize_pos_embed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vimtune.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vimtune.models.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
