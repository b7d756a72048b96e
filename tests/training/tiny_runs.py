"""A run small enough for a test, and a look at what it left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vimtune.loggers import LoggedRun
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.tasks.classes.answers import ClassAnswers, answers_of
from vimtune.tasks.classification import Classification
from vimtune.tasks.images.report import ImageReport, build_image_report
from vimtune.tasks.images.scoring import evaluation_of
from vimtune.tasks.job import Outcome
from vimtune.training.report import shared_fields
from vimtune.training.state import EpochRecord, Progress, load_run_state

TINY: dict[str, Any] = {
    "dataset": "synthetic_flowers",
    "dataset_kwargs": {"species": 5, "train_per_species": 5, "val_per_species": 2, "test_per_species": 2},
    "num_workers": 0,
    "model": "test_vim",
    "model_kwargs": {"depth": 2},
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


def answers_with(confusion: Tensor) -> ClassAnswers:
    """Answers that have this confusion matrix (C, C), each with a logit of 1 for what was answered."""
    classes = len(confusion)
    pairs = torch.arange(classes**2).repeat_interleave(confusion.flatten())
    return answers_of(torch.eye(classes)[pairs % classes], pairs // classes)


def outcome_of(confusion: Tensor | None = None) -> Outcome:
    """Scores of a run of one epoch that was never made, with `confusion` on its test split."""
    confusion = torch.tensor([[3, 1], [0, 4]]) if confusion is None else confusion
    count = int(confusion.sum())
    found = evaluation_of(answers_with(confusion), loss=float(count))
    selected = {"top1": 50.0, "top5": None}
    return Outcome(Classification(), found, selected, selected, 10.0)


def report_of(
    confusion: Tensor | None = None, classes: list[str] | None = None, folder: str | Path = "run"
) -> ImageReport:
    """Report of that run."""
    outcome = outcome_of(confusion)
    num_classes = len(outcome.evaluation.confusion)
    record = EpochRecord(1, 4, 1e-3, train_loss=1.2, rate=10.0, loss=1.1, scores=dict(outcome.best))
    shared = shared_fields(
        Recipe(**TINY),
        Progress(epoch=1, step=4, best_epoch=1, history=[record]),
        loss=outcome.evaluation.loss,
        split="test",
        data={split: f"{split} images" for split in ("train", "val", "test")},
        method_config={"lora": {"rank": 2}},
        trainable=100,
        head=20,
        total=1000,
        adapter_bytes=4000,
        left_out=0,
        processes=Processes(),
        memory=(100.0, "process"),
        cuda_graph=False,
        run_dir=Path(folder),
        history=[record.flat("images")],
    )
    return build_image_report(shared, outcome, classes or [f"class {index}" for index in range(num_classes)])


def logged_run(folder: Path, first_step: int = 0, kept_bytes: int = 0) -> LoggedRun:
    """What loggers know of a run."""
    return LoggedRun(
        folder=folder,
        settings={"lr": 3e-3, "peft": "lora", "layers": None, "betas": [0.9, 0.999]},
        unit="images",
        splits=("val",),
        scores=("top1", "top5"),
        first_step=first_step,
        kept_bytes=kept_bytes,
    )


def weights(folder: str | Path) -> dict[str, Tensor]:
    """Trained tensors of a run's checkpoint."""
    return load_run_state(Path(folder) / "checkpoint.safetensors").adapter


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Records of a run without what depends on the clock."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if not key.endswith("_per_second")} for r in records]


def assert_close_metrics(one: str | Path, other: str | Path, **tolerance: float) -> None:
    """Records of two runs agree: floats within `tolerance`, everything else exactly."""
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        for name in ours.keys() | theirs.keys():
            expected = theirs[name]
            if isinstance(expected, float):
                expected = pytest.approx(expected, **tolerance)
            assert ours[name] == expected, name


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The norm of all differences as a part of that of the values.

    It is for runs that differ by rounding. Adam makes as much of a rounded gradient that is nearly 0 as of
    any other, so that single weights may be apart by a step of the learning rate; which ones these are is a
    matter of the processor.
    """
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (apart / sum(float(values.square().sum()) for values in other.values())) ** 0.5
