"""Options of methods in recipes: flags beside files, and defaults that another version has otherwise."""

from __future__ import annotations

import pytest
import yaml

from vimtune.recipe import Recipe, RecipeError, load_recipe


@pytest.mark.parametrize(
    ("stated", "flags", "expected"),
    [
        ({"peft_kwargs": {"rank": 2, "variant": "paper"}}, {"rank": "8"}, {"rank": 8, "variant": "paper"}),
        (
            {"peft_kwargs": {"variant": "paper"}},
            {"peft_kwargs": "lr_scale=2"},
            {"variant": "paper", "lr_scale": 2},
        ),
        ({"rank": 4}, {"peft_kwargs": "rank=8"}, {"rank": 8}),
        ({"peft_kwargs": {"variant": "paper"}}, {"peft_kwargs": {"variant": "free"}}, {"variant": "free"}),
        ({"peft_kwargs": {"variant": "paper"}}, {}, {"variant": "paper"}),
    ],
)
def test_a_flag_changes_its_option_alone(stated, flags, expected, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"peft": "prodial", **stated}))
    assert load_recipe(file, flags).method.given_options == expected


def test_a_flag_changes_its_option_of_every_method_and_another_method_has_its_own(tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    kwargs = {"lora": {"rank": 4, "scaling": "rslora"}, "ssm": {"lr_scale": 3}}
    file.write_text(yaml.safe_dump({"peft": "lora+ssm", "peft_kwargs": kwargs}))
    method = load_recipe(file, {"rank": 8, "peft_kwargs": "{ssm: {decay_scale: 2}}"}).method
    assert method.rank == 8 and method.peft_kwargs == {
        "lora": {"scaling": "rslora"},
        "ssm": {"lr_scale": 3, "decay_scale": 2},
    }
    other = load_recipe(file, {"peft": "prodial", "peft_kwargs": "variant=free"}).method
    assert other.peft_kwargs == {"variant": "free"}
    with pytest.raises(RecipeError, match="peft_kwargs"):
        load_recipe(file, {"peft_kwargs": "no mapping"})


@pytest.fixture
def written(tmp_path):
    """Files of recipes that state no option, or another one than the variant."""
    files = {}
    for name, values in {"none": {}, "rank": {"rank": 4}, "both": {"peft": "prodial+ssm"}}.items():
        files[name] = tmp_path / f"{name}.yaml"
        Recipe(**{"peft": "prodial", **values}).save(files[name])
    return files


def test_a_stored_recipe_is_the_same_where_defaults_are_others(written) -> None:
    for file in written.values():  # as a version writes them that has another variant by default
        stored = yaml.safe_load(file.read_text())
        stored["method_defaults"]["prodial"]["variant"] = "free"
        file.write_text(yaml.safe_dump(stored))
        assert load_recipe(file).method.all_options["prodial"]["variant"] == "free"
    recipe = load_recipe(written["rank"])
    assert recipe.method.given_options == {"rank": 4, "variant": "free"}
    other = load_recipe(written["rank"], {"peft_kwargs": "variant=paper"})
    assert other.method.given_options == {"rank": 4, "variant": "paper"}
    assert load_recipe(written["rank"], {"peft": "lora"}) == Recipe(peft="lora", rank=4)
    recipe.save(written["none"])  # and once more
    assert load_recipe(written["none"]) == recipe


def test_a_stored_recipe_says_no_more_where_defaults_are_the_same(written) -> None:
    assert load_recipe(written["none"]) == Recipe(peft="prodial")
    assert load_recipe(written["rank"]) == Recipe(peft="prodial", rank=4)
    stored = yaml.safe_load(written["rank"].read_text())
    assert stored["method_defaults"]["prodial"]["variant"] == "exp"
    assert "rank" not in stored["method_defaults"]["prodial"]


@pytest.mark.parametrize("defaults", ["exp", {"prodial": 3}, {"prodial": {"variant": "no such"}}], ids=str)
def test_stored_defaults_are_checked(defaults) -> None:
    with pytest.raises(RecipeError, match=r"method_defaults|variant"):
        Recipe.from_values({"peft": "prodial", "method_defaults": defaults})
