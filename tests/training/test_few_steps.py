"""A run that was over before it could learn much says so, and what to do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from vimtune import cli
from vimtune.recipe import Recipe
from vimtune.training import Callback, run, train
from vimtune.training.few_steps import ENOUGH, few_steps_warning

pytestmark = pytest.mark.usefixtures("no_pictures", "short_runs_are_told_of")


@pytest.fixture
def short_runs_are_told_of(monkeypatch):
    """As outside of tests."""
    monkeypatch.setattr(run, "few_steps_warning", few_steps_warning)


class Train:
    """Training examples in batches, none of which is read."""

    def __init__(self, examples: int, recipe: Recipe) -> None:
        self.num_examples, self.batches = examples, -(-examples // recipe.optimisation.batch_size)

    def __len__(self) -> int:
        return self.batches


def warning_of(examples: int, **settings) -> str | None:
    recipe = Recipe(**settings)
    loader = Train(examples, recipe)
    steps = -(-len(loader) // recipe.optimisation.grad_accum) * recipe.optimisation.epochs
    return few_steps_warning(recipe, loader, steps)


@pytest.fixture
def photos(tmp_path):
    """Thirty photos of two kinds."""
    for number in range(30):
        path = tmp_path / "photos" / ("rose" if number % 2 else "violet") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200, number, 90 if number % 2 else 200)).save(path)
    return tmp_path / "photos"


def test_thirty_own_photos_with_the_default_batch_size(photos, tmp_path, capsys):
    settings = (
        "--dataset folder --model test_vim --no-pretrained --num-workers 0 --device cpu --backend torch"
    )
    command = ["train", "--data-dir", str(photos), *settings.split(), "--output-dir", str(tmp_path / "run")]
    assert cli.main(command) == 0
    expected = (
        "the run was over after 10 optimizer steps, 1 in each epoch of 22 training images: hardly enough to "
        "learn from. For at least 50 steps give --epochs 50, or --batch-size 4 (60 steps in 10 epochs)"
    )
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(f"warning: {expected}") == 1
    assert json.loads((tmp_path / "run" / "report.json").read_text())["warnings"] == [expected]
    assert f"<td>warning</td><td>{expected}</td>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("examples", "settings", "advice"),
    [
        (21, {}, "10 optimizer steps, 1 in"),
        (200, {}, "--epochs 13, or --batch-size 32 (70 steps in 10 epochs)"),
        (21, {"epochs": 1}, "1 optimizer step, 1 in"),
        (21, {"epochs": 1}, "give --epochs 50"),
        (200, {"grad_accum": 4}, "--epochs 50, or --batch-size 8 (70 steps in 10 epochs)"),
        (200, {"epochs": 1, "batch_size": 8}, "--epochs 2, or --batch-size 4 (50 steps in 1 epoch)"),
    ],
)
def test_the_advice_is_enough(examples, settings, advice):
    told = warning_of(examples, **settings)
    assert told is not None and advice in told
    assert ("--batch-size" in told) == ("batch-size" in advice or advice.startswith("10 "))
    epochs = int(told.partition("--epochs ")[2].partition(",")[0])
    assert warning_of(examples, **{**settings, "epochs": epochs}) is None
    assert warning_of(examples, **{**settings, "epochs": epochs - 1}) is not None
    if "--batch-size" in told:
        smaller = int(told.partition("--batch-size ")[2].partition(" ")[0])
        assert warning_of(examples, **{**settings, "batch_size": smaller}) is None


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"limit": 20}, {"epochs": ENOUGH}])
def test_who_asks_for_a_short_run_knows(settings):
    assert warning_of(20, **settings) is None


def test_a_task_without_a_limit_of_examples():
    recipe = Recipe()
    other = SimpleNamespace(data=SimpleNamespace(), optimisation=recipe.optimisation, task=recipe.task)
    assert few_steps_warning(other, Train(20, recipe), 10).startswith("the run was over after 10 ")


class Stop(Callback):
    """Ends a run after its first epoch."""

    def on_epoch(self, session, record):
        session.stop()


def test_a_run_that_is_ended_early_is_not_told_of(tiny):
    assert train(tiny("stopped"), [Stop()]).warnings == []
    (told,) = train(tiny("whole")).warnings
    assert told.startswith("the run was over after 12 optimizer steps, 4 in each epoch of 25 training images")


def test_a_run_that_goes_on_long_enough_is_no_longer_told_of(tiny):
    recipe = tiny(epochs=2)
    assert "after 8 optimizer steps" in train(recipe).warnings[0]
    longer = recipe.replace(epochs=13, resume=recipe.run.output_dir)
    assert not any("optimizer steps" in text for text in train(longer).warnings)
