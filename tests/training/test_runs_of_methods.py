"""Runs with every registered method and with thirty compositions: resumed, and in two processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import two_ranks
from interruption import interrupt_at
from method_cases import COMPOSITIONS, label, options_for
from tiny_runs import TINY, assert_same_weights, largest_difference
from torch import Tensor
from two_ranks import run_two

from vimtune.methods import list_methods
from vimtune.recipe import Recipe, load_recipe
from vimtune.tensor_file import read_tensors
from vimtune.training import Interrupted, train

pytestmark = pytest.mark.usefixtures("no_pictures")

METHODS = [(name, {}) for name in list_methods()]
SETTINGS = {
    "model_kwargs": {"depth": 1},
    "dataset_kwargs": {"species": 2, "train_per_species": 3, "val_per_species": 1, "test_per_species": 1},
    "batch_size": 4,
    "epochs": 1,
    "weight_decay": 0.1,
}
"""Two steps, the last one on two images."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe_of(folder):
    """`recipe_of("name", case)`: recipe of a run with a method, into the folder of that name."""

    def build(name: str, case: tuple[str, dict]) -> Recipe:
        method, extra = case
        options = options_for(method, extra)
        where = {"targets": options.pop("targets")} if "targets" in options else {}
        changes = {"peft": method, "rank": None, "peft_kwargs": options, **where}
        return Recipe(**{**TINY, **SETTINGS, **changes, "output_dir": str(folder / label(case) / name)})

    return build


@pytest.fixture(scope="module")
def straight(recipe_of):
    """`straight(case)`: state at the end of an uninterrupted run in one process."""
    made = {}

    def state(case: tuple[str, dict]) -> dict[str, Tensor]:
        if label(case) not in made:
            made[label(case)] = state_of(train(recipe_of("straight", case)).run_dir)
        return made[label(case)]

    return state


def state_of(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a run's state: the adapter, the optimizer, what draws random numbers."""
    return read_tensors(Path(folder) / "checkpoint.safetensors")


@pytest.mark.parametrize("case", METHODS + COMPOSITIONS, ids=lambda case: case[0])
def test_a_resumed_run_ends_as_an_uninterrupted_one(case, recipe_of, straight, monkeypatch):
    recipe = recipe_of("stopped", case)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "_compute_gradients", 2, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(recipe)
    train(load_recipe(None, {"resume": recipe.run.output_dir}))
    assert_same_weights(state_of(recipe.run.output_dir), straight(case))


@pytest.mark.parametrize("cases", [METHODS, COMPOSITIONS], ids=["methods", "compositions"])
@pytest.mark.processes
def test_two_processes_end_as_one(cases, recipe_of, straight):
    recipes = [recipe_of("two", case) for case in cases]
    assert run_two(*recipes, prepare=two_ranks.quickly) == ["", ""]
    for case, recipe in zip(cases, recipes, strict=True):
        difference = largest_difference(state_of(recipe.run.output_dir), straight(case))
        assert difference < 1e-5, f"{label(case)}: {difference:.1e}"
