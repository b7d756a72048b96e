"""Names and one-line descriptions of models, methods and data sets, without heavy imports."""

from __future__ import annotations

from typing import Any

MODELS: dict[str, str] = {
    "vim_nano_patch8_64": "1.0 M parameters, images of 64 px: trains on a CPU",
    "vim_tiny_patch8_64": "6.9 M parameters, images of 64 px",
    "vim_tiny_patch16_224": "Vim-Ti, 7.1 M parameters, 196 patches",
    "vim_tiny_patch16_stride8_224": "Vim-Ti+, overlapping patches of stride 8, 729 patches",
    "vim_small_patch16_224": "Vim-S, 25.8 M parameters, 196 patches",
    "vim_small_patch16_stride8_224": "Vim-S+, overlapping patches of stride 8, 729 patches",
    "vim_base_patch16_224": "Vim-B, 97.6 M parameters, 196 patches",
    "test_vim": "20 thousand parameters, images of 32 px, for tests",
}
METHODS: dict[str, str] = {
    "prodial": "projector-targeted diagonal-centric linear transformation",
    "lora": "low-rank update",
    "dora": "low-rank update with learned row norms",
    "bitfit": "biases only",
    "linear": "classification head only",
    "full": "every weight",
    "ft": "whole targeted projectors",
    "strong": "LoRA on in_proj, out_proj and x_proj",
}
DATASETS: dict[str, str] = {
    "flowers": "Oxford Flowers-102",
    "caltech": "Caltech-101",
    "cars": "Stanford Cars",
    "folder": "a folder with one subfolder per class",
    "synthetic_flowers": "embedded generator",
}
_LOW_RANK: dict[str, tuple[Any, str]] = {
    "rank": (16, "rank"),
    "alpha": (8.0, "scale"),
    "dropout": (0.0, "dropout"),
}
METHOD_FIELDS: dict[str, dict[str, tuple[Any, str]]] = {
    "prodial": {
        **_LOW_RANK,
        "block_size": (4, "size of diagonal blocks"),
        "variant": ("free", "free: D_b = I + D_a; paper: the published formula"),
    },
    "lora": dict(_LOW_RANK),
    "dora": dict(_LOW_RANK),
    "bitfit": {},
    "linear": {},
    "full": {},
    "ft": {},
    "strong": dict(_LOW_RANK),
}
