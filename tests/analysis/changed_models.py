"""A small Vim that an adapter has changed, and the images of a small run."""

from __future__ import annotations

import copy

import timm
import torch

import vimtune
from vimtune.adapters import adapter_parameters

FEW = {"species": 3, "train_per_species": 4, "val_per_species": 2, "test_per_species": 2}
"""Generated flowers, of which 6 are test images."""


def changed_vim(method: str = "lora", **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A random Vim, and the same under an adapter whose tensors are off their start."""
    torch.manual_seed(0)
    before = timm.create_model("test_vim", num_classes=5).eval()
    after = vimtune.inject(copy.deepcopy(before), method, **options).eval()
    with torch.no_grad():
        for entry in adapter_parameters(after):
            entry.parameter.add_(0.02 * torch.randn_like(entry.parameter))
    return before, after
