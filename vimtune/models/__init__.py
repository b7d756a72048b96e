"""Vision Mamba backbones in timm's registry, and the table of all models that vimtune knows.

The table (`registry.py`) and the options (`options.py`) do without torch; everything else is imported on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vimtune.late_names import late_names
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
    "vimtune.models.checkpoint": (
        "CheckpointError",
        "checkpoint_filter_fn",
        "load_checkpoint",
        "read_checkpoint",
        "resize_pos_embed",
    ),
    "vimtune.models.creation": ("create_listed_model",),
    "vimtune.models.mixer": ("BiMambaMixer",),
    "vimtune.models.vim": ("VisionMamba",),
}
"""Modules that define the names which need torch."""

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

__getattr__, __dir__ = late_names(__name__, _HOMES)
