"""A run small enough for a test, and a look at what it left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimtune.train.checkpoint import load_run_state

TINY: dict[str, Any] = {
    "dataset": "synthetic_flowers",
    "dataset_kwargs": {"species": 5, "train_per_species": 5, "val_per_species": 2, "test_per_species": 2},
    "num_workers": 0,
    "model": "test_vim",
    "pretrained": False,
    "peft": "lora",
    "rank": 2,
    "epochs": 3,
    "batch_size": 8,
    "lr": 3e-3,
    "device": "cpu",
    "backend": "torch",
    "threads": 1,
    "log_interval": 1,
}
"""25 training images: 4 steps an epoch, the last one on a single image."""


def weights(folder: str | Path) -> dict[str, Tensor]:
    """Trained tensors of a run's checkpoint."""
    return load_run_state(Path(folder) / "checkpoint.safetensors").adapter


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Records of a run without what depends on the clock."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key != "images_per_second"} for r in records]


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
