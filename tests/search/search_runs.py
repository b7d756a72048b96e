"""A search small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vimtune.recipe import Recipe
from vimtune.search.plan import Plan

TINY: dict[str, Any] = {
    "dataset": "synthetic_flowers",
    "dataset_kwargs": {"species": 3, "train_per_species": 4, "val_per_species": 3, "test_per_species": 1},
    "num_workers": 0,
    "model": "test_vim",
    "img_size": 16,
    "pretrained": False,
    "epochs": 2,
    "warmup_epochs": 0,
    "batch_size": 8,
    "device": "cpu",
    "backend": "torch",
    "threads": 1,
    "pictures": False,
}
"""12 training images, 2 steps an epoch."""

SPACE: dict[str, Any] = {
    "parts": {
        "proj": {
            "method": "lora",
            "targets": ["in_proj", "out_proj"],
            "options": {"rank": {"low": 1, "high": 4, "log": True}, "alpha": {"value": 0.5, "times": "rank"}},
        },
        "biases": {"method": "bitfit"},
    },
    "keys": {"lr": {"low": 1e-3, "high": 1e-1, "log": True}, "weight_decay": {"choose": [0, 0.01]}},
}
"""A space of two parts and two keys."""


def tiny_plan(trials: int = 3, space: dict[str, Any] | None = None, **changes: Any) -> Plan:
    """The plan of a small search; `changes` are keys of its recipe."""
    recipe = Recipe(**{**TINY, **changes})
    return Plan("small", recipe, space or SPACE, trials=trials, seed=0, prune=True)


def flags(folder: Path, space: Path, **more: Any) -> list[str]:
    """The flags of `vimtune search` for a small search into `folder`."""
    space.write_text(yaml.safe_dump(SPACE))
    given = {**TINY, "space": space, "output_dir": folder, **more}
    words = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if value is False:
            words.append(f"--no-{flag}")
        else:
            text = yaml.safe_dump(value, default_flow_style=True) if isinstance(value, dict) else str(value)
            words += [f"--{flag}", text.strip()]
    return words
