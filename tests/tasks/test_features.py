"""A head that is trained on features computed once is the head that is trained on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vimtune
from vimtune.recipe import Recipe
from vimtune.tasks.images import job as image_job
from vimtune.tasks.images.features import ImagesOrFeatures
from vimtune.tasks.report import Report
from vimtune.training.state import load_run_state

pytestmark = pytest.mark.usefixtures("no_pictures", "each_flower_is_painted_once")

RUN: dict[str, Any] = {
    "dataset_kwargs": {"species": 3, "train_per_species": 5, "val_per_species": 2, "test_per_species": 2},
    "num_workers": 0,
    "model": "test_vim",
    "pretrained": False,
    "peft": "linear",
    "augmentation": "none",
    "epochs": 3,
    "batch_size": 4,
    "lr": 0.01,
    "device": "cpu",
    "backend": "torch",
}
"""A run of twelve steps, each epoch of which ends with a smaller batch."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images whose features were computed, batch by batch."""
    seen: list[int] = []
    compute = ImagesOrFeatures.features

    def count(self: ImagesOrFeatures, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return compute(self, images)

    monkeypatch.setattr(ImagesOrFeatures, "features", count)
    return seen


def train(folder: Path, **changes: Any) -> Report:
    return vimtune.train(Recipe(**{**RUN, **changes}, output_dir=str(folder)))


def test_it_ends_where_training_on_images_does(tmp_path: Path, counted: list[int], monkeypatch) -> None:
    quick = train(tmp_path / "quick")
    assert sum(counted) == 15 + 6 + 6  # each image of each split once in three epochs
    monkeypatch.setattr(image_job, "repeats_its_features", lambda model: False)
    slow = train(tmp_path / "slow")
    assert sum(counted) == 15 + 6 + 6
    for before, after in zip(slow.history, quick.history, strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-5)
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    states = [
        load_run_state(tmp_path / name / "checkpoint.safetensors").adapter for name in ("quick", "slow")
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-6)
    assert quick.top1 == slow.top1 and (tmp_path / "quick" / "examples.png").exists()


def test_a_cache_that_has_no_effect_is_mentioned(tmp_path: Path, counted: list[int], caplog) -> None:
    train(tmp_path / "run", cache="device", epochs=1)
    (said,) = [record.message for record in caplog.records if "no effect" in record.message]
    assert "images are read once and none is kept, so cache = 'device' has no effect" in said


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path, counted: list[int]) -> None:
    whole = train(tmp_path / "whole")

    class Stop(vimtune.Callback):
        def on_epoch(self, session: Any, epoch: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vimtune.train(Recipe(**RUN, output_dir=str(tmp_path / "part")), callbacks=[Stop()])
    part = train(tmp_path / "part", resume=str(tmp_path / "part"))
    assert [record["train_loss"] for record in part.history] == [
        record["train_loss"] for record in whole.history
    ]


def test_without_a_test_split_nothing_is_computed_again(tmp_path: Path, counted: list[int]) -> None:
    report = train(tmp_path / "run", test=False)
    assert report.split == "val" and report.num_images == 6 and sum(counted) == 21


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation": "light"},
        {"mixup": 0.5},
        {"drop_path": 0.2},
        {"model_kwargs": {"drop_rate": 0.1}},
        {"peft": "bitfit"},
        {"peft": "linear+bitfit"},
        {"on_corrupt": "skip"},
    ],
)
def test_where_features_may_differ_images_are_trained_on(tmp_path: Path, counted, changes) -> None:
    train(tmp_path / "run", epochs=1, **changes)
    assert not counted
