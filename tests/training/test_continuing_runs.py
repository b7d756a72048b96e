"""Runs that begin with an adapter of another run."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from tiny_runs import TINY, assert_same_weights, weights

from vimtune.adapters import read_adapter
from vimtune.recipe import RecipeError, load_recipe
from vimtune.training import train

pytestmark = pytest.mark.usefixtures("no_pictures_in_this_file")

DATA = {key: TINY[key] for key in ("dataset", "num_workers", "batch_size", "device", "backend", "threads")}
FEWER = {**TINY["dataset_kwargs"], "species": 4}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("first") / "run"
    train(load_recipe(None, {**TINY, "rank": 3, "epochs": 1, "test": False, "output_dir": str(folder)}))
    return str(folder)


def test_a_run_has_model_method_and_values_of_its_adapter_and_goes_on_without_it(first, tmp_path) -> None:
    given = {**DATA, "dataset_kwargs": FEWER, "init_adapter": first, "epochs": 1, "lr": 1e-10, "test": False}
    # With another number of classes a random start is another one; published weights would be the same.
    recipe = load_recipe(None, {**given, "output_dir": str(tmp_path / "run"), "force": True})
    assert (recipe.method.peft, recipe.method.rank, recipe.backbone.model) == ("lora", 3, "test_vim")
    train(recipe)
    info, old = read_adapter(f"{first}/adapter.safetensors")
    _, new = read_adapter(tmp_path / "run" / "adapter.safetensors")
    for key, value in new.items():
        kept = old[key][:4] if key.startswith("head.") else old[key]
        assert torch.allclose(value, kept, atol=1e-8), key
    assert info.classes[:4] == read_adapter(tmp_path / "run" / "adapter.safetensors")[0].classes
    # The state holds all that is needed to go on.
    gone = {"resume": str(tmp_path / "run"), "init_adapter": str(tmp_path / "gone"), "epochs": 2}
    before = weights(tmp_path / "run")
    train(load_recipe(None, gone))
    assert weights(tmp_path / "run").keys() == before.keys()
    with pytest.raises(AssertionError):  # Adam's steps are as long at any gradient, so something has moved.
        assert_same_weights(weights(tmp_path / "run"), before)


def test_a_run_that_names_no_data_has_those_of_its_adapter(first, tmp_path) -> None:
    """The default data set has none of its classes. How many images are used is said anew."""
    recipe = load_recipe(None, {"init_adapter": first, "epochs": 3})
    assert recipe.data.dataset == TINY["dataset"] and recipe.data.dataset_kwargs == TINY["dataset_kwargs"]
    assert recipe.data.test is True and recipe.optimisation.epochs == 3
    assert load_recipe(None, {"init_adapter": first, "data_seed": 5}).data.data_seed == 5
    (tmp_path / "photos").mkdir()
    given = {"init_adapter": first, "dataset": "folder", "data_dir": str(tmp_path / "photos")}
    recipe = load_recipe(None, given)
    assert recipe.data.dataset == "folder" and recipe.data.dataset_kwargs == {}
    values = {"dataset": "folder", "data_dir": str(tmp_path / "photos"), "data_seed": 7, "limit": 9}
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(f"{first}/adapter.safetensors", old)
    load_recipe(None, {**values, "model": "test_vim", "pretrained": False}).save(old / "recipe.yaml")
    data = load_recipe(None, {"init_adapter": str(old)}).data
    assert (data.data_dir, data.data_seed, data.limit) == (values["data_dir"], 7, None)


def test_another_method_is_taken_as_given_and_a_wrong_file_is_one_line(first, tmp_path) -> None:
    recipe = load_recipe(None, {"init_adapter": first, "peft": "bitfit"})
    assert recipe.method.peft == "bitfit" and recipe.method.rank is None
    (tmp_path / "x.safetensors").write_bytes(b"no adapter")
    for path in (tmp_path, tmp_path / "x.safetensors", tmp_path / "none"):
        with pytest.raises(RecipeError, match="init_adapter") as error:
            load_recipe(None, {"init_adapter": str(path)})
        assert "\n" not in str(error.value)


def test_an_adapter_with_defaults_of_another_version_keeps_its_function(tmp_path) -> None:
    """Its recipe does not state them, so that a new run began with the numbers of one formula in another."""
    given = {**TINY, "peft": "prodial", "rank": None, "epochs": 1, "test": False}
    folder = tmp_path / "run"
    train(load_recipe(None, {**given, "peft_kwargs": {"variant": "free"}, "output_dir": str(folder)}))
    stored = yaml.safe_load((folder / "recipe.yaml").read_text())
    for named in ({}, {"train_scale": True}):
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**stored, "peft_kwargs": named}))
        recipe = load_recipe(None, {"init_adapter": str(folder)})
        assert recipe.method.peft_kwargs == {**named, "variant": "free"}
    stated = load_recipe(None, {"init_adapter": str(folder), "peft_kwargs": {"variant": "tanh"}})
    assert stated.method.peft_kwargs == {"train_scale": True, "variant": "tanh"}
    slower = load_recipe(None, {"init_adapter": str(folder), "peft_kwargs": "lr_scale=.5", "rank": "8"})
    assert slower.method.peft_kwargs == {"train_scale": True, "variant": "free", "lr_scale": 0.5}
    assert slower.method.rank == 8
    assert load_recipe(None, {"init_adapter": str(folder), "peft": "lora"}).method.peft_kwargs == {}
