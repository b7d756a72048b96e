"""Two processes give the result of one, and neither waits for one that fails."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import two_ranks
from PIL import Image
from tiny_runs import assert_close_metrics, largest_difference, weights
from two_ranks import run_two

from vimtune.recipe import load_recipe
from vimtune.training import train
from vimtune.training.state import load_run_state


def in_two_processes(recipe, launch, folder: Path) -> str:
    """Run a recipe in two processes of ours; returns what both have printed."""
    del launch
    assert run_two(recipe, prepare=partial(two_ranks.print_to, str(folder))) == ["", ""]
    return "".join(Path(folder, rank).read_text() for rank in "01")


def with_torchrun(recipe, launch, folder: Path) -> str:
    """The same in two that torchrun starts."""
    del folder
    result = launch(recipe)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("start", [in_two_processes, pytest.param(with_torchrun, marks=pytest.mark.slow)])
def test_two_processes_give_the_result_of_one(tiny, launch, start, tmp_path):
    # The last batch of each epoch has one image: the first process's share of it is empty.
    one = tiny("one", epochs=2, grad_accum=2, ema=0.9)
    two = one.replace(output_dir=str(Path(one.run.output_dir).parent / "two"))
    printed = start(two, launch, tmp_path)
    report = train(one)
    assert largest_difference(weights(one.run.output_dir), weights(two.run.output_dir)) < 1e-5
    stored = json.loads(Path(two.run.output_dir, "report.json").read_text())
    assert stored["processes"] == 2 and report.processes == 1
    for name in ("top1", "top5", "num_images", "per_class", "best_epoch", "steps"):
        assert stored[name] == getattr(report, name)
    assert stored["loss"] == pytest.approx(report.loss, abs=1e-5)
    # One process writes and prints.
    assert_close_metrics(one.run.output_dir, two.run.output_dir, abs=1e-4)
    assert printed.count("epoch 1/2") == 1


@pytest.mark.usefixtures("no_pictures", "fused")
@pytest.mark.processes
def test_two_processes_overlap_their_steps_and_wait_for_the_main_one(tiny, fused, tmp_path):
    fused()
    one = tiny("one", epochs=2)
    two = one.replace(output_dir=str(tmp_path / "two"))
    assert run_two(two, prepare=partial(two_ranks.as_on_gpus, str(tmp_path))) == ["", ""]
    train(one)
    assert largest_difference(weights(one.run.output_dir), weights(two.run.output_dir)) < 1e-5
    expected = [
        *["passes 0", "passes 1", "read 0", "passes 2", "read 1", "passes 3", "read 2", "read 3"],
        *["passes 4", "passes 5", "read 4", "passes 6", "read 5", "passes 7", "read 6", "read 7"],
    ]
    assert [(tmp_path / rank).read_text() for rank in "01"] == [", ".join(expected)] * 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": 0.5}, "lr is 0.003 in process 0 and 0.5 in process 1"),
        ({"epochs": 9}, "epochs is 3 in process 0 and 9 in process 1"),
        ({"resume": "auto"}, "whether a run is resumed is False in process 0 and True in process 1"),
    ],
)
@pytest.mark.processes
def test_processes_with_different_recipes_are_refused(tiny, changes, expected):
    recipe = tiny()
    for answer in run_two(recipe, changes=changes):
        assert (
            answer.startswith("ProcessesError: the processes of a run must work on the same")
            and expected in answer
        )
    assert not Path(recipe.run.output_dir).exists()


def images(folder: Path, size: int = 8) -> str:
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (size, size)).save(folder / label / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("kind", ["missing", "empty", "other"])
@pytest.mark.processes
def test_data_that_one_process_lacks_end_both(tiny, tmp_path, kind):
    recipe = tiny(dataset="folder", data_dir=images(tmp_path / "images"), dataset_kwargs={}, download=False)
    folder = tmp_path / "of process 1"
    if kind == "empty":  # found when the data are opened; what is missing, before the processes have met
        folder.mkdir()
    elif kind == "other":
        images(folder, size=64)
    for answer in run_two(recipe, changes={"data_dir": str(folder)}):
        assert answer.startswith("ProcessesError: ")
        assert ("the 'train' data" if kind == "other" else "process 1: ") in answer and "\n" not in answer
    assert not Path(recipe.run.output_dir).exists()


@pytest.mark.processes
def test_a_killed_process_ends_the_other_which_saves(tiny, no_pictures):
    recipe = tiny(epochs=1)
    alone = train(tiny("alone", epochs=1))
    left, killed = run_two(recipe, sabotage=two_ranks.die_in_step_3)
    assert killed is None
    assert left.startswith("PeerLostError: another process of the run has ended")
    assert f"--resume {recipe.run.output_dir}" in left
    assert load_run_state(Path(recipe.run.output_dir, "checkpoint.safetensors")).progress.step == 2
    report = train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert report.warnings[0].startswith("resumed with processes = 1 (was 2)")
    assert largest_difference(weights(recipe.run.output_dir), weights(alone.run_dir)) < 1e-5


@pytest.mark.parametrize(
    ("sabotage", "step"), [(two_ranks.cannot_read_in_step_3, 2), (two_ranks.cannot_read_in_evaluation, 4)]
)
@pytest.mark.processes
def test_images_that_one_process_cannot_read_end_both(tiny, sabotage, step):
    recipe = tiny(epochs=1)
    for answer in run_two(recipe, sabotage=sabotage):
        assert answer.startswith("InputError: cannot read disk/picture.png: Input/output error")
        assert f"stopped after step {step} of 4; the state is saved" in answer
    assert load_run_state(Path(recipe.run.output_dir, "checkpoint.safetensors")).progress.step == step


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("no_pictures")
def test_two_gpus_with_replayed_batches_give_the_result_of_one(tiny, launch):
    settings = {"device": "cuda", "backend": "auto", "cuda_graph": "on", "transforms": "torchvision"}
    one = tiny("one", epochs=4, grad_accum=2, num_workers=2, **settings)
    two = one.replace(output_dir=str(Path(one.run.output_dir).parent / "two"))
    result = launch(two)
    assert result.returncode == 0, result.stderr
    train(one)
    assert json.loads(Path(two.run.output_dir, "report.json").read_text())["cuda_graph"]
    assert largest_difference(weights(one.run.output_dir), weights(two.run.output_dir)) < 1e-4
