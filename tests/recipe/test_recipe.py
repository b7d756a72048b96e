"""The recipe: one table for YAML, flags and Python, and all its errors at once."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from annotated_types import Ge
from bad_input import TEXTS, VALUES, at_once

from vimtune import parsers, text
from vimtune.fields import option, options_of
from vimtune.methods import METHODS, Method, resolve_options
from vimtune.recipe import RUN_FILES, Recipe, RecipeError, keys_of, load_recipe
from vimtune.recipe.components import OPTIONS_OF_METHODS
from vimtune.strict_yaml import parse_yaml, read_yaml
from vimtune.tasks import TASKS, Task, register_task
from vimtune.tasks.classification import Classification

FIELDS = {name: item for name, item in keys_of("classification").items() if name != "task"}
VALUES_OF_DEFAULT = Recipe().to_dict()

# For every field: values that differ from the default and are right, as YAML gives them and as flag text.
GOOD = {
    "dataset": ("flowers", "flowers"),
    "data_dir": (os.path.abspath("."), "."),
    "train_split": ("train+val", "train+val"),
    "eval_split": ("test", "test"),
    "shots": (4, "4"),
    "train_size": (1000, "1000"),
    "limit": (100, "100"),
    "test": (False, "no"),
    "dataset_kwargs": ({"species": 5}, "species=5"),
    "download": (False, "false"),
    "num_workers": (0, "0"),
    "cache": ("device", "device"),
    "on_corrupt": ("skip", "skip"),
    "augmentation": ("strong", "strong"),
    "transforms": ("torchvision", "torchvision"),
    "mixup": (0.2, "0.2"),
    "cutmix": (1.0, "1"),
    "model": ("test_vim", "test_vim"),
    "pretrained": (False, "no"),
    "checkpoint": (os.path.abspath("base.pth"), "base.pth"),
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
    "budget": (300_000, "300k"),
    "peft_kwargs": ({"variant": "paper"}, "variant=paper"),
    "epochs": (3, "3"),
    "batch_size": (8, "8"),
    "lr": (0.002, "2e-3"),
    "min_lr": (1e-5, "1e-5"),
    "head_lr": (0.01, "1e-2"),
    "max_steps": (100, "100"),
    "opt": ("lion", "Lion"),
    "weight_decay": (0.05, "0.05"),
    "betas": ([0.9, 0.95], "0.9,0.95"),
    "momentum": (0.8, ".8"),
    "layer_decay": (0.7, "0.7"),
    "warmup_epochs": (0.5, "0.5"),
    "clip_grad": (0.0, "0"),
    "grad_accum": (2, "2"),
    "label_smoothing": (0.1, ".1"),
    "class_weights": ({"cat": 2.0, "dog": 0.5}, "cat=2,dog=0.5"),
    "balanced": (True, "yes"),
    "folds": (5, "5"),
    "init_adapter": (os.path.abspath("runs/before"), "runs/before"),
    "teacher": (os.path.abspath("runs/teacher"), "runs/teacher"),
    "teacher_targets": ("hard", "hard"),
    "teacher_weight": (0.7, ".7"),
    "teacher_temperature": (2.0, "2"),
    "ema": (0.99, "0.99"),
    "early_stop": (3, "3"),
    "amp": ("bf16", "bf16"),
    "grad_checkpointing": (True, "yes"),
    "compile": (True, "on"),
    "cuda_graph": ("on", "on"),
    "shard": (True, "yes"),
    "seed": (7, "7"),
    "data_seed": (3, "3"),
    "deterministic": (True, "True"),
    "device": ("cpu", "cpu"),
    "backend": ("torch", "torch"),
    "threads": (1, "1"),
    "output_dir": ("somewhere/new", "somewhere/new"),
    "resume": ("runs/x", "runs/x"),
    "force": (True, "yes"),
    "logger": (["csv", "tensorboard"], "csv,tensorboard"),
    "log_interval": (1, "1"),
    "eval_interval": (2, "2"),
    "pictures": (False, "no"),
}

BAD = {
    "dataset": ["flower", 3, None],
    "data_dir": ["", 3],
    "train_split": ["test", None],
    "eval_split": ["train"],
    "shots": [0, "all"],
    "train_size": [1, 2.5],
    "limit": [0, "half"],
    "test": [None, "once"],
    "dataset_kwargs": ["text", [1], "{a: [}"],
    "download": ["maybe", 1, None],
    "num_workers": [-1, 1.5, "two", True, None],
    "cache": ["2"],
    "on_corrupt": ["ignore"],
    "augmentation": ["heavy"],
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
    "budget": [0, -3, "x", "101%", "1e3k", True],
    "peft_kwargs": ["rank", {1: 2}],
    "epochs": [0, None, 2.5],
    "batch_size": [0],
    "lr": [0, -1e-3, "fast", None, float("nan")],
    "min_lr": [-1],
    "head_lr": [0],
    "max_steps": [0, 1.5],
    "opt": ["adafactor", "adamx", None],
    "weight_decay": [-0.1],
    "betas": [[0.9], [0.9, 1.0], 3, "a,b"],
    "momentum": [0, 1, "fast"],
    "layer_decay": [0, 1.1],
    "warmup_epochs": [-1],
    "clip_grad": [-1],
    "grad_accum": [0],
    "label_smoothing": [1.0],
    "class_weights": ["even", {"cat": 0}, 3, None],
    "balanced": [2],
    "folds": [1, 0, 1.5],
    "init_adapter": [3, ""],
    "teacher": [3, ""],
    "teacher_targets": ["softer"],
    "teacher_weight": [0, 1.1],
    "teacher_temperature": [0, -1],
    "ema": [1.0],
    "early_stop": [-1],
    "amp": ["fp8"],
    "grad_checkpointing": [2],
    "compile": ["max"],
    "cuda_graph": ["always", 1, None],
    "shard": ["fsdp", 2],
    "seed": [-1, "x"],
    "data_seed": [-1, "x", None, True],
    "deterministic": [None],
    "device": [3],
    "backend": ["gpu"],
    "threads": [0],
    "output_dir": [3],
    "resume": [True],
    "force": [None, "very"],
    "logger": ["csv,csv", ["x"], 3],
    "log_interval": [0],
    "eval_interval": [0],
    "pictures": [None, "some"],
}


def build(**values):
    """A recipe of `values`, with what they need to go together."""
    if values.get("eval_split") == "val":
        values.setdefault("train_split", "train")
    if any(name.startswith("teacher_") for name in values):
        values.setdefault("teacher", "runs/teacher")
    if "data_dir" in values:
        values.setdefault("dataset", "flowers")
    if "momentum" in values:
        values.setdefault("opt", "sgd")
    return Recipe.from_values(values)


@pytest.fixture
def naming_task(monkeypatch):
    """A task with options of its own, known during one test."""
    monkeypatch.setattr(TASKS, "_things", dict(TASKS._things))

    @register_task("naming")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Naming(Task):
        summary = "a name for every image"

        num_names: Annotated[int, Ge(1)] = option(1, "names for an image")
        mixup: bool = option(False, "mix names")

        def open(self, recipe, processes):
            raise NotImplementedError

    return Naming


def test_a_task_brings_its_keys(naming_task):
    recipe = build(task="naming", num_names="3")
    assert recipe.task == naming_task(num_names=3)
    assert recipe.replace(mixup="yes").to_dict()["mixup"] is True
    assert Recipe.from_values(recipe.to_dict()) == recipe


def test_keys_of_another_task_are_refused_with_the_reason(naming_task):
    with pytest.raises(RecipeError) as info:
        build(task="naming", num_names=0, cutmix=1.0, epochs=0)
    assert sorted(info.value.problems) == [
        "cutmix = 1.0 is an option of task classification, and task is naming",
        "epochs = 0: expected a whole number >= 1",
        "num_names = 0: expected a whole number >= 1",
    ]
    with pytest.raises(RecipeError, match="num_names = 2 is an option of task naming"):
        build(num_names=2)
    with pytest.raises(RecipeError, match=r"task = 'nameing': expected a known task: .*'naming'"):
        build(task="nameing")


def test_a_component_built_alone_is_checked():
    with pytest.raises(ValueError, match=r"'light'\?; mixup = -1: expected a number >= 0"):
        Classification(mixup=-1, augmentation="ligth")
    assert Classification(mixup="0.5").mixup == 0.5


@pytest.mark.parametrize(
    ("earlier", "now"), [(True, "host"), (False, "none"), ("true", "host"), ("off", "none")]
)
def test_a_cache_was_once_either_on_or_off(earlier, now):
    assert build(cache=earlier).data.cache == now


def test_the_tables_of_this_test_cover_every_field():
    assert set(GOOD) == set(BAD) == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_yaml_values_and_flag_texts_mean_the_same(name):
    value, text = GOOD[name]
    recipe = build(**{name: value})
    assert recipe.to_dict()[name] == value
    assert build(**{name: text}).to_dict()[name] == value
    assert value != VALUES_OF_DEFAULT[name], "a test value equal to the default shows nothing"


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_values_are_refused_with_the_value_and_what_was_expected(name):
    for value in BAD[name]:
        with pytest.raises(RecipeError) as info:
            build(**{name: value})
        (problem,) = info.value.problems
        assert problem.startswith(f"{name} = {value!r}: expected") or "not readable as YAML" in problem


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_documented(name):
    assert 5 < len(FIELDS[name].help) < 80


@pytest.mark.parametrize("name", FIELDS)
def test_a_recipe_survives_its_yaml_file(name, tmp_path):
    recipe = build(**{name: GOOD[name][0]})
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.from_values(read_yaml(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize("text", ["none", "null", None])
def test_optional_fields_can_be_unset(text):
    assert build(rank=text).method.rank is None


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
        ({"data_dir": "."}, "would not be read: the images of dataset = 'synthetic_flowers' are generated"),
        ({"min_lr": 0.1}, "larger than lr"),
        ({"epochs": 2, "warmup_epochs": 3}, "warmup_epochs = 3"),
        ({"amp": "fp16", "device": "cpu"}, "bf16"),
        ({"model_kwargs": {"img_size": 32}}, "img_size is set by the key img_size"),
        ({"dataset_kwargs": "seed=0"}, "dataset_kwargs: seed is set by the key data_seed"),
        ({"dataset_kwargs": {"split": "test"}}, "split is set by the keys train_split and eval_split"),
        ({"dataset_kwargs": {"img_size": 32}}, "img_size is set by the key img_size"),
        ({"dataset_kwargs": {"name": "cars"}}, "name is set by the key dataset"),
        ({"dataset_kwargs": {"data_dir": "x"}}, "data_dir is set by the key data_dir"),
        ({"dataset_kwargs": {"download": False}}, "download is set by the key download"),
        ({"peft": "linear", "rank": 4}, "rank = 4 is not a field of linear"),
        ({"rank": 4, "peft_kwargs": {"rank": 4}}, "given twice"),
        ({"peft_kwargs": {"rnk": 4}}, "Did you mean 'rank'?"),
        ({"dataset_kwargs": {"specis": 4}}, "has no option 'specis'"),
        ({"dataset_kwargs": {"species": "many"}}, "species='many'"),
    ],
)
def test_contradictions(values, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        Recipe.from_values(values)


@pytest.mark.parametrize("method", METHODS)
def test_method_flags_are_accepted_exactly_where_the_method_has_the_field(method):
    values = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "block_size": 2}
    for name, value in values.items():
        if name in options_of(METHODS.get(method)):
            assert build(peft=method, **{name: value}).method.method_kwargs == {name: value}
        else:
            with pytest.raises(RecipeError, match=f"not a field of {method}"):
                build(peft=method, **{name: value})


def test_a_composition_has_the_fields_of_all_its_methods():
    recipe = build(peft="bitfit + lora", rank=4, peft_kwargs={"alpha": 2.0})
    assert recipe.method.peft == "bitfit+lora"
    assert recipe.method.method_kwargs == {"rank": 4, "alpha": 2.0}


def test_fields_of_one_method_of_a_composition():
    assert build(peft="lora+strong", peft_kwargs={"lora": {"rank": 4}}).method.method_kwargs == {
        "lora": {"rank": 4}
    }
    with pytest.raises(RecipeError, match="blocks = 3 is not a field of lora"):
        build(peft="lora+strong", peft_kwargs={"lora": {"blocks": 3}})
    with pytest.raises(RecipeError, match="expected a mapping"):
        build(peft="lora+strong", peft_kwargs={"lora": 3})


def test_blocks_count_from_both_ends():
    assert build(layers="0,-1").method.layers == build(layers=[0, -1]).method.layers == [0, -1]


def test_recipes_are_checked_however_they_are_made():
    with pytest.raises(RecipeError):
        Recipe(epochs=0)
    with pytest.raises(RecipeError):
        Recipe().replace(lr=-1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().optimisation.lr = 1.0


def test_mutable_defaults_are_not_shared():
    Recipe().method.peft_kwargs["rank"] = 3
    assert Recipe().method.peft_kwargs == {}


def test_the_evaluated_split_follows_the_training_split():
    assert build().data.selection_split == "val"
    assert build(train_split="train+val").data.selection_split == "test"
    assert build(eval_split="test").data.selection_split == "test"


# --- files


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    config = write(tmp_path / "a.yaml", "lr: 1e-2\nepochs: 3\n")
    recipe = load_recipe(config, {"epochs": "5"})
    assert (recipe.optimisation.lr, recipe.optimisation.epochs, recipe.optimisation.batch_size) == (
        0.01,
        5,
        Recipe().optimisation.batch_size,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [1\nepochs: 3\n", "line 2"),
        ("lr: 1\nlr: 2\n", "line 2: 'lr' is given twice"),
        ("a\tb: {", "line 1"),
        ("- lr\n", "expected 'key: value' lines, got ['lr']"),
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
                "dataset": "flowers",
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
    assert (recipe.optimisation.lr, recipe.optimisation.epochs) == (0.02, 6)
    assert recipe.run.resume == recipe.run.output_dir == str(run)

    checkpoint = write(run / "checkpoint.safetensors", "")
    assert load_recipe(None, {"resume": str(checkpoint)}).run.output_dir == str(run)


def test_a_run_of_before_data_seed_resumes_with_the_data_of_its_seed(tmp_path):
    build(seed=5).save(tmp_path / "recipe.yaml")
    values = read_yaml(tmp_path / "recipe.yaml")
    assert load_recipe(None, {"resume": str(tmp_path)}).data.data_seed == 0
    del values["data_seed"]
    write(tmp_path / "recipe.yaml", yaml.safe_dump(values))
    assert load_recipe(None, {"resume": str(tmp_path)}).data.data_seed == 5
    assert load_recipe(None, {"resume": str(tmp_path), "data_seed": "2"}).data.data_seed == 2


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
        "pathlib.Path.write_bytes", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        build(lr=0.1).save(path)
    assert yaml.safe_load(path.read_bytes())["lr"] == 0.5
    assert list(tmp_path.iterdir()) == [path]


# --- nasty input: taken or refused at once, never anything else


def assert_one_line_each(error: RecipeError) -> None:
    assert error.problems
    for problem in error.problems:
        assert text.printable(problem) == problem and len(problem) < 700


@pytest.mark.parametrize("name", FIELDS)
def test_nasty_values_of_every_field(name):
    for value in VALUES.values():
        with at_once():
            try:
                recipe = Recipe(**{name: value})
            except RecipeError as error:
                assert_one_line_each(error)
                with pytest.raises(RecipeError):
                    load_recipe(None, {name: value})
                continue
        # What is taken is plain, and a file gives it back.
        saved = yaml.safe_dump(recipe.to_dict(), allow_unicode=True)
        assert Recipe.from_values(parse_yaml(saved)) == recipe


def alias_bomb(levels: str) -> str:
    lines = [f"{levels[0]}: &{levels[0]} [{', '.join('x' * 9)}]"]
    lines += [f"{new}: &{new} [{', '.join(['*' + old] * 9)}]" for old, new in itertools.pairwise(levels)]
    return "\n".join([*lines, f"targets: *{levels[-1]}"])  # a message about it would have 10^10 words


NASTY_FILES = {
    **{f"{name}, as key": f"{nasty}: 1\n" for name, nasty in TEXTS.items()},
    "alias bomb": alias_bomb("abcdefghij"),
    "alias of itself": "peft_kwargs: &a {a: *a}",
    "anchor": "lr: &a 1",
    "merge": "<<: {lr: 1}",
    "list as key": "? [a]\n: 1",
    "nothing as key": "~: 1\n? : 2",
    "not a number as key": ".nan: 1",
    "two documents": "lr: 1\n---\nlr: 2",
    "megabytes": "a: " + "x" * 2**20,
    "explicit tags": "lr: !!float x",
    "bool of its tag": "cache: !!bool perhaps",
    "date of its tag": "lr: !!timestamp x",
    "integer without digits": "epochs: 0x_",
}


@pytest.mark.parametrize("name", NASTY_FILES)
def test_nasty_files_are_refused(name, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_bytes(NASTY_FILES[name].encode("utf-8", "surrogatepass"))
    with at_once(), pytest.raises(RecipeError) as info:
        load_recipe(config)
    assert_one_line_each(info.value)


@pytest.mark.parametrize("name", TEXTS)
def test_nasty_words_in_a_file(name, tmp_path):
    config = tmp_path / "recipe.yaml"
    for key in ("lr", "img_size", "targets", "layers", "peft_kwargs", "checkpoint"):
        config.write_bytes(f"{key}: {TEXTS[name]}".encode("utf-8", "surrogatepass"))
        with at_once():
            try:
                load_recipe(config)
            except RecipeError as error:
                assert_one_line_each(error)


def make_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


NASTY_PATHS = {
    "a NUL": lambda folder: folder / "a\0b",
    "a long name": lambda folder: folder / ("x" * 5000),
    "a long path": lambda folder: folder / ("x/" * 5000),
    "a surrogate": lambda folder: folder / "\ud800",
    "bytes that are not UTF-8": lambda folder: folder / "\udce9.yaml",
    "under a file": lambda folder: write(folder / "file", "lr: 1") / "x",
    "a folder": lambda folder: folder,
    "a pipe": lambda folder: make_fifo(folder / "pipe"),
    "a device": lambda folder: Path("/dev/zero"),
    "a broken link": lambda folder: link(folder / "broken", folder / "nothing"),
    "a link to itself": lambda folder: link(folder / "circle", folder / "circle"),
}


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("key", ["config", "resume", "checkpoint"])
@pytest.mark.parametrize("kind", NASTY_PATHS)
def test_nasty_paths_are_refused_without_waiting(kind, key, tmp_path):
    path = NASTY_PATHS[kind](tmp_path)
    errors: list[RecipeError] = []

    def load() -> None:
        with pytest.raises(RecipeError) as info:
            load_recipe(path) if key == "config" else load_recipe(None, {key: path})
        errors.append(info.value)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(5)
    assert errors, "it waits, or it raised something else"
    assert_one_line_each(errors[0])


@pytest.mark.parametrize("kind", [kind for kind in NASTY_PATHS if kind not in ("a folder", "a broken link")])
@pytest.mark.parametrize("key", ["data_dir", "output_dir"])
def test_nasty_folders_are_refused(kind, key, tmp_path):
    path = NASTY_PATHS[kind](tmp_path)
    may_be_made = kind == "bytes that are not UTF-8" or (key, kind) == ("data_dir", "under a file")
    try:
        recipe = load_recipe(None, {key: str(path), "dataset": "flowers", "download": False})
    except RecipeError as error:
        assert_one_line_each(error)
    else:
        assert may_be_made and recipe.to_dict()[key] == str(path)


# --- paths


@pytest.mark.parametrize("key", ["output_dir", "data_dir", "checkpoint", "resume"])
def test_a_tilde_is_the_home_folder(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build(**{key: "~/x"}).to_dict()[key] == str(tmp_path / "x")
    build(lr=0.5, dataset="flowers").save(tmp_path / "x" / "recipe.yaml")
    (tmp_path / "base.pth").touch()
    value = {"checkpoint": "~/base.pth", "output_dir": "~/y"}.get(key, "~/x")
    config = write(tmp_path / "config.yaml", f"dataset: flowers\n{key}: {value}\n")
    expected = os.path.expanduser(value)
    assert load_recipe("~/config.yaml").to_dict()[key] == expected
    assert load_recipe(None, {key: value, "dataset": "flowers"}).to_dict()[key] == expected
    assert load_recipe(config).to_dict()[key] == expected


def test_a_tilde_without_a_home_folder_is_refused(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(RecipeError, match="no home folder is known"):
        Recipe(output_dir="~/x")


@pytest.mark.parametrize("key", ["checkpoint", "data_dir"])
def test_relative_inputs_are_stored_as_absolute_paths(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = build(**{key: "base"})
    assert recipe.to_dict()[key] == str(tmp_path / "base")
    recipe.save("recipe.yaml")
    monkeypatch.chdir("/")
    assert read_yaml(tmp_path / "recipe.yaml")[key] == str(tmp_path / "base")


def test_a_name_that_is_not_utf8_survives_the_file(tmp_path):
    recipe = Recipe(output_dir=str(tmp_path / "caf\udce9"))
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.from_values(read_yaml(tmp_path / "recipe.yaml")) == recipe


# --- options that are handed on


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dataset_kwargs": "seed=0"}, "dataset_kwargs: seed is set by the key data_seed"),
        ({"dataset_kwargs": {"split": "val"}}, "split is set by the keys train_split and eval_split"),
        ({"dataset_kwargs": {"img_size": [8, 8]}}, "img_size is set by the key img_size"),
        ({"model_kwargs": {"pretrained": True}}, "pretrained is set by the key pretrained"),
        ({"model_kwargs": {"rank": 2}}, "rank is an option of a method, not of the model: give it in"),
        ({"peft_kwargs": {"rank": "two"}}, "peft_kwargs: rank = 'two': expected a whole number"),
        ({"peft_kwargs": {"rank": True}}, "rank = True: expected a whole number"),
        ({"peft_kwargs": {"alpha": [1]}}, "alpha = [1]: expected a number > 0"),
        ({"peft_kwargs": {"variant": 3}}, "variant = 3: expected one of free, exp, tanh, paper"),
        (
            {"peft": "lora+ft", "peft_kwargs": {"lora": {"rank": {}}}},
            "rank = {}: expected a mapping from targets",
        ),
        ({"peft_kwargs": "rank=2,rank=3"}, "'rank' is given twice"),
        ({"peft_kwargs": "=3"}, "expected name=value"),
        ({"dataset_kwargs": {"a": {"b": float("nan")}}}, "expected finite numbers"),
        ({"peft": "lora", "targets": {"lor": "both"}}, "Did you mean 'lora'?"),
        ({"peft": "lora+ft", "targets": "lora=both,fft=D"}, "'fft' is not one of the methods of lora+ft"),
        ({"peft": "lora+ft", "targets": {"lora": []}}, "for each method: lora=both,ft=A_log,D"),
    ],
)
def test_wrong_options_are_reported_with_everything_else(values, words):
    with pytest.raises(RecipeError) as info:
        Recipe.from_values({**values, "epochs": 0})
    assert len(info.value.problems) == 2
    assert words in str(info.value)


def test_options_of_methods_are_parsed_like_every_other_value():
    recipe = build(peft="lora+prodial", peft_kwargs={"alpha": "1e-3", "prodial": {"rank": "4"}})
    assert recipe.method.method_kwargs == {"alpha": 0.001, "prodial": {"rank": 4}}


def test_options_whose_values_hold_commas_and_braces():
    assert parsers.mapping("a=[1, 2],b={c: d}") == {"a": [1, 2], "b": {"c": "d"}}
    assert parsers.mapping("{a: x=y}") == {"a": "x=y"}


@pytest.mark.parametrize(
    "value", ["lora=both,ft=A_log,D", "{lora: both, ft: [A_log, D]}", {"lora": "both", "ft": ["A_log", "D"]}]
)
def test_targets_of_each_method(value):
    assert build(peft="lora+ft", targets=value).method.targets == {"lora": "both", "ft": ["A_log", "D"]}


@pytest.mark.parametrize(
    "value", ["in_proj=8,x_proj[B]=4", '{in_proj: 8, "x_proj[B]": 4}', {"in_proj": 8, "x_proj[B]": "4"}]
)
def test_options_of_each_target(value):
    expected = {"rank": {"in_proj": 8, "x_proj[B]": 4}}
    recipe = build(peft="lora", rank=value)
    assert recipe.method.method_kwargs == expected
    assert Recipe.from_values(parse_yaml(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert build(peft="lora", peft_kwargs={"rank": value}).method.method_kwargs == expected
    assert build(peft="lora+ft", peft_kwargs={"lora": {"rank": value}}).method.method_kwargs == {
        "lora": expected
    }


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"in_proj": 8, "x_proj[B]": 0}, "expected a whole number >= 1 for target 'x_proj[B]', not 0"),
        ("in_proj=many", "expected a whole number >= 1 for target 'in_proj', not 'many'"),
        ({1: 8}, "expected a mapping from targets, such as in_proj=8,x_proj[B]=4"),
    ],
)
def test_wrong_options_of_a_target_are_named(value, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        build(peft="lora", rank=value)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("in_proj[x],x_proj[dt|B|C],!layers.0.", ["in_proj[x]", "x_proj[dt|B|C]", "!layers.0."]),
        ("re:(?=x)in_proj", "re:(?=x)in_proj"),
        ('["re:a{1,2}=", in_proj]', ["re:a{1,2}=", "in_proj"]),
        ("lora=both,!x_proj[B], ft = A_log,D", {"lora": ["both", "!x_proj[B]"], "ft": ["A_log", "D"]}),
    ],
)
def test_targets_as_a_flag(text, targets):
    assert build(peft="lora+ft", targets=text).method.targets == targets


@pytest.mark.parametrize("value", ["lora=0-2,ft=5,-1", {"lora": [0, 1, 2], "ft": "5,-1"}])
def test_layers_of_each_method(value):
    assert build(peft="lora+ft", layers=value).method.layers == {"lora": [0, 1, 2], "ft": [5, -1]}
    with pytest.raises(RecipeError, match="layers: 'ft' is not one of the methods of lora"):
        build(peft="lora", layers=value)


# --- options of methods, which the methods alone declare


def test_keys_of_methods_are_what_the_methods_declare():
    for name in OPTIONS_OF_METHODS:
        declared = [options_of(method)[name] for _, method in METHODS.items() if name in options_of(method)]
        assert declared[0].help == FIELDS[name].help
        for item in declared:
            assert FIELDS[name].parse(str(item.default)) == item.default


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft": "mine", "rank": 8}, "rank = 8 does not fit method mine: expected one of auto, full"),
        ({"peft": "lora+mine", "rank": 8}, "peft_kwargs: {mine: {rank: ...}}"),
        ({"peft": "mine+lora", "peft_kwargs": {"rank": 8}}, "rank = 8 does not fit method mine"),
        ({"peft": "lora+mine", "peft_kwargs": {"rank": "auto"}}, "rank = 'auto' does not fit method lora"),
    ],
)
def test_methods_that_declare_a_name_in_different_ways(values, words, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        summary = "mine"
        rank: Literal["auto", "full"] = option("auto", "its own kind of rank")

    monkeypatch.setitem(METHODS._things, "mine", Mine)
    with pytest.raises(RecipeError, match=re.escape(words)):
        Recipe(**values)
    each = {"lora": {"rank": 8}, "mine": {"rank": "full"}}
    assert Recipe(peft="lora+mine", peft_kwargs=each).method.method_kwargs == each


def test_ranges_of_methods_hold_in_recipes_and_in_calls():
    """The same annotation is behind both."""
    for name, wrong in (("alpha", 0), ("dropout", 1), ("block_size", 0), ("scale_decay", -1)):
        with pytest.raises(RecipeError, match=f"{name} = {wrong}: expected a"):
            Recipe(peft="prodial", peft_kwargs={name: wrong})
        with pytest.raises(ValueError, match=f"option {name} of method 'prodial': expected a value "):
            resolve_options("prodial", {name: wrong})
