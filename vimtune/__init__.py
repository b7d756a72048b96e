"""vimtune: transfer learning for Vision Mamba.

Importing the package makes `timm.create_model("vim_tiny_patch16_224", ...)` work. It imports neither
torch nor timm by itself: the models are registered with timm as soon as timm is imported, before or
after, and the functions below are loaded on first use, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vimtune._registration import register_with_timm

if TYPE_CHECKING:
    from vimtune.adapters import (
        delete_adapter,
        disabled,
        inject,
        list_adapters,
        load_adapter,
        merge,
        read_adapter_info,
        save_adapter,
        set_adapter,
        summary,
    )
    from vimtune.models import load_checkpoint

__version__ = "0.1.0"

__all__ = [
    "delete_adapter",
    "disabled",
    "inject",
    "list_adapters",
    "load_adapter",
    "load_checkpoint",
    "merge",
    "read_adapter_info",
    "save_adapter",
    "set_adapter",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vimtune' has no attribute {name!r}")
    home = "vimtune.models" if name == "load_checkpoint" else "vimtune.adapters"
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_with_timm()
