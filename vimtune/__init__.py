"""vimtune: transfer learning for Vision Mamba."""

__version__ = "0.1.0"
