"""Learning from a teacher: its part in the loss, its input, and runs with one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vimtune
from vimtune.data import build_transform
from vimtune.recipe import Recipe, RecipeError
from vimtune.runtime.precision import build_autocast
from vimtune.tasks.images.distillation import Distillation, Teacher
from vimtune.training.state import load_run_state

pytestmark = pytest.mark.usefixtures("no_pictures_in_this_file", "each_flower_is_painted_once")

PLAIN = build_transform("none", (8, 8))
RUN: dict[str, Any] = {
    "dataset_kwargs": {"species": 3, "train_per_species": 4, "val_per_species": 2, "test_per_species": 2},
    "num_workers": 0,
    "model": "test_vim",
    "pretrained": False,
    "peft": "full",
    "epochs": 2,
    "batch_size": 6,
    "device": "cpu",
    "backend": "torch",
    "mixup": 0.8,
}
"""A run of four steps."""


class Mean(nn.Module):
    """Answers with the mean of each channel, of which there are as many as classes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * images.mean((2, 3))


def teacher(own=PLAIN, students=PLAIN) -> Teacher:
    return Teacher(Mean(), own, students, build_autocast("none", torch.device("cpu")))


def dense_soft(student: list[float], answer: list[float], temperature: float) -> float:
    """T^2 KL(teacher || student) of one image, from the definition."""

    def probabilities(logits: list[float]) -> list[float]:
        powers = [math.exp(logit / temperature) for logit in logits]
        return [power / sum(powers) for power in powers]

    p, q = probabilities(answer), probabilities(student)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_soft_loss_is_that_of_the_definition(temperature: float, weight: float) -> None:
    images = torch.randn(4, 3, 8, 8)
    logits = torch.randn(4, 3, requires_grad=True)
    part = Distillation(teacher(), "soft", weight, temperature)
    loss = part.blend(torch.tensor(5.0), logits, images)
    answers = images.mean((2, 3)).tolist()
    expected = sum(dense_soft(s, a, temperature) for s, a in zip(logits.tolist(), answers, strict=True))
    assert loss.item() == pytest.approx((1 - weight) * 5 + weight * expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    known = torch.softmax(logits / temperature, 1) - torch.softmax(torch.tensor(answers) / temperature, 1)
    assert torch.allclose(gradient, weight * temperature * known, atol=1e-5)


def test_the_hard_loss_is_the_cross_entropy_of_the_best_class() -> None:
    images, logits = torch.randn(4, 3, 8, 8), torch.randn(4, 3)
    loss = Distillation(teacher(), "hard", 0.5, 1.0).blend(torch.tensor(2.0), logits, images)
    best = images.mean((2, 3)).argmax(1).tolist()
    expected = -sum(logits.log_softmax(1)[row, column].item() for row, column in enumerate(best))
    assert loss.item() == pytest.approx(1 + 0.5 * expected, rel=1e-5)


def test_the_teacher_sees_the_images_as_it_saw_those_of_its_training() -> None:
    pixels = torch.rand(2, 3, 8, 8)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    mean, std = (0.1, 0.5, 0.4), (0.3, 0.1, 0.7)
    own = build_transform("none", (8, 8), mean, std)
    answers = teacher(own, PLAIN).logits(normalised(PLAIN.config["mean"], PLAIN.config["std"]))
    assert torch.allclose(answers, normalised(mean, std).mean((2, 3)), atol=1e-5)
    assert not answers.requires_grad


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of a teacher and of a student of it that was stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("runs")
    vimtune.train(Recipe(**{**RUN, "model_kwargs": {"depth": 1}}, output_dir=str(folder / "teacher")))
    with pytest.raises(KeyboardInterrupt):
        vimtune.train(student_of(folder), callbacks=[StopAfterFirst()])
    return folder


def student_of(folder: Path, **changes: Any) -> Recipe:
    values = {"teacher": str(folder / "teacher"), "output_dir": str(folder / "student"), **changes}
    return Recipe(**{**RUN, **values})


class StopAfterFirst(vimtune.Callback):
    def on_epoch(self, session: Any, epoch: Any) -> None:
        if epoch.epoch == 1:
            raise KeyboardInterrupt


def test_a_resumed_student_ends_as_one_that_was_not_stopped(runs: Path, tmp_path: Path) -> None:
    whole = vimtune.train(student_of(runs, output_dir=str(tmp_path / "whole")))
    alone = vimtune.train(student_of(runs, teacher=None, output_dir=str(tmp_path / "alone")))
    assert whole.history[0]["train_loss"] != alone.history[0]["train_loss"]
    (tmp_path / "student").mkdir()  # another place, and the same teacher in another place
    for path in (runs / "student").iterdir():
        if path.is_file():
            (tmp_path / "student" / path.name).write_bytes(path.read_bytes())
    moved = tmp_path / "other teacher.safetensors"
    moved.write_bytes((runs / "teacher" / "adapter.safetensors").read_bytes())
    resumed = vimtune.train(
        student_of(
            runs, teacher=str(moved), output_dir=str(tmp_path / "student"), resume=str(tmp_path / "student")
        )
    )
    assert resumed.history[1]["train_loss"] == whole.history[1]["train_loss"]
    assert any("teacher = " in warning for warning in resumed.warnings)
    states = [load_run_state(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "student")]
    assert all(torch.equal(states[0].adapter[name], value) for name, value in states[1].adapter.items())


def test_another_teacher_is_another_run(runs: Path, tmp_path: Path) -> None:
    vimtune.train(
        Recipe(**{**RUN, "model_kwargs": {"depth": 1}, "seed": 1, "output_dir": str(tmp_path / "other")})
    )
    recipe = student_of(runs, teacher=str(tmp_path / "other"), resume=str(runs / "student"))
    with pytest.raises(ValueError, match="another run: the teacher is another"):
        vimtune.train(recipe)


def test_a_teacher_that_does_not_fit_is_refused(runs: Path, tmp_path: Path) -> None:
    other = {**RUN["dataset_kwargs"], "species": 4}
    with pytest.raises(ValueError, match="answers with 3 classes which are not the 4"):
        vimtune.train(student_of(runs, dataset_kwargs=other, output_dir=str(tmp_path / "x")))
    with pytest.raises(ValueError, match="takes images of 32 x 32 pixels, and the student 40 x 40"):
        vimtune.train(student_of(runs, img_size=40, output_dir=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher_weight": 0.7}, "teacher_weight = 0.7 does nothing without a teacher"),
        ({"teacher_weight": 0}, "teacher_weight"),
        ({"teacher": "x", "teacher_targets": "hard", "teacher_temperature": 2}, "does nothing where"),
    ],
)
def test_options_that_would_do_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**values)
