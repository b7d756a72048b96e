"""States of format 1, written before there were tasks, are read and continue.

tests/fixtures/run_of_format_1 is the folder of a run of that version, stopped after 6 of 12 steps.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from earlier_states import forget_options, resize_by_opencv
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import assert_close_metrics, relative_difference, weights

from vimtune.methods import METHODS, option, register_method
from vimtune.methods.lora import LoRA
from vimtune.recipe import (
    MethodSettings,
    Recipe,
    changed_options,
    complete_stored,
    keeping,
    load_recipe,
    options_then,
)
from vimtune.training import train
from vimtune.training.identity import Facts, ResumeError, compare
from vimtune.training.state import load_run_state

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_of_format_1"


def test_it_is_read_as_a_state_of_today():
    state = load_run_state(FIXTURE / "checkpoint.safetensors")
    progress = state.progress
    assert (progress.step, progress.batch, progress.count, progress.loss_count) == (6, 2, 41, 16)
    assert list(state.facts.outputs) == ["classes"] and state.facts.train_examples == 25
    assert progress.best is progress.history[0] and progress.best.scores == {"top1": 20.0, "top5": None}


@pytest.mark.usefixtures("no_pictures")
def test_its_run_continues_to_the_result_of_a_run_of_today(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("vimtune.data.random_crop.resize_pixels", resize_by_opencv)  # as its images were
    straight = train(tiny("straight", ema=0.9, model_kwargs={}))  # the size of the model of that run
    shutil.copytree(FIXTURE, tmp_path / "run")
    # Another processor took the first steps, and may have drawn base weights that differ in a last bit.
    report = train(load_recipe(None, {"resume": str(tmp_path / "run"), "force": True}))
    assert all("base weights" in warning for warning in report.warnings)
    assert report.history[0].keys() == straight.history[0].keys()
    assert relative_difference(weights(report.run_dir), weights(straight.run_dir)) < 1e-3
    assert_close_metrics(report.run_dir, straight.run_dir, rel=1e-4)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("progress", lambda progress: progress.update(images="many")),
        ("progress", lambda progress: progress.pop("history")),
        ("progress", lambda progress: progress.update(count=3, surplus=1)),
        ("progress", lambda progress: progress.update(history="none")),
        ("progress", lambda progress: progress["history"][0].pop("loss")),
        ("progress", lambda progress: progress["history"][0].update(top1=101.0)),
        ("progress", lambda progress: progress.update(best_epoch=2)),
        ("facts", lambda facts: facts.update(classes=[1])),
        ("facts", lambda facts: facts.pop("train_images")),
    ],
)
def test_it_is_checked_like_one_of_today(tmp_path, part, change):
    source, path = FIXTURE / "checkpoint.safetensors", tmp_path / "checkpoint.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    values = json.loads(metadata[part])
    change(values)
    save_file(load_file(source), path, {**metadata, part: json.dumps(values)})
    with pytest.raises(ResumeError) as error:
        load_run_state(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stored", "today"),
    [
        ("x_proj", "mixer.x_proj"),
        ("in_proj, A_log ,conv1d.bias", "in_proj,mixer.A_log,mixer.conv1d.bias"),
        (["x_proj[dt|B]", "!x_proj[B]", "x_proj_b"], ["mixer.x_proj[dt|B]", "!mixer.x_proj[B]", "x_proj_b"]),
        ({"lora": "both", "ft": ["D", "Dx"]}, {"lora": "both", "ft": ["mixer.D", "Dx"]}),
        ("re:(A_log|D){1,2}", "re:(A_log|D){1,2}"),
        ("layers.0.mixer.A_log", "layers.0.mixer.A_log"),
        (None, None),
    ],
)
def test_targets_that_meant_one_direction_still_do(stored, today):
    assert complete_stored({"targets": stored})["targets"] == today
    assert complete_stored({"targets": stored, "budget": None})["targets"] == stored


def test_a_folder_that_was_passed_over_is_left_out():
    stored = {"dataset": "synthetic_flowers", "data_dir": "/data", "budget": None}
    assert Recipe.from_values(complete_stored(stored)).data.data_dir is None
    assert complete_stored({**stored, "dataset": "flowers"})["data_dir"] == "/data"
    assert complete_stored({"data_dir": "/data", "task": "arc_easy"})["data_dir"] == "/data"


def test_options_of_targets_that_meant_one_direction():
    values = {
        "rank": {"x_proj,in_proj": 4},
        "peft_kwargs": {
            "variant": "paper",
            "alpha": {"D": 2},
            "lora": {"rank": {"x_proj[B]": 4}, "alpha": 1},
        },
        "model_kwargs": {"D": 1},
    }
    assert complete_stored(values) == {
        "data_seed": 0,
        "rank": {"mixer.x_proj,in_proj": 4},
        "peft_kwargs": {
            "variant": "paper",
            "alpha": {"mixer.D": 2},
            "lora": {"rank": {"mixer.x_proj[B]": 4}, "alpha": 1},
        },
        "model_kwargs": {"D": 1},
    }


@pytest.mark.usefixtures("no_pictures")
def test_a_run_whose_targets_meant_one_direction_continues(tiny, tmp_path):
    options = {"peft": "ft", "rank": None, "epochs": 2}
    straight = train(tiny("straight", targets="mixer.x_proj", **options))
    first = train(tiny("run", targets="mixer.x_proj", **{**options, "epochs": 1}))
    folder = Path(first.run_dir)
    checkpoint, recipe = folder / "checkpoint.safetensors", folder / "recipe.yaml"

    def as_then(values):
        return {key: value for key, value in values.items() if key != "budget"} | {"targets": "x_proj"}

    recipe.write_text(yaml.safe_dump(as_then(yaml.safe_load(recipe.read_text()))))
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    stored = as_then(json.loads(metadata["recipe"]))
    save_file(load_file(checkpoint), checkpoint, {**metadata, "recipe": json.dumps(stored)})
    report = train(load_recipe(None, {"resume": str(first.run_dir), "epochs": 2}))
    assert report.trainable_parameters == straight.trainable_parameters and len(report.history) == 2


def test_options_that_another_version_left_to_other_defaults_are_not_those_of_today(tiny):
    now, as_then = tiny(peft="prodial"), tiny(peft="prodial", peft_kwargs={"variant": "free"})

    def facts(methods):
        return Facts(outputs={}, train_examples=1, base_hash="", methods=methods)

    silent = facts({})  # That of a state from before the options were held.
    for saved in (facts(as_then.method.all_options), silent):
        with pytest.raises(ResumeError, match="variant of prodial was 'free' and is now 'exp'") as caught:
            compare(now, saved, now, silent, True)
        assert "state options that have other defaults now (--peft-kwargs '{variant: free}')" in str(
            caught.value
        )
        assert not any("peft_kwargs" in note for note in compare(now, saved, as_then, silent, True))
    compare(now, facts(now.method.all_options), now, silent, True)


def test_options_of_one_method_among_several_then():
    method = MethodSettings(peft="prodial+dora", peft_kwargs={"prodial": {"rank": 4}, "alpha": 2.0}, budget=9)
    then, now = options_then(method), method.all_options
    assert then["dora"] == now["dora"] and now["prodial"]["rank"] == 4 and now["dora"]["alpha"] == 2
    assert "rank" not in now["dora"] and "block_size" not in now["prodial"]  # The budget chooses these.
    assert then["prodial"] == now["prodial"] | {"variant": "free"}
    stated = MethodSettings(peft="prodial", peft_kwargs={"variant": "paper"})
    assert options_then(stated) == stated.all_options


@pytest.mark.usefixtures("no_pictures")
def test_states_hold_all_options(tiny):
    report = train(tiny(peft="prodial", rank=None, epochs=1))
    saved = load_run_state(Path(report.run_dir) / "checkpoint.safetensors")
    options = report.method_config["prodial"]
    assert saved.facts.methods == {"prodial": options} and options["variant"] == "exp"


@pytest.mark.parametrize("method", METHODS)
def test_options_are_the_same_after_they_have_been_in_a_file(method):
    options = MethodSettings(peft=method).all_options
    assert json.loads(json.dumps(options)) == options


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_with_other_defaults_is_not_reported_as_one_of_today(tiny, tmp_path):
    """`resume` = "auto" compared the recipes as they were given, and those were the same."""
    folder, then = str(tmp_path / "run"), {"variant": "free"}
    train(tiny(peft="prodial", rank=None, epochs=1, output_dir=folder, peft_kwargs=then))
    forget_options(tmp_path / "run" / "checkpoint.safetensors")
    again = tiny(peft="prodial", rank=None, epochs=1, output_dir=folder, resume="auto")
    with pytest.raises(
        ResumeError, match=r"'free' and is now 'exp'\).*\(--peft-kwargs '\{variant: free\}'\)"
    ):
        train(again)
    assert train(again.replace(peft_kwargs=then)).epochs == 1


@dataclass(frozen=True, kw_only=True)
class Tuples(LoRA):
    """A method with an option that JSON has as a list."""

    summary = "an option that is a tuple"
    places: tuple[str, ...] = option(("a", "b"), "places")


def test_an_option_that_a_file_has_in_another_form_is_the_same(monkeypatch):
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    register_method("tuples")(Tuples)
    method = MethodSettings(peft="tuples")
    assert not changed_options(json.loads(json.dumps(method.all_options)), method)


def test_what_a_budget_decides_is_part_of_a_run(tiny):
    """What is given now was decided by the budget then, and the other way round: nothing seemed to differ."""
    facts = Facts(outputs={}, train_examples=1, base_hash="")
    saved, now = (tiny(peft="prodial", budget=900, rank=rank) for rank in (None, 2))
    with pytest.raises(ResumeError, match="the budget decided rank of prodial and now block_size"):
        compare(saved, replace(facts, methods=saved.method.all_options), now, facts, True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft": "prodial"}, {"variant": "free"}),
        (
            {"peft": "prodial", "peft_kwargs": {"train_scale": False}},
            {"train_scale": False, "variant": "free"},
        ),
        ({"peft": "prodial", "peft_kwargs": {"variant": "exp"}}, {"variant": "exp"}),
        (
            {"peft": "prodial+dora", "peft_kwargs": {"prodial": {"rank": 4}}},
            {"prodial": {"rank": 4, "variant": "free"}},
        ),
    ],
)
def test_what_keeps_the_options_of_a_run(settings, expected):
    method = MethodSettings(**settings)
    options = options_then(method)
    options["prodial"]["variant"] = "free"
    kept = keeping(changed_options(options, method), method)
    assert kept == expected
    if kept != method.peft_kwargs:
        assert replace(method, peft_kwargs=kept).all_options == options
