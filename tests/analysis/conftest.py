"""What the tests of analyses share: a small Vim that an adapter has changed, and a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from changed_models import FEW, changed_vim

from vimtune.analysis.subject import Loss, Subject
from vimtune.recipe import Recipe
from vimtune.training import train


@pytest.fixture(scope="session", autouse=True)
def coarse_pictures() -> Iterator[None]:
    """Drawing is most of the time of a report, and nobody looks at these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vimtune.pages.page.DPI", 10)
        yield


@pytest.fixture(scope="session", autouse=True)
def images_of_analyses(each_flower_is_painted_once: None) -> None:
    """Runs and their analyses see the same images."""


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
            pictures=False,
            output_dir=str(folder),
        )
    )
    return folder
