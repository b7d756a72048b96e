"""Spaces: what may be drawn, what a drawn recipe says, and everything that can be wrong with a space."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from search_runs import SPACE, tiny_plan

from vimtune.recipe import Recipe
from vimtune.search.composing import recipe_values
from vimtune.search.plan import read_plan, varied_keys
from vimtune.search.reading import SpaceError, parse_space, published_spaces, read_space_file
from vimtune.search.results import describe
from vimtune.search.space import NONE, WITHOUT
from vimtune.search.study import drawn_again

KEYS = varied_keys("classification")


def parse(values: dict[str, Any]):
    return parse_space(values, KEYS)


# --- what is drawn


def test_what_was_drawn_becomes_a_recipe() -> None:
    space = parse(SPACE)
    drawn = space.draw(
        drawn_again({"proj": True, "proj.rank": 2, "biases": True, "lr": 0.01, "weight_decay": 0.01}), {}
    )
    values = recipe_values(space, drawn)
    assert values["peft"] == "lora+bitfit" and values["lr"] == 0.01 and values["weight_decay"] == 0.01
    assert values["targets"] == {"lora": ["in_proj", "out_proj"]}
    assert values["peft_kwargs"] == {"lora": {"rank": 2, "alpha": 1.0}}
    nothing = space.draw(drawn_again({"proj": False, "biases": False, "lr": 0.01, "weight_decay": 0}), {})
    assert recipe_values(space, nothing)["peft"] == "linear"


def test_parts_of_one_method_are_told_apart_by_their_targets_and_the_whole_comes_first() -> None:
    parts = {
        "x": {"method": "lora", "targets": "in_proj[x]", "options": {"rank": 2}},
        "in": {"method": "lora", "targets": "in_proj", "options": {"rank": 4, "alpha": 3}},
        "out": {"method": "lora", "targets": ["out_proj", "x_proj[B]"]},
    }
    space = parse({"parts": parts})
    values = recipe_values(space, space.draw(drawn_again({"x": True, "in": True, "out": True}), {}))
    assert values["peft"] == "lora"
    assert values["targets"] == {"lora": ["in_proj", "in_proj[x]", "out_proj", "x_proj[B]"]}
    assert values["peft_kwargs"] == {
        "lora": {"rank": {"in_proj": 4, "in_proj[x]": 2}, "alpha": {"in_proj": 3.0}}
    }
    assert list(values["peft_kwargs"]["lora"]["rank"]) == ["in_proj", "in_proj[x]"], "the last one holds"
    Recipe(**values)


def test_tables_show_what_varies() -> None:
    values = copy.deepcopy(SPACE)
    values["parts"]["biases"] = {"method": "lora", "targets": "D", "options": {"rank": 1, "dropout": 0.1}}
    values["parts"]["proj"]["options"]["dropout"] = 0.0
    space = parse(values)
    params = {"proj": True, "proj.rank": 2, "biases": True, "lr": 0.01, "weight_decay": 0}
    shown = space.varying(space.draw(drawn_again(params), {}))
    assert describe(shown) == "proj (rank 2, alpha 1), biases; lr 0.01, weight_decay 0"


def test_values_are_multiplied_whichever_is_stated_first() -> None:
    alpha, rank = {"value": 0.5, "times": "rank"}, {"low": 1, "high": 8}
    keys = {
        "head_lr": {"low": 1.0, "high": 4.0, "times": "lr"},
        "lr": {"low": 1.0, "high": 4.0, "times": "lr"},
    }
    for options in ({"alpha": alpha, "rank": rank}, {"rank": rank, "alpha": alpha}):
        space = parse({"parts": {"a": {"method": "lora", "options": options}}, "keys": keys})
        drawn = space.draw(drawn_again({"a": True, "a.rank": 6, "lr": 2.0, "head_lr": 3.0}), {"lr": 0.1})
        assert drawn.parts == {"a": {"rank": 6, "alpha": 3.0}}
        assert drawn.keys == pytest.approx({"lr": 0.2, "head_lr": 0.6})


def test_of_alternatives_there_is_one() -> None:
    space = parse({"combine": "one", "parts": {"a": {"method": "lora"}, "b": {"method": "dora"}}})
    assert list(space.draw(drawn_again({"part": "b"}), {}).parts) == ["b"]


def test_the_second_step_keeps_the_parts_and_draws_their_sizes() -> None:
    values = copy.deepcopy(SPACE)
    values["parts"]["proj"]["refine"] = {"rank": {"low": 4, "high": 8, "step": 4}}
    values["refine"] = {"remove_one": True, "keys": {"head_lr": {"low": 1.0, "high": 5.0, "times": "lr"}}}
    space = parse(values)
    assert space.has_refinement and not parse(SPACE).has_refinement
    params = {"proj": True, "proj.rank": 2, "biases": True, "lr": 0.01, "weight_decay": 0.01}
    refined = space.refine(space.draw(drawn_again(params), {}))
    drawn = refined.draw(drawn_again({WITHOUT: "biases", "proj.rank": 8, "head_lr": 2.0}), {"lr": 0.5})
    assert drawn.parts == {"proj": {"rank": 8, "alpha": 1.0}}, "alpha is that of the first step"
    assert drawn.keys == {"lr": 0.01, "weight_decay": 0.01, "head_lr": 0.02}
    whole = refined.draw(drawn_again({WITHOUT: NONE, "proj.rank": 4, "head_lr": 2.0}), {})
    assert list(whole.parts) == ["proj", "biases"]


# --- the published one

MINIMAL = {
    "lora_out_proj": ("lora", "out_proj", 8),
    "lora_in_proj": ("lora", "in_proj", 8),
    "lora_X": ("lora", "in_proj[x]", 8),
    "lora_Z": ("lora", "in_proj[z]", 8),
    "lora_embed": ("lora", "patch_embed.proj", 8),
    "lora_x_proj": ("lora", "x_proj", 4),
    "lora_d": ("lora", "x_proj[dt]", 4),
    "lora_B": ("lora", "x_proj[B]", 4),
    "lora_C": ("lora", "x_proj[C]", 4),
    "lora_dt": ("lora", "dt_proj", 4),
    "affix": ("affix", None, 1),
    "prompt": ("prompt", None, 1),
    "additional_scan": ("additional_scan", None, 1),
    "A": ("a_tuning", None, None),
    "D": ("d_tuning", None, None),
    "conv1d": ("conv1d_tuning", None, None),
    "cls_token": ("cls_token_tuning", None, None),
    "pos_embed": ("pos_embed_tuning", None, None),
    "bias": ("bias_tuning", None, None),
}
"""The 19 switches of MambaPEFT's first step: method, place, size."""
SIZES = {"lora": "rank", "affix": "num_tokens", "prompt": "num_tokens", "additional_scan": "num_states"}


def test_the_published_space_is_that_of_the_paper() -> None:
    parts = read_space_file("mambapeft")["parts"]
    found = {
        name: (
            part["method"],
            part.get("targets"),
            part["options"][SIZES[part["method"]]] if "options" in part else None,
        )
        for name, part in parts.items()
    }
    assert found == MINIMAL and len(found) == 19
    for name, part in parts.items():
        if part["method"] == "lora":
            scale = 1.0 if name == "lora_embed" else 0.1
            assert part["options"]["alpha"] == {"value": scale, "times": "rank"}


def test_the_published_winner_is_a_recipe_of_this_space() -> None:
    plan = tiny_plan(space=read_space_file("mambapeft"))
    plan.check()
    winner = ("lora_out_proj", "lora_in_proj", "lora_X", "lora_B", "lora_dt", "affix", "A", "cls_token")
    drawn = plan.space.draw(drawn_again({name: name in winner for name in MINIMAL}), {})
    recipe = plan.final_recipe(plan.space, drawn)
    assert recipe.method.peft == "lora+affix+a_tuning+cls_token_tuning"
    assert recipe.method.targets == {"lora": ["out_proj", "in_proj", "dt_proj", "in_proj[x]", "x_proj[B]"]}
    refined = plan.space.refine(drawn)
    assert set(refined.parts) == set(winner) and refined.removes


def test_the_published_second_step_draws_factors_of_learning_rate_and_decay_for_each_part() -> None:
    plan = tiny_plan(space=read_space_file("mambapeft"))
    winner = ("lora_in_proj", "lora_B", "A")
    refined = plan.space.refine(
        plan.space.draw(drawn_again({name: name in winner for name in MINIMAL}), plan.base())
    )
    ranges = {"lr_scale": (0.1, 5.0), "decay_scale": (0.1, 10.0)}
    for part in refined.parts.values():
        assert {key: tuple(part.options[key].ends()) for key in ranges} == ranges
        assert all(part.options[key].log for key in ranges)
    drawn = {f"{name}.{key}": low for name in winner for key, (low, _) in ranges.items()}
    drawn |= {"A.lr_scale": 5.0, "lora_B.decay_scale": 10.0, WITHOUT: NONE}
    for part in ("lora_in_proj", "lora_B"):
        drawn |= {f"{part}.rank": 4, f"{part}.alpha": 0.5}
    values = recipe_values(refined, refined.draw(drawn_again(drawn), plan.base()))
    assert values["peft_kwargs"] == {
        "lora": {
            "rank": {"in_proj": 4, "x_proj[B]": 4},
            "alpha": {"in_proj": 2.0, "x_proj[B]": 2.0},
            "lr_scale": {"in_proj": 0.1, "x_proj[B]": 0.1},
            "decay_scale": {"in_proj": 0.1, "x_proj[B]": 10.0},
        },
        "a_tuning": {"lr_scale": 5.0, "decay_scale": 0.1},
    }
    plan.final_recipe(refined, refined.draw(drawn_again(drawn), plan.base()))


# --- what is wrong

WRONG: dict[str, tuple[Any, str]] = {
    "an unknown key": ({"partz": {}}, "the space: unknown key 'partz'. Did you mean 'parts'?"),
    "no parts": ({"parts": []}, "parts = []: expected named parts"),
    "a name": ({"parts": {"a b": {"method": "lora"}}}, "part 'a b': expected a name of at most 40"),
    "a reserved name": ({"parts": {"none": {"method": "lora"}}}, "is none of part, without, none"),
    "a method": ({"parts": {"a": {"method": "lorra"}}}, "method = 'lorra': expected a known method"),
    "no mapping": ({"parts": {"a": "lora"}}, "part a = 'lora': expected a mapping"),
    "targets": ({"parts": {"a": {"method": "lora", "targets": 3}}}, "part a: targets = 3: expected"),
    "a switch": ({"parts": {"a": {"method": "lora", "optional": "maybe"}}}, "part a: optional = 'maybe'"),
    "an option": (
        {"parts": {"a": {"method": "lora", "options": {"rnak": 3}}}},
        "rnak = 3 is not a field of lora: its fields are alpha, decay_scale, dropout, lr_ratio, lr_scale, "
        "rank, scaling, start. Did you mean 'rank'?",
    ),
    "a value": (
        {"parts": {"a": {"method": "lora", "options": {"rank": 0}}}},
        "rank = 0: expected a whole number >= 1",
    ),
    "an end": (
        {"parts": {"a": {"method": "lora", "options": {"rank": {"low": 0, "high": 4}}}}},
        "expected a whole number >= 1",
    ),
    "a range of numbers": (
        {"parts": {"a": {"method": "lora", "options": {"rank": {"low": 1.0, "high": 4.0}}}}},
        "expected whole numbers as low and high",
    ),
    "a step": (
        {"parts": {"a": {"method": "lora", "options": {"rank": {"low": 1, "high": 4, "step": 2}}}}},
        "step: expected whole numbers that lead from low to high",
    ),
    "a direction": ({"keys": {"lr": {"low": 2.0, "high": 1.0}}}, "expected low <= high, not 2 and 1"),
    "a logarithm": ({"keys": {"weight_decay": {"low": 0, "high": 1, "log": True}}}, "log: expected low > 0"),
    "half a range": ({"keys": {"lr": {"low": 2.0}}}, "expected a value, {low, high} with step or log"),
    "a choice": ({"keys": {"lr": {"choose": []}}}, "choose: expected a list of 1 to 64 values"),
    "a choice of lists": ({"keys": {"betas": {"choose": [[0.9, 0.99]]}}}, "choose: expected numbers, words"),
    "twice the same": ({"keys": {"lr": {"choose": [0.1, 0.1]}}}, "choose: expected every value once"),
    "a key": ({"keys": {"lrr": 1}}, "'lrr' = 1 is no key that a search may vary. Did you mean 'lr'?"),
    "a key of the data": ({"keys": {"data_seed": 1}}, "'data_seed' = 1 is no key that a search may vary"),
    "the test split": ({"keys": {"eval_split": "test"}}, "is no key that a search may vary"),
    "a key of the method": ({"keys": {"rank": 1}}, "'rank' says how the model is adapted: state it in"),
    "a factor": ({"keys": {"lr": {"value": 1, "times": "device"}}}, "expected the name of a number"),
    "a factor without a value": (
        {"parts": {"a": {"method": "lora", "options": {"alpha": {"value": 1, "times": "rank"}}}}},
        "alpha: times = 'rank': expected one that is stated beside it",
    ),
    "a factor that is itself": (
        {"parts": {"a": {"method": "lora", "options": {"alpha": {"value": 1, "times": "alpha"}}}}},
        "alpha: times = 'alpha': expected one that is stated beside it",
    ),
    "a circle": (
        {"keys": {"lr": {"value": 1, "times": "min_lr"}, "min_lr": {"choose": [1], "times": "lr"}}},
        "keys: lr: times = 'min_lr': expected one that is not itself multiplied by lr",
    ),
    "the name of a key": (
        {"parts": {"lr": {"method": "lora"}}, "keys": {"lr": {"low": 1, "high": 2}}},
        "part lr has the name of a key that is drawn",
    ),
    "the same place": (
        {"parts": {"a": {"method": "lora", "targets": "D"}, "b": {"method": "lora", "targets": "D"}}},
        "part b: a is the same method with the same targets",
    ),
    "no place": (
        {"parts": {"a": {"method": "lora", "targets": "D"}, "b": {"method": "lora"}}},
        "part b: several parts are of method lora, so each of them needs targets",
    ),
    "combine": ({"combine": "all"}, "combine = 'all': expected any or one"),
    "an option of every part": (
        {"refine": {"options": {"rank": 3}}},
        "refine: options: rank = 3 is not a field of every method: its fields are decay_scale, lr_scale.",
    ),
    "remove of one": ({"combine": "one", "refine": {"remove_one": True}}, "remove_one does not go with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(name: str) -> None:
    values, message = WRONG[name]
    with pytest.raises(SpaceError) as error:
        parse({"parts": {"lora": {"method": "lora"}}, **values})
    assert message in str(error.value)
    assert len(error.value.problems) == (2 if name == "a circle" else 1) and len(str(error.value)) < 900


def test_everything_that_is_wrong_is_said_at_once() -> None:
    values = {
        "parts": {"a": {"method": "lora", "options": {"rank": 0, "rnak": 1}}, "b c": {}},
        "keys": {"lr": {"low": 1}, "peft": "lora"},
        "refine": {"remove": True},
    }
    with pytest.raises(SpaceError, match="6 problems in the space") as error:
        parse(values)
    assert len(error.value.problems) == 6


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["lora", "lr", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["low", "high", "choose", "times", "value", "rank", "lr", "a"]), inner
        )
    ),
    max_leaves=8,
)
"""Values as YAML has them."""


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["parts", "keys", "refine", "combine", "x"]), PLAIN)
    | st.builds(lambda part: {"parts": {"a": {"method": "lora", **part}}}, st.dictionaries(
        st.sampled_from(["options", "refine", "targets", "optional", "method"]), PLAIN))
    | st.builds(lambda lr: {"parts": {"a": {"method": "lora"}}, "keys": {"lr": lr}}, PLAIN)
)  # fmt: skip
def test_any_values_are_a_space_or_refused(values: dict[str, Any]) -> None:
    try:
        space = parse(values)
    except SpaceError as error:
        assert error.problems and not any("\n" in problem for problem in error.problems)
    else:
        assert space.parts


def test_what_does_not_fit_the_recipe_is_said_before_the_first_trial() -> None:
    plan = tiny_plan(space={**SPACE, "keys": {"warmup_epochs": {"low": 0, "high": 5}}})
    with pytest.raises(SpaceError, match=r"warmup_epochs = 5 is longer than the run \(epochs = 2\)"):
        plan.check()


def test_a_plan_that_could_not_be_read_again_is_refused() -> None:
    parts = {f"p{number}": {"method": "lora", "targets": ["x" * 8000]} for number in range(10)}
    with pytest.raises(SpaceError, match=r"the plan has [\d,]+ characters; at most 65,536 are read again"):
        tiny_plan(space={"parts": parts}).check()


def test_files_of_spaces_and_plans(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"--space 'mambapef': expected a YAML file or one of mambapeft"):
        read_space_file("mambapef")
    assert list(published_spaces()) == ["mambapeft"]
    path = tmp_path / "search.yaml"
    plan = tiny_plan()
    plan.save(path)
    assert read_plan(path) == plan
    values = yaml.safe_load(path.read_text())
    for change, message in (
        ({"format": "other"}, "is no plan of a search"),
        ({"trials": 0}, "expected a whole number >= 1"),
        ({"more": 1}, "expected the keys format, name"),
        ({"recipe": {"lr": -1}}, "its recipe: lr = -1"),
        ({"space": []}, "expected mappings as space and recipe"),
    ):
        path.write_text(yaml.safe_dump({**values, **change}))
        with pytest.raises(ValueError, match=message) as error:
            read_plan(path)
        assert "\n" not in str(error.value)
