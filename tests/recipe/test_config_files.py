"""Files that are one recipe or a grid of recipes, and everything that can be wrong with them."""

from __future__ import annotations

import pytest

from vimtune import cli
from vimtune.recipe import RecipeError, load_recipe
from vimtune.recipe.config_files import read_config, variants_of

GRID = """
epochs: 3
lr: 0.5
variants:
  data:
    generated: {dataset: synthetic_flowers, dataset_kwargs: {species: 4}}
    mine: {dataset: folder}
  method:
    lora_in: {peft: lora, targets: in_proj}
    full: {peft: full, lr: 1.0e-4}
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return path


def test_one_choice_of_every_group_makes_a_recipe(grid):
    assert read_config(grid, "generated/full") == {
        "epochs": 3,
        "lr": 1e-4,
        "dataset": "synthetic_flowers",
        "dataset_kwargs": {"species": 4},
        "peft": "full",
    }
    assert load_recipe(grid, {"epochs": "7"}, "generated/lora_in").optimisation.lr == 0.5
    assert variants_of(grid) == ["generated/lora_in", "generated/full", "mine/lora_in", "mine/full"]


def test_a_file_without_variants_is_one_recipe(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("epochs: 3\n")
    assert read_config(path) == {"epochs": 3} and variants_of(path) == []
    with pytest.raises(RecipeError, match=r"variant = 'a': '.*one\.yaml' is no grid"):
        load_recipe(path, variant="a")


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (None, r"is a grid: expected --variant data/method, .*'method': lora_in, full"),
        ("", "expected --variant data/method"),
        ("generated", "expected --variant data/method"),
        ("generated/full/3", "expected --variant data/method"),
        ("full/generated", "has no 'full' among its choices of 'data': generated, mine"),
        ("generated/lora_inn", "Did you mean 'lora_in'"),
    ],
)
def test_a_variant_that_the_grid_does_not_have(grid, variant, words):
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(grid, variant=variant)
    assert len(caught.value.problems) == 1 and "grid.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(
            (f"variants: {value}", "expected under 'variants' groups")
            for value in ("", "3", "[]", "{}", "{1: 2}")
        ),
        *(
            (f"variants: {{data: {value}}}", "expected under")
            for value in ("", "3", "[a]", "{}", "{a: 3}", "{a: }")
        ),
        ("variants: {data: {1: {lr: 1}}}", "expected under"),
        ("variants: {data: {a/b: {lr: 1}}}", "has a '/'"),
        ("variants: {d: {a: {lr: 1}}, m: {b: {lr: 2}}}", "'lr' is set by the groups 'd' and 'm'"),
    ],
)
def test_malformed_grids(tmp_path, text, words):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    for variant in (None, "a", "a/b"):
        with pytest.raises(RecipeError, match=words) as caught:
            load_recipe(path, variant=variant)
        assert "\n" not in str(caught.value) and "grid.yaml" in str(caught.value)


def test_mistakes_in_a_choice_are_those_of_a_recipe(grid):
    with pytest.raises(RecipeError, match="needs data_dir"):
        load_recipe(grid, variant="mine/full")
    grid.write_text("variants: {m: {a: {eposch: 3, lr: -1, variants: 2}}}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(grid, variant="a")
    assert len(caught.value.problems) == 3


def test_the_command_line(grid, capsys):
    assert cli.main(["train", "--config", str(grid), "--variant", "mine/ful", "--epoch", "3"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'full'?" in error and "unknown flag --epoch" in error
    assert cli.main(["train", "--variant", "mine/full"]) == 2
    assert "variant = 'mine/full' needs config" in capsys.readouterr().err
