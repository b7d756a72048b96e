"""Vision Mamba backbones in timm's registry."""

from vimtune.models.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from vimtune.models.mixer import BiMambaMixer
from vimtune.models.vim import VisionMamba, checkpoint_filter_fn, resize_pos_embed

__all__ = [
    "BiMambaMixer",
    "CheckpointError",
    "VisionMamba",
    "checkpoint_filter_fn",
    "load_checkpoint",
    "read_checkpoint",
    "resize_pos_embed",
]
