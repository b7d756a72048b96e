"""The recipe: one table for YAML, flags and Python, and all its errors at once."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from vimtune import catalog
from vimtune.recipe import GROUPS, RUN_FILES, Recipe, RecipeError, load_recipe, read_yaml

FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}

# For every field: values that differ from the default and are right, as YAML gives them and as flag text.
GOOD = {
    "dataset": ("flowers", "flowers"),
    "data_dir": (".", "."),
    "train_split": ("train+val", "train+val"),
    "eval_split": ("test", "test"),
    "dataset_kwargs": ({"species": 5}, "species=5"),
    "download": (False, "false"),
    "num_workers": (0, "0"),
    "cache": (True, "true"),
    "on_corrupt": ("skip", "skip"),
    "augmentation": ("strong", "strong"),
    "transforms": ("torchvision", "torchvision"),
    "mixup": (0.2, "0.2"),
    "cutmix": (1.0, "1"),
    "model": ("test_vim", "test_vim"),
    "pretrained": (False, "no"),
    "checkpoint": ("base.pth", "base.pth"),
    "img_size": ([64, 96], "64x96"),
    "drop_path": (0.1, "0.1"),
    "model_kwargs": ({"depth": 3}, "{depth: 3}"),
    "peft": ("lora+bitfit", "lora+bitfit"),
    "targets": (["in_proj", "out_proj"], "in_proj,out_proj"),
    "layers": ([0, 1, 2, 5], "0-2,5"),
    "rank": (4, "4"),
    "alpha": (8.0, "8"),
    "dropout": (0.1, "0.1"),
    "block_size": (2, "2"),
    "peft_kwargs": ({"variant": "paper"}, "variant=paper"),
    "epochs": (3, "3"),
    "batch_size": (8, "8"),
    "lr": (0.002, "2e-3"),
    "min_lr": (1e-5, "1e-5"),
    "head_lr": (0.01, "1e-2"),
    "weight_decay": (0.05, "0.05"),
    "betas": ([0.9, 0.95], "0.9,0.95"),
    "warmup_epochs": (0.5, "0.5"),
    "clip_grad": (0.0, "0"),
    "grad_accum": (2, "2"),
    "label_smoothing": (0.1, ".1"),
    "ema": (0.99, "0.99"),
    "early_stop": (3, "3"),
    "amp": ("bf16", "bf16"),
    "grad_checkpointing": (True, "yes"),
    "compile": (True, "on"),
    "cuda_graph": ("on", "on"),
    "seed": (7, "7"),
    "deterministic": (True, "True"),
    "device": ("cpu", "cpu"),
    "backend": ("torch", "torch"),
    "threads": (1, "1"),
    "output_dir": ("somewhere/new", "somewhere/new"),
    "resume": ("runs/x", "runs/x"),
    "force": (True, "yes"),
    "log_interval": (1, "1"),
    "eval_interval": (2, "2"),
}

BAD = {
    "dataset": ["flower", 3, None],
    "data_dir": ["", 3],
    "train_split": ["test", None],
    "eval_split": ["train"],
    "dataset_kwargs": ["text", [1], "{a: [}"],
    "download": ["maybe", 1, None],
    "num_workers": [-1, 1.5, "two", True, None],
    "cache": ["2"],
    "on_corrupt": ["ignore"],
    "augmentation": ["medium"],
    "transforms": ["kornia"],
    "mixup": [-0.1, "x", float("nan")],
    "cutmix": [-1, float("inf")],
    "model": ["vim_tiny", None],
    "pretrained": ["imagenet"],
    "checkpoint": [3, ""],
    "img_size": [0, "64x", [64], [64, 64, 64], "wide", True],
    "drop_path": [1.0, -0.1],
    "model_kwargs": [3],
    "peft": ["lor", "lora+", "lora+lora", "", None],
    "targets": [[], 3, [3], ""],
    "layers": [[], "a", [0.5], [True], "1-", "0--1"],
    "rank": [0, -3, 1.5, "x", True],
    "alpha": [0, -1],
    "dropout": [1, -0.1],
    "block_size": [0, "x"],
    "peft_kwargs": ["rank", {1: 2}],
    "epochs": [0, None, 2.5],
    "batch_size": [0],
    "lr": [0, -1e-3, "fast", None, float("nan")],
    "min_lr": [-1],
    "head_lr": [0],
    "weight_decay": [-0.1],
    "betas": [[0.9], [0.9, 1.0], 3, "a,b"],
    "warmup_epochs": [-1],
    "clip_grad": [-1],
    "grad_accum": [0],
    "label_smoothing": [1.0],
    "ema": [1.0],
    "early_stop": [-1],
    "amp": ["fp8"],
    "grad_checkpointing": [2],
    "compile": ["max"],
    "cuda_graph": ["always", 1, None],
    "seed": [-1, "x"],
    "deterministic": [None],
    "device": [3],
    "backend": ["gpu"],
    "threads": [0],
    "output_dir": [3],
    "resume": [True],
    "force": [None, "very"],
    "log_interval": [0],
    "eval_interval": [0],
}


def build(**values):
    """A recipe of `values`, with what they need to go together."""
    if values.get("eval_split") == "val":
        values.setdefault("train_split", "train")
    return Recipe.from_values(values)


def test_the_tables_of_this_test_cover_every_field():
    assert set(GOOD) == set(BAD) == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_yaml_values_and_flag_texts_mean_the_same(name):
    value, text = GOOD[name]
    recipe = build(**{name: value})
    assert getattr(recipe, name) == value
    assert getattr(build(**{name: text}), name) == value
    assert value != getattr(Recipe(), name), "a test value equal to the default shows nothing"


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_values_are_refused_with_the_value_and_what_was_expected(name):
    for value in BAD[name]:
        with pytest.raises(RecipeError) as info:
            build(**{name: value})
        (problem,) = info.value.problems
        assert problem.startswith(f"{name} = {value!r}: expected") or "not readable as YAML" in problem


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_documented_and_grouped(name):
    metadata = FIELDS[name].metadata
    assert metadata["group"] in GROUPS
    assert 5 < len(metadata["help"]) < 80


@pytest.mark.parametrize("name", FIELDS)
def test_a_recipe_survives_its_yaml_file(name, tmp_path):
    recipe = build(**{name: GOOD[name][0]})
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.from_values(read_yaml(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize("text", ["none", "null", None])
def test_optional_fields_can_be_unset(text):
    assert build(rank=text).rank is None


def test_all_problems_are_reported_together():
    with pytest.raises(RecipeError) as info:
        Recipe.from_values(
            {"epoch": 3, "dataset": "flower", "lr": -1, "peft": "lora", "block_size": 4, "min_lr": 1.0}
        )
    message = str(info.value)
    assert len(info.value.problems) == 4
    for part in ("'epochs'?", "'flowers'?", "lr = -1", "block_size = 4 is not a field of lora"):
        assert part in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train_split": "train+val", "eval_split": "val"}, "trained on"),
        ({"dataset": "folder"}, "data_dir"),
        ({"min_lr": 0.1}, "larger than lr"),
        ({"epochs": 2, "warmup_epochs": 3}, "warmup_epochs = 3"),
        ({"amp": "fp16", "device": "cpu"}, "bf16"),
        ({"model_kwargs": {"img_size": 32}}, "img_size is set by the key img_size"),
        ({"peft": "linear", "rank": 4}, "rank = 4 is not a field of linear"),
        ({"rank": 4, "peft_kwargs": {"rank": 4}}, "given twice"),
        ({"peft_kwargs": {"rnk": 4}}, "Did you mean 'rank'?"),
    ],
)
def test_contradictions(values, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        Recipe.from_values(values)


@pytest.mark.parametrize("method", catalog.METHODS)
def test_method_flags_are_accepted_exactly_where_the_method_has_the_field(method):
    values = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "block_size": 2}
    for name, value in values.items():
        if name in catalog.METHOD_FIELDS[method]:
            assert build(peft=method, **{name: value}).method_kwargs == {name: value}
        else:
            with pytest.raises(RecipeError, match=f"not a field of {method}"):
                build(peft=method, **{name: value})


def test_a_composition_has_the_fields_of_all_its_methods():
    recipe = build(peft="bitfit + lora", rank=4, peft_kwargs={"alpha": 2.0})
    assert recipe.peft == "bitfit+lora"
    assert recipe.method_kwargs == {"rank": 4, "alpha": 2.0}


def test_fields_of_one_method_of_a_composition():
    assert build(peft="lora+strong", peft_kwargs={"lora": {"rank": 4}}).method_kwargs == {"lora": {"rank": 4}}
    with pytest.raises(RecipeError, match="blocks = 3 is not a field of lora"):
        build(peft="lora+strong", peft_kwargs={"lora": {"blocks": 3}})
    with pytest.raises(RecipeError, match="expected a mapping"):
        build(peft="lora+strong", peft_kwargs={"lora": 3})


def test_blocks_count_from_both_ends():
    assert build(layers="0,-1").layers == build(layers=[0, -1]).layers == [0, -1]


def test_recipes_are_checked_however_they_are_made():
    with pytest.raises(RecipeError):
        Recipe(epochs=0)
    with pytest.raises(RecipeError):
        dataclasses.replace(Recipe(), lr=-1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0


def test_mutable_defaults_are_not_shared():
    Recipe().peft_kwargs["rank"] = 3
    assert Recipe().peft_kwargs == {}


def test_the_evaluated_split_follows_the_training_split():
    assert build().selection_split == "val"
    assert build(train_split="train+val").selection_split == "test"
    assert build(eval_split="test").selection_split == "test"


# --- files


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    config = write(tmp_path / "a.yaml", "lr: 1e-2\nepochs: 3\n")
    recipe = load_recipe(config, {"epochs": "5"})
    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.01, 5, Recipe().batch_size)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [1\nepochs: 3\n", "line 2"),
        ("lr: 1\nlr: 2\n", "line 2: 'lr' is given twice"),
        ("a\tb: {", "line 1"),
        ("- lr\n", "expected 'key: value' lines, got list"),
        ("peft: !!python/object:os.system x\n", "line 1"),
        ("lr: \x01", "not valid YAML"),
    ],
)
def test_a_broken_yaml_file_is_named_with_its_line(tmp_path, text, words):
    config = write(tmp_path / "broken.yaml", text)
    with pytest.raises(RecipeError) as info:
        load_recipe(config)
    assert words in str(info.value) and "broken.yaml" in str(info.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(RecipeError, match="not a YAML text file"):
        load_recipe(tmp_path / "image.yaml")


def test_an_empty_file_means_the_defaults(tmp_path):
    assert load_recipe(write(tmp_path / "empty.yaml", "# nothing\n")) == Recipe()


@pytest.mark.parametrize("name", RUN_FILES)
def test_the_results_of_another_run_are_not_overwritten(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(RecipeError, match="holds another run"):
        load_recipe(None, {"output_dir": str(tmp_path)})


def test_unusable_paths_are_reported_together_with_wrong_values(tmp_path):
    file = write(tmp_path / "file", "")
    with pytest.raises(RecipeError) as info:
        load_recipe(
            None,
            {
                "output_dir": str(file / "run"),
                "data_dir": str(file),
                "checkpoint": str(tmp_path / "none.pth"),
                "epochs": "0",
            },
        )
    text = str(info.value)
    assert len(info.value.problems) == 4
    for part in ("output_dir", "data_dir", "checkpoint", "epochs"):
        assert part in text
    assert list(tmp_path.iterdir()) == [file]


def test_resuming_needs_only_the_folder(tmp_path):
    run = tmp_path / "run"
    build(lr=0.02, epochs=4, output_dir="elsewhere").save(run / "recipe.yaml")
    recipe = load_recipe(None, {"resume": str(run), "epochs": "6"})
    assert (recipe.lr, recipe.epochs) == (0.02, 6)
    assert recipe.resume == recipe.output_dir == str(run)

    checkpoint = write(run / "checkpoint.safetensors", "")
    assert load_recipe(None, {"resume": str(checkpoint)}).output_dir == str(run)


@pytest.mark.parametrize("make", [False, True])
def test_resuming_from_what_is_no_run(tmp_path, make):
    run = tmp_path / "run"
    if make:
        run.mkdir()
    with pytest.raises(RecipeError, match="no run folder" if make else "does not exist"):
        load_recipe(None, {"resume": str(run)})


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    build(lr=0.5).save(path)
    monkeypatch.setattr(
        "pathlib.Path.write_text", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        build(lr=0.1).save(path)
    assert yaml.safe_load(path.read_bytes())["lr"] == 0.5
    assert list(tmp_path.iterdir()) == [path]
