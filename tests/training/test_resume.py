"""Interrupted runs continue exactly, and only where they can."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from interruption import interrupt_at
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, assert_same_weights, metrics, weights

from vimtune.cli import main
from vimtune.recipe import Recipe, load_recipe
from vimtune.training import Interrupted, saving
from vimtune.training import train as run_training
from vimtune.training.identity import ResumeError

pytestmark = pytest.mark.usefixtures("no_pictures_in_this_file")

EVERYTHING = {
    "ema": 0.9,
    "mixup": 0.4,
    "drop_path": 0.2,
    "grad_accum": 2,
    "weight_decay": 0.1,
    "batch_size": 4,
    "cache": "device",
}
"""Whatever has a state or draws random numbers."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs: `plain`, and `everything` with all that has a state switched on."""
    folders = {}
    for name, changes in {"plain": {}, "everything": EVERYTHING}.items():
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        run_training(Recipe(**{**TINY, "output_dir": str(folders[name]), **changes}))
    return folders


@pytest.mark.parametrize(
    ("kind", "where", "call", "number"),
    [
        ("plain", "_compute_gradients", 1, signal.SIGINT),
        ("plain", "_compute_gradients", 4, signal.SIGINT),  # the last step of an epoch
        ("everything", "_compute_gradients", 6, signal.SIGTERM),
        ("plain", "evaluate", 2, signal.SIGINT),
        ("plain", "evaluate", 4, signal.SIGTERM),  # the final scores
    ],
)
def test_resume_is_exact(kind, where, call, number, tiny, straight, monkeypatch, capsys):
    recipe = tiny(**(EVERYTHING if kind == "everything" else {}))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at(patch, where, call, number)
        with pytest.raises(Interrupted):
            run_training(recipe)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert f"vimtune train --resume {recipe.run.output_dir}" in capsys.readouterr().out
    assert not Path(recipe.run.output_dir, "report.json").exists()

    report = run_training(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert_same_weights(weights(recipe.run.output_dir), weights(straight[kind]))
    assert metrics(recipe.run.output_dir) == metrics(straight[kind])
    assert Path(recipe.run.output_dir, "recipe.yaml").read_text() == Path(
        straight[kind], "recipe.yaml"
    ).read_text().replace(str(straight[kind]), recipe.run.output_dir)
    assert report.epochs == 3
    assert report.seconds > report.train_seconds > 0


def test_command_line(tiny, straight, tmp_path, monkeypatch, capsys):
    recipe = tiny()
    recipe.save(tmp_path / "recipe.yaml")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 2, signal.SIGINT)
        assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 130
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command == ["vimtune", "train", "--resume", recipe.run.output_dir]
    assert main(command[1:]) == 0
    assert_same_weights(weights(recipe.run.output_dir), weights(straight["plain"]))
    assert main(command[1:]) == 2
    assert capsys.readouterr().err.startswith(f"error: {recipe.run.output_dir} is finished")


def test_metrics_have_every_step_once(straight):
    steps = [record["step"] for record in metrics(straight["plain"]) if record["kind"] == "step"]
    assert steps == list(range(1, 13))
    epochs = [record["epoch"] for record in metrics(straight["plain"]) if record["kind"] == "epoch"]
    assert epochs == [1, 2, 3]


def train_until_killed_in_a_save(recipe: Recipe) -> None:
    """Make a run that ends between writing and moving its second checkpoint, for a process of its own."""
    replace, saves = os.replace, []
    saving.SHARE = 1.0  # Every epoch is worth saving.

    def counted(source, target):
        if Path(target).name == "checkpoint.safetensors":
            saves.append(target)
            if len(saves) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counted
    run_training(recipe)


def test_sigkill_in_the_middle_of_a_save(tiny, straight):
    recipe = tiny()
    context = multiprocessing.get_context("fork")  # so that it does not have to import torch
    process = context.Process(target=train_until_killed_in_a_save, args=(recipe,))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    left = [path.name for path in Path(recipe.run.output_dir).glob(".*.vimtune-tmp")]
    assert len(left) == 1  # the process died between writing and moving
    # Epoch 2 is in the metrics and its adapter may be saved, but its checkpoint is not.
    assert metrics(recipe.run.output_dir)[-1]["epoch"] == 2

    run_training(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert_same_weights(weights(recipe.run.output_dir), weights(straight["plain"]))
    assert metrics(recipe.run.output_dir) == metrics(straight["plain"])
    assert not list(Path(recipe.run.output_dir).glob(".*.vimtune-tmp"))
    events = EventAccumulator(str(Path(recipe.run.output_dir, "tensorboard"))).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


@pytest.fixture
def half_done(tiny, monkeypatch) -> Recipe:
    """A run stopped in its second epoch."""
    recipe = tiny()
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 6, signal.SIGINT)
        with pytest.raises(Interrupted):
            run_training(recipe)
    return load_recipe(None, {"resume": recipe.run.output_dir})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft": "dora"}, "peft was 'lora' and is now 'dora'"),
        ({"rank": 3}, "rank of lora was 2 and is now 3"),
        ({"batch_size": 4}, "batch_size was 8 and is now 4"),
        ({"seed": 7}, "seed was 0 and is now 7"),
        ({"data_seed": 7}, "data_seed was 0 and is now 7"),
        ({"model": "vim_nano_patch8_64"}, "model was 'test_vim'"),
        (
            {"dataset_kwargs": {"species": 4, "train_per_species": 5, "val_per_species": 2}},
            "it has 5 classes and the data now 4",
        ),
    ],
)
def test_resume_refuses_another_run(half_done, changes, expected):
    before = Path(half_done.run.output_dir, "checkpoint.safetensors").read_bytes()
    with pytest.raises(ResumeError, match="belongs to another run") as error:
        run_training(half_done.replace(**changes))
    assert expected in str(error.value)
    assert Path(half_done.run.output_dir, "checkpoint.safetensors").read_bytes() == before


def test_resume_refuses_other_base_weights(half_done, tmp_path):
    state = {name: value + 0.01 for name, value in base_weights(half_done).items()}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ResumeError, match="the base weights are others"):
        run_training(half_done.replace(checkpoint=str(tmp_path / "other.safetensors")))


def test_other_base_weights_by_force(half_done, tmp_path):
    state = {name: value + 0.01 for name, value in base_weights(half_done).items()}
    save_file(state, tmp_path / "other.safetensors")
    report = run_training(half_done.replace(checkpoint=str(tmp_path / "other.safetensors"), force=True))
    assert report.warnings == ["resumed although the base weights are others (--force)"]


def draw(path: Path, side: int, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value, 255 - value, 0)).save(path)


CHANGES = {
    "renamed": lambda folder: (folder / "a" / "0.png").rename(folder / "a" / "x.png"),
    "replaced": lambda folder: draw(folder / "a" / "0.png", 200, 77),
    "moved": lambda folder: (folder / "a" / "0.png").rename(folder / "b" / "x.png"),
}


@pytest.fixture
def on_files(tiny, tmp_path, monkeypatch) -> Recipe:
    """A run on image files, stopped in its second epoch."""
    for split, count in {"train": 8, "val": 2, "test": 2}.items():
        for value, label in enumerate("ab"):
            for number in range(count):
                draw(tmp_path / "images" / split / label / f"{number}.png", 32 + number, 255 * value)
    recipe = tiny(dataset="folder", data_dir=str(tmp_path / "images"), dataset_kwargs={}, epochs=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 3, signal.SIGINT)
        with pytest.raises(Interrupted):
            run_training(recipe)
    return load_recipe(None, {"resume": recipe.run.output_dir})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_resume_on_changed_images(on_files, split, capsys):
    """The number of images and the class names stay as they were."""
    folder = Path(on_files.data.data_dir, split)
    before = Path(on_files.run.output_dir, "checkpoint.safetensors").read_bytes()
    for change in CHANGES.values():
        kept = folder.parent.parent / "kept"
        shutil.copytree(folder, kept)
        change(folder)
        with pytest.raises(
            ResumeError, match=f"the images of '{split}' are others .*--force continues"
        ) as error:
            run_training(on_files)
        assert "\n" not in str(error.value)
        shutil.rmtree(folder)
        kept.rename(folder)
    assert Path(on_files.run.output_dir, "checkpoint.safetensors").read_bytes() == before
    CHANGES["moved"](folder)
    assert main(["train", "--resume", on_files.run.output_dir, "--force", "--backend", "torch"]) == 0
    report = json.loads(Path(on_files.run.output_dir, "report.json").read_text())
    assert any(f"although the images of '{split}' are others" in text for text in report["warnings"])
    assert "warning: resumed although the images" in capsys.readouterr().out
    assert not load_recipe(None, {"resume": on_files.run.output_dir}).run.force  # asked for once


def test_epochs_are_whole_where_images_were_removed(on_files):
    """The steps that were done may be more than all epochs have with the images that are left."""
    folder = on_files.run.output_dir
    run_training(on_files)
    for label in "ab":
        for number in range(4):
            Path(on_files.data.data_dir, "train", label, f"{number}.png").unlink()
    report = run_training(load_recipe(None, {"resume": folder, "epochs": 3, "force": True}))
    assert [record["step"] for record in report.history] == [2, 4, 5]


def test_resume_elsewhere_with_the_same_images(on_files, tmp_path):
    """The folder of the images has moved, and so has that of the run."""
    shutil.move(on_files.data.data_dir, tmp_path / "moved")
    shutil.move(on_files.run.output_dir, tmp_path / "moved run")
    values = {"resume": str(tmp_path / "moved run"), "data_dir": str(tmp_path / "moved")}
    assert run_training(load_recipe(None, values)).warnings == []


def base_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    from vimtune.adapters import base_parameters
    from vimtune.tasks.images.job import build_model

    return {name: value.detach().clone() for name, value in base_parameters(build_model(recipe, 5))}


def test_resume_says_what_differs(half_done, capsys):
    report = run_training(half_done.replace(lr=1e-3, log_interval=2))
    assert report.warnings == ["resumed with lr = 0.001 (was 0.003)"]
    assert "warning: resumed with lr = 0.001 (was 0.003)" in capsys.readouterr().out


def test_resume_stays_in_its_folder(half_done, tmp_path):
    with pytest.raises(ResumeError, match="continues in its own folder"):
        run_training(half_done.replace(output_dir=str(tmp_path / "elsewhere")))
    assert not (tmp_path / "elsewhere").exists()


def test_finished_run_says_so_and_more_epochs_continue_it(tiny):
    recipe = tiny(epochs=1)
    run_training(recipe)
    again = load_recipe(None, {"resume": recipe.run.output_dir})
    with pytest.raises(ResumeError, match="finished after 1 epochs: raise --epochs"):
        run_training(again)
    report = run_training(again.replace(epochs=2))
    assert report.epochs == 2
    assert report.warnings[0].startswith("resumed with epochs = 2 (was 1); the learning rate jumps")
    assert [record["epoch"] for record in report.history] == [1, 2]
    assert (
        load_recipe(
            Path(recipe.run.output_dir, "recipe.yaml"), {"resume": recipe.run.output_dir}
        ).optimisation.epochs
        == 2
    )


def test_run_killed_before_its_report_gets_one(tiny):
    recipe = tiny(epochs=1)
    first = run_training(recipe)
    Path(recipe.run.output_dir, "report.json").unlink()
    second = run_training(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert (second.top1, second.loss, second.history) == (first.top1, first.loss, first.history)
    assert Path(recipe.run.output_dir, "report.json").exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle", "empty", "missing"])
def test_unusable_checkpoint(half_done, damage, tmp_path):
    path = Path(half_done.run.output_dir, "checkpoint.safetensors")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"weight": torch.zeros(2)}, path)
    elif damage == "pickle":
        torch.save({"weight": torch.zeros(2)}, path)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(ResumeError, match=r"checkpoint\.safetensors"):
        run_training(half_done)


def test_epochs_are_counted_on_where_max_steps_had_ended_one(tiny, capsys):
    recipe = tiny("cut", epochs=3, max_steps=2)
    run_training(recipe)
    capsys.readouterr()
    run_training(load_recipe(None, {"resume": recipe.run.output_dir, "max_steps": 5}))
    told = capsys.readouterr().out
    assert "resumed in epoch 2 after step 2; epoch 1 had ended early and has no rest" in told
    assert "epoch 2/2" in told and "epoch 2/1" not in told
