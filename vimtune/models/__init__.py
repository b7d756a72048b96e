"""Vision Mamba backbones in timm's registry."""

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

__all__ = [
    "BiMambaMixer",
    "CheckpointError",
    "VisionMamba",
    "checkpoint_filter_fn",
    "create_listed_model",
    "load_checkpoint",
    "read_checkpoint",
    "resize_pos_embed",
]
