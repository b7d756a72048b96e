"""Plans: what flags and files mean, and what is refused."""

from __future__ import annotations

import sys

import pytest
import yaml
from tiny_plans import TINY

from vimtune import cli
from vimtune.compare.plan import Cell, Plan, PlanError, load_plan


def problems(**values):
    with pytest.raises(PlanError) as caught:
        Plan.from_values(values)
    return caught.value.problems


def test_names_in_flags_take_the_keys_that_the_file_has_for_them(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "methods: {low: {peft: lora, rank: 2}, lora: {rank: 4}, full: {}}\n"
        "data: {small: {dataset: synthetic_flowers, epochs: 3}, other: {dataset: synthetic_flowers}}\n"
        "reference: full\nmodel: test_vim\npretrained: false\n"
    )
    plan = load_plan(path, {"methods": "lora,low,linear", "data": "small"})
    lora, low = {"peft": "lora", "rank": 4}, {"peft": "lora", "rank": 2}
    assert plan.methods == {"lora": lora, "low": low, "linear": {"peft": "linear"}}
    assert plan.reference == "lora" and list(plan.data) == ["small"]
    assert plan.recipe(Cell("low", "small", 1e-3, 0), tmp_path).optimisation.epochs == 3
    assert load_plan(path, {"methods": "low,full"}).reference == "full"
    # Keys replace those of the file, and other problems are told as without a file.
    assert load_plan(path, {"methods": "{lora: {rank: 8}}"}).methods["lora"]["rank"] == 8
    with pytest.raises(PlanError, match="'lw' is no method"):
        load_plan(path, {"methods": "lw"})
    with pytest.raises(PlanError, match="each of them once"):
        load_plan(path, {"methods": "low,low"})


def test_names_are_methods_and_data_sets_or_tasks():
    plan = Plan.from_values({"methods": "lora,lora+bitfit", "data": ["flowers", "arc_easy"]})
    assert plan.methods == {"lora": {"peft": "lora"}, "lora+bitfit": {"peft": "lora+bitfit"}}
    assert plan.data == {"flowers": {"dataset": "flowers"}, "arc_easy": {"task": "arc_easy"}}
    assert len(plan.pairs) == 4
    assert Plan.from_values({"methods": "lora"}).data == {
        "synthetic_flowers": {"dataset": "synthetic_flowers"}
    }
    assert Plan.from_values({"methods": "lora", "task": "arc_easy"}).data == {
        "arc_easy": {"task": "arc_easy"}
    }


def test_what_a_method_says_comes_before_the_data_set_and_that_before_the_rest():
    plan = Plan.from_values(
        {
            "methods": {"a": {"peft": "lora", "rank": 2, "batch_size": 1}, "b": {"peft": "lora"}},
            "data": {"small": {"dataset": "synthetic_flowers", "batch_size": 2, "epochs": 3}},
            "batch_size": 4,
            "epochs": 5,
            "weight_decay": 0.5,
        }
    )
    values = [plan.recipe_values(Cell(name, "small", 1e-3, 7)) for name in ("a", "b")]
    assert [own["batch_size"] for own in values] == [1, 2] and values[0]["rank"] == 2
    assert all(own["epochs"] == 3 and own["weight_decay"] == 0.5 and own["seed"] == 7 for own in values)


def test_a_folder_of_data_is_for_the_data_sets_that_read_one(tmp_path):
    entries = {"made": {"dataset": "synthetic_flowers"}, "flowers": {}, "arc_easy": {}}
    plan = Plan.from_values({"methods": "lora", "data": entries, "data_dir": str(tmp_path)})
    given = {name: plan.recipe_values(Cell("lora", name, 1e-3, 0)).get("data_dir") for name in entries}
    assert given == {"made": None, "flowers": str(tmp_path), "arc_easy": str(tmp_path)}
    entries["made"]["data_dir"] = str(tmp_path)
    (found,) = problems(methods="lora", data=entries)
    assert found.startswith(f"data: made: data_dir = '{tmp_path}' would not be read: ")


def test_where_the_learning_rates_come_from():
    plan = Plan.from_values(
        {
            "methods": {"lora": {}, "full": {"lrs": [1e-5, 1e-4]}, "bitfit": {"lr": 0.5}},
            "data": {"flowers": {}, "cars": {"lrs": "1e-2"}},
            "lrs": "1e-3,3e-3",
            "download": True,
        }
    )
    assert plan.rates("lora", "flowers") == [1e-3, 3e-3] and plan.rates("lora", "cars") == [1e-2]
    assert plan.rates("full", "cars") == [1e-5, 1e-4] and plan.rates("bitfit", "cars") == [0.5]
    assert Plan.from_values({"methods": "lora"}).rates("lora", "synthetic_flowers") == [1e-3]
    assert Plan.from_values({"methods": "lora", "lr": 0.1}).rates("lora", "synthetic_flowers") == [0.1]


def test_data_seeds_are_an_axis_of_the_grid(tmp_path):
    plan = Plan.from_values({**TINY, "methods": "lora", "seeds": "3,4", "data_seeds": "0,7", "shots": 1})
    cells = plan.cells("lora", "synthetic_flowers", 1e-3)
    assert [(cell.seed, cell.data_seed) for cell in cells] == [(3, 0), (4, 0), (3, 7), (4, 7)]
    recipes = [plan.recipe(cell, tmp_path) for cell in cells]
    assert [(recipe.run.seed, recipe.data.data_seed) for recipe in recipes] == [
        (3, 0), (4, 0), (3, 7), (4, 7)
    ]  # fmt: skip
    assert len({cell.path for cell in cells}) == 4
    without = Plan.from_values({**TINY, "methods": "lora", "seeds": "3,4", "shots": 1})
    assert [cell.path for cell in without.cells("lora", "synthetic_flowers", 1e-3)] == [
        cell.path for cell in cells[:2]
    ], "runs without data seeds are those of data seed 0"
    plan.save(tmp_path)
    assert load_plan(tmp_path / "plan.yaml", {}).data_seeds == [0, 7]


def test_flags_and_files_mean_the_same_and_flags_win(tmp_path):
    values = {"methods": {"lora": {"rank": 2}, "full": {}}, "seeds": [0, 1], "lrs": [1e-3, 1e-2], "epochs": 3}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    flags = {"methods": "{lora: {rank: 2}, full: }", "seeds": "0,1", "lrs": "1e-3,1e-2", "epochs": "3"}
    from_flags, from_file = load_plan(None, flags), load_plan(tmp_path / "plan.yaml", {})
    assert from_flags.options == from_file.options
    cell = Cell("lora", "synthetic_flowers", 1e-3, 1)
    assert from_flags.recipe(cell, tmp_path) == from_file.recipe(cell, tmp_path)
    assert load_plan(tmp_path / "plan.yaml", {"seeds": "5", "lr_seeds": "5"}).options.seeds == [5]


def test_a_stored_plan_is_the_same_plan(tmp_path):
    values = {**TINY, "methods": "lora,full", "seeds": "0,1", "devices": "cuda:0,cuda:1", "budget": "none"}
    plan = Plan.from_values(values)
    plan.save(tmp_path)
    assert load_plan(tmp_path / "plan.yaml", {}).to_dict() == plan.to_dict()
    assert plan.recipe(Cell("lora", "synthetic_flowers", 1e-3, 0), tmp_path).run.device == "cuda"


def test_all_mistakes_are_reported_at_once_and_shared_ones_once():
    found = problems(
        methods={"lroa": {}, "lora": {"rnak": 2, "rank": 0}, "bitfit": {"budget": "300k"}, "x": {"seed": 1}},
        data={"flowrs": {}, "cars": {"mixup": -1}},
        seedz=3,
        epochs=0,
        output_dir="x",
    )
    hint = "Did you mean"
    assert found == [
        f"unknown key 'seedz'. {hint} 'seeds'?",
        "output_dir = 'x': set by the folder of the comparison",
        f"methods: lora: unknown key 'rnak'. {hint} 'rank'?",
        "methods: x: seed = 1: set by the key seeds",
        f"methods: 'lroa' is no method, and has no key peft. {hint} 'lora'?",
        "methods: 'x' is no method, and has no key peft.",
        f"data: 'flowrs' is no data set and no task, and has no key dataset or task. {hint} 'flowers'?",
        "epochs = 0: expected a whole number >= 1",
        "methods: lora: rank = 0: expected a whole number >= 1",
        "methods: bitfit: budget = 300000: method 'bitfit' has no option that decides how much it trains. "
        "Expected a method whose size is to be chosen, or no budget (none) for this one",
        "data: cars: mixup = -1: expected a number >= 0",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "methods is missing: name what is compared, such as "),
        ({"methods": []}, "methods = []: expected names such as lora,full, or a mapping"),
        ({"methods": {"a/b": {"peft": "lora"}}}, "'a/b': expected a name of letters, digits"),
        ({"methods": {"..": {"peft": "lora"}}}, "'..': expected a name of letters, digits"),
        ({"methods": {"lora": 3}}, "lora: 3: expected keys of recipes, such as {rank: 8}"),
        ({"methods": "lora,lora"}, "expected names, each of them once"),
        (
            {"methods": "lora", "seeds": "0,0"},
            "seeds = '0,0': expected seeds such as 0,1,2, each of them once",
        ),
        ({"methods": "lora", "seeds": "-1"}, "seeds = '-1': expected seeds such as 0,1,2: expected a whole"),
        (
            {"methods": "{lora: {data_seed: 3}}", "data_seeds": "0,1"},
            "methods: lora: data_seed = 3: set by the key data_seeds",
        ),
        (
            {"methods": "lora", "data_seeds": [0, 1], "data_seed": 2},
            "data_seed = 2: set by the key data_seeds",
        ),
        ({"methods": "lora", "data_seeds": "x"}, "data_seeds = 'x': expected seeds such as 0,1,2"),
        ({"methods": "lora", "lr_seeds": "4"}, "lr_seeds: 4 is not among the seeds 0"),
        (
            {"methods": "lora", "lrs": "0"},
            "lrs = '0': expected learning rates such as 1e-3,3e-3: expected a number > 0",
        ),
        ({"methods": {"lora": {"lrs": "x"}}}, "methods: lora: lrs = 'x': expected learning rates"),
        ({"methods": "lora", "lr": 1, "lrs": "1,2"}, "lr and lrs are given: lr is one learning rate"),
        ({"methods": "lora", "peft": "lora"}, "peft = 'lora': set by the key methods"),
        (
            {"methods": "lora", "devices": "cpu,cuda:0"},
            "devices = ['cpu', 'cuda:0']: expected devices of one kind",
        ),
        (
            {"methods": "lora", "data": "flowers", "data_dir": "/nowhere", "download": False},
            "data_dir = '/nowhere' is not a folder",
        ),
        (
            {"methods": "lora", "lrs": "1,2", "train_split": "train+val"},
            "the test split would choose the learning rate",
        ),
        (
            {"methods": "lora", "lrs": "1,2", "eval_split": "test"},
            "the test split would choose the learning rate",
        ),
    ],
)
def test_what_is_refused(values, message):
    (found,) = problems(**values)
    assert message in found


def test_one_learning_rate_needs_no_choice():
    Plan.from_values({"methods": "lora", "lr": 1e-3, "train_split": "train+val"})


def test_flags_of_training_that_a_comparison_sets_say_by_what(capsys):
    assert cli.main(["compare", "--methods", "lora", "--seed", "3", "--peft", "lora"]) == 2
    error = capsys.readouterr().err
    assert "unknown flag --seed: set by the key seeds." in error
    assert "unknown flag --peft: set by the key methods." in error


def test_the_command_line_reports_its_own_mistakes_with_the_others(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vimtune.compare.command", None)  # nothing of it is needed for this
    assert cli.main(["compare", "--methods", "lroa", "--seedz", "3", "--epochs", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 3 problems in the plan:")
    for part in ("unknown flag --seedz. Did you mean '--seeds'?", "Did you mean 'lora'?", "epochs = '0'"):
        assert part in error
