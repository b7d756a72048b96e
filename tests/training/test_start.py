"""A command that is given again always gets on: before the first state, in the middle, after the end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import interrupt_at
from tiny_runs import assert_same_weights, metrics, weights

from vimtune.cli import main
from vimtune.recipe import RecipeError, load_recipe
from vimtune.training import Interrupted, train
from vimtune.training.identity import ResumeError
from vimtune.training.run import Run
from vimtune.training.stepper import Stepper

pytestmark = pytest.mark.usefixtures("no_pictures")


class Killed(BaseException):
    """Ends a run where it is, as SIGKILL does."""


@pytest.fixture
def dies_in(monkeypatch):
    """`dies_in("_update", 3)`: the next run ends before that call of a method of the run or its stepper."""

    def install(name: str, call: int):
        owner = Run if hasattr(Run, name) else Stepper
        original, calls = getattr(owner, name), []

        def wrapped(run, *arguments):
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return original(run, *arguments)

        monkeypatch.setattr(owner, name, wrapped)

    return install


def again(recipe, **changes):
    """The same command line once more."""
    return train(load_recipe(None, {**recipe.to_dict(), "resume": "auto", **changes}))


def test_the_same_command_at_any_time(tiny, dies_in, capsys):
    straight = train(tiny("straight"))
    recipe = tiny("again", resume="auto")
    for name, call in [("complete", 1), ("_train_epoch", 1), ("_update", 3), ("_save", 2), ("_finish", 1)]:
        dies_in(name, call)
        with pytest.raises(Killed):
            again(recipe)
        assert not Path(recipe.run.output_dir, "report.json").exists()
    report = again(recipe)
    assert (report.top1, report.loss, report.epochs) == (straight.top1, straight.loss, 3)
    assert_same_weights(weights(recipe.run.output_dir), weights(straight.run_dir))
    assert metrics(recipe.run.output_dir) == metrics(straight.run_dir)
    before = Path(recipe.run.output_dir, "checkpoint.safetensors").stat()
    capsys.readouterr()
    assert again(recipe) == report  # nothing is left to do: the report again, and nothing else
    said = capsys.readouterr().out
    assert said.startswith(f"{recipe.run.output_dir} is finished already; this is its report:\n")
    assert f"top-1 ({report.split})" in said
    assert Path(recipe.run.output_dir, "checkpoint.safetensors").stat() == before
    with pytest.raises(
        ResumeError, match=r"finished after 3 epochs with other settings \(lr was 0.003 and is"
    ):
        again(recipe, lr=0.5)
    assert again(recipe, epochs=4).epochs == 4


def test_auto_on_the_command_line(tiny, tmp_path, capsys):
    recipe = tiny(epochs=1)
    recipe.save(tmp_path / "recipe.yaml")
    command = ["train", "--config", str(tmp_path / "recipe.yaml"), "--resume", "auto"]
    assert [main(command), main(command)] == [0, 0]
    assert main(["train", "--resume", "auto"]) == 2
    assert "resume = 'auto' needs output_dir" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="needs output_dir"):
        load_recipe(None, {"resume": "auto"})


def test_a_run_killed_before_its_first_state_starts_over(tiny, dies_in):
    straight = train(tiny("straight", epochs=1))
    recipe = tiny("again", epochs=1)
    dies_in("_end_epoch", 1)
    with pytest.raises(Killed):
        train(recipe)
    with pytest.raises(RecipeError, match=r"holds another run.*--resume"):
        load_recipe(None, recipe.to_dict())
    report = train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert report.warnings == [] and report.top1 == straight.top1
    assert_same_weights(weights(recipe.run.output_dir), weights(straight.run_dir))
    assert metrics(recipe.run.output_dir) == metrics(straight.run_dir)
    events = EventAccumulator(str(Path(recipe.run.output_dir, "tensorboard"))).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize("resume", ["auto", "folder"])
@pytest.mark.parametrize("left", ["adapter.safetensors", "report.json"])
def test_results_without_a_state_are_not_overwritten(tiny, resume, left):
    recipe = tiny(epochs=1)
    path = Path(recipe.run.output_dir)
    path.mkdir()
    recipe.save(path / "recipe.yaml")
    (path / left).write_bytes(b"precious")
    values = recipe.to_dict() if resume == "auto" else {}
    with pytest.raises(ResumeError, match=f"there is no checkpoint .* but there is {left} of a run"):
        train(load_recipe(None, {**values, "resume": "auto" if resume == "auto" else str(path)}))
    assert (path / left).read_bytes() == b"precious"


def test_auto_makes_no_folder_for_a_run_that_cannot_start(tiny):
    recipe = tiny(rank=1000, resume="auto")
    with pytest.raises(ValueError, match="rank"):
        train(recipe)
    assert not Path(recipe.run.output_dir).exists()


def test_an_interrupted_run_goes_on(tiny, monkeypatch):
    recipe = tiny(epochs=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 6, signal.SIGTERM)
        with pytest.raises(Interrupted):
            again(recipe)
    assert again(recipe).steps == 8
