"""What the tests of analyses share: a small Vim that an adapter has changed, and a run folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import vimtune
from vimtune.adapters import adapter_parameters
from vimtune.analysis.subject import Loss, Subject
from vimtune.recipe import Recipe
from vimtune.training import train

FEW = {"species": 3, "train_per_species": 4, "val_per_species": 2, "test_per_species": 2}
"""Generated flowers, of which 6 are test images."""


@pytest.fixture(scope="session", autouse=True)
def coarse_pictures() -> Iterator[None]:
    """Drawing is most of the time of a report, and nobody looks at these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vimtune.analysis.report.DPI", 10)
        yield


def changed_vim(method: str = "lora", **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A random Vim, and the same under an adapter whose tensors are off their start."""
    torch.manual_seed(0)
    before = timm.create_model("test_vim", num_classes=5).eval()
    after = vimtune.inject(copy.deepcopy(before), method, **options).eval()
    with torch.no_grad():
        for entry in adapter_parameters(after):
            entry.parameter.add_(0.02 * torch.randn_like(entry.parameter))
    return before, after


@pytest.fixture(scope="session")
def subject() -> Subject:
    """ProDiaL on a small Vim, two batches of images, and the losses of two training batches."""
    before, after = changed_vim("prodial", rank=2, block_size=4)
    batches = list(torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1)))

    def losses() -> Iterator[Loss]:
        for images in batches:
            yield lambda forward, images=images: F.cross_entropy(forward(images), torch.arange(5))

    return Subject(before, after, {"file": "<b>run</b>"}, batches, losses)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """The folder of a run of one epoch on a few images."""
    folder = tmp_path_factory.mktemp("analysis") / "run"
    train(
        Recipe(
            dataset_kwargs=FEW,
            model="test_vim",
            pretrained=False,
            peft="lora",
            rank=2,
            lr=0.01,
            num_workers=0,
            epochs=1,
            batch_size=6,
            device="cpu",
            backend="torch",
            output_dir=str(folder),
        )
    )
    return folder
