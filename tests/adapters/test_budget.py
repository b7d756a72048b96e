"""A budget of trained parameters chooses the size of every method."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_cases import SMALL

import vimtune
from vimtune import adapters
from vimtune.adapters.budget import MOST, choose, reach
from vimtune.fields import options_of
from vimtune.methods import METHODS, Method
from vimtune.recipe import Recipe, RecipeError

SIZED = [(name, option) for name, method in METHODS.items() for option in method.sized_by]
"""Each method with each of the options that decide its size."""


def plain():
    return timm.create_model("test_vim", num_classes=5, depth=2)


def trained(model):
    found = vimtune.summary(model)
    return found.trainable - found.head


def other_options(name, option):
    """Small values of the method's other options, and of all others that decide its size."""
    method = METHODS.get(name)
    return {
        key: SMALL.get(key, item.default)
        for key, item in options_of(method).items()
        if key != option and (key in SMALL or key in method.sized_by)
    }


def with_value(name, option, value):
    """How much a method trains where an option has this value; None where it does not fit."""
    try:
        return trained(vimtune.inject(plain(), name, **{**other_options(name, option), option: value}))
    except ValueError:
        return None


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_says_by_which_options_it_is_sized(name):
    """An empty `sized_by` is a statement, too, but it has to be made."""
    classes = METHODS.get(name).__mro__
    assert any("sized_by" in vars(cls) for cls in classes[: classes.index(Method)])


@pytest.mark.parametrize(("name", "option"), SIZED)
def test_the_value_that_trains_as_much_as_a_budget_is_found(name, option):
    is_share = isinstance(options_of(METHODS.get(name))[option].default, float)
    counts = [with_value(name, option, value) for value in ([0.3, 0.5, 0.8] if is_share else (1, 2, 4, 5, 8))]
    counts = [count for count in counts if count is not None]
    assert len(set(counts)) > 1
    for count in counts:
        assert trained(vimtune.inject(plain(), name, budget=count, **other_options(name, option))) == count
    with pytest.raises(ValueError, match=r"budget = 1 is too small: method .* trains at least"):
        vimtune.inject(plain(), name, budget=1, **other_options(name, option))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.sized_by])
def test_a_method_of_one_size_refuses_a_budget(name):
    with pytest.raises(ValueError, match=f"method '{name}' has no option that decides how much it trains"):
        vimtune.inject(plain(), name, budget="300k")
    with pytest.raises(RecipeError, match="has no option that decides how much it trains"):
        Recipe(peft=name, budget="300k")


def test_the_budget_of_a_vim_and_what_is_said_of_it(caplog):
    caplog.set_level(logging.INFO, "vimtune")
    model = timm.create_model(
        "vim_tiny_patch16_224", num_classes=102, peft="lora", peft_kwargs={"budget": "300k"}
    )
    assert trained(model) == 24 * (192 + 768 + 384 + 192) * 8 == 294_912
    assert (
        "budget of 300,000 parameters beside the head: chose lora with rank = 8, which trains 294,912: "
        "5,088 (1.7 %) below the budget"
    ) in caplog.messages
    # Of the backbone without the head, 6,955,008 numbers.
    model = timm.create_model(
        "vim_tiny_patch16_224", num_classes=102, peft="lora", peft_kwargs={"budget": "4.3%"}
    )
    assert trained(model) == 294_912


def test_a_block_size_divides_and_a_rank_is_at_most_the_smaller_side():
    model = vimtune.inject(plain(), "prodial", rank=2, budget=10**6)
    blocks = model.layers[0].mixer.in_proj.adapters["weight"]["default"].blocks
    sides = {
        layer.weight.shape[1] for layer in (model.layers[0].mixer.in_proj, model.layers[0].mixer.out_proj)
    }
    assert all(side % blocks.shape[-1] == 0 for side in sides) and blocks.shape[-1] == min(sides)
    rank = vimtune.inject(plain(), "lora", budget=10**6).layers[0].mixer.in_proj.adapters["weight"]["default"]
    assert rank.branch.lora_A.shape[0] == min(plain().layers[0].mixer.out_proj.weight.shape)


def test_an_offset_of_states_gets_no_rank_beyond_a_full_one():
    model = vimtune.inject(plain(), "state_offset", budget=10**6)
    full = vimtune.inject(plain(), "state_offset")
    assert trained(model) < trained(full) < trained(vimtune.inject(plain(), "state_offset", h_rank=11))


@pytest.mark.parametrize(
    ("method", "option", "most"),
    [("prompt", "num_tokens", 200), ("affix", "num_tokens", 200), ("additional_scan", "num_states", 16),
     ("svp", "width", 16)],
)  # fmt: skip
def test_tokens_and_states_that_make_a_model_slow_are_not_chosen_and_that_is_said(
    method, option, most, caplog
):
    caplog.set_level(logging.INFO, "vimtune")
    model = vimtune.inject(plain(), method, budget=10**7)
    assert adapters.active_adapter(model).options[method][option] == most
    assert f"chose {method} with {option} = {most} (the most that a budget gives it), which" in caplog.text
    vimtune.inject(plain(), method, **{option: most + 1})


def test_an_offset_of_outputs_has_one_size():
    message = "method 'state_offset' has one size with the options that are given. Expected a method whose"
    for kind in ("y", {"layers.0": "h", "layers.1": "y"}):
        with pytest.raises(ValueError, match=message):
            vimtune.inject(plain(), "state_offset", kind=kind, budget="300k")
    with pytest.raises(RecipeError, match=message):
        Recipe(peft="state_offset", peft_kwargs="kind=y", budget="300k")
    both, y = (
        vimtune.inject(plain(), "lora+state_offset", kind="y", budget=3000),
        vimtune.inject(plain(), "state_offset", kind="y"),
    )
    rank = trained(vimtune.inject(plain(), "lora", rank=1))
    assert trained(both) == trained(y) + (3000 - trained(y)) // rank * rank


def test_several_methods_share_a_budget():
    """First those of one size, then equal parts; what one leaves goes to the next."""
    bitfit, lora = (trained(vimtune.inject(plain(), name)) for name in ("bitfit", "lora"))
    rank = lora // 16
    assert trained(vimtune.inject(plain(), "lora+bitfit", budget=bitfit + 3 * rank)) == bitfit + 3 * rank
    model = vimtune.inject(plain(), "lora+dora", budget=5 * rank)
    rules = model.layers[0].mixer.in_proj.adapters["weight"]["default"].rules
    magnitudes = sum(
        layer.mixer.in_proj.weight.shape[0] + layer.mixer.out_proj.weight.shape[0] for layer in model.layers
    )
    ranks = [rule.branch.lora_A.shape[0] for rule in rules]
    assert ranks == [2, (3 * rank - magnitudes) // rank]
    # A given size is kept.
    model = vimtune.inject(plain(), "lora+dora", lora={"rank": 1}, budget=6 * rank)
    assert model.layers[0].mixer.in_proj.adapters["weight"]["default"].rules[0].branch.lora_A.shape[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "many"}, "budget = 'many': expected a number of parameters such as 300k, or a share"),
        ({"budget": "0%"}, "expected a number of parameters"),
        ({"budget": 0}, "expected a number of parameters"),
        ({"budget": "300k", "rank": 4}, "method 'lora' has its size already: leave out rank"),
        ({"budget": 7}, "budget = 7 is too small: method 'lora' has 7 parameters of it and trains at least"),
        ({"budget": "300k", "targets": "nowhere"}, "nowhere"),
        ({"budget": "300k", "targets": "A_log,conv1d.bias"}, "needs a matrix"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays_as_it_was(arguments, message):
    model = plain()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        vimtune.inject(model, "lora", **arguments)
    assert list(model.state_dict()) == before and not vimtune.list_adapters(model)


def test_a_budget_that_others_use_up_names_them():
    taken = trained(vimtune.inject(plain(), "bitfit"))
    message = (
        rf"budget = {taken + 7}, of which the other methods take {taken:,}, is too small: method 'lora' has "
        "7 parameters of it and trains at least"
    )
    with pytest.raises(ValueError, match=message):
        vimtune.inject(plain(), "lora+bitfit", budget=taken + 7)


def test_counting_leaves_model_and_random_numbers_alone():
    model = vimtune.inject(plain(), "lora", rank=2)
    torch.manual_seed(0)
    vimtune.inject(model, "lora", name="second", budget="1000")
    after = torch.rand(1)
    torch.manual_seed(0)
    rank = model.layers[0].mixer.in_proj.adapters["weight"]["second"].branch.lora_A.shape[0]
    vimtune.inject(plain(), "lora", rank=rank)
    plain_model = vimtune.inject(plain(), "lora", rank=2)
    torch.manual_seed(0)
    vimtune.inject(plain_model, "lora", name="second", rank=rank)
    assert torch.equal(torch.rand(1), after)


def test_recipes_take_a_budget():
    assert Recipe(peft="lora", budget="300k").method.budget == 300_000
    assert Recipe(peft="lora", budget="0.50 %").method.method_kwargs == {"budget": "0.5%"}
    assert Recipe(peft="lora").method.budget is None
    recipe = Recipe(peft="lora", budget="300k")
    assert Recipe.from_values(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError) as caught:
        Recipe(peft="lora", budget="300k", rank=4)
    assert caught.value.problems == [
        "budget = 300000: method 'lora' has its size already: leave out rank. Expected a method whose size "
        "is to be chosen, or no budget (none) for this one"
    ]
    with pytest.raises(RecipeError) as caught:
        Recipe(peft="bitfit", budget="300k", rank=4)
    assert len(caught.value.problems) == 1 and "rank" in caught.value.problems[0]


@given(
    st.lists(st.none() | st.integers(0, 50), max_size=40),
    st.booleans(),
    st.integers(0, 60),
)
def test_the_search_finds_what_trying_everything_finds(steps, falls, share):
    """Counts that rise or fall, with numbers that do not fit strewn between them."""
    total, counts = 0, []
    for step in steps:
        total += step or 0
        counts.append(None if step is None else total)
    if falls:
        counts = [None if count is None else total + 1 - count for count in counts]
    found = choose(lambda number: counts[number], len(counts) - 1, share)
    known = {number: count for number, count in enumerate(counts) if count is not None}
    if not known:
        assert found is None
        return
    fitting = [count for count in known.values() if count <= share]
    expected = max(fitting) if fitting else min(known.values())
    assert found is not None and known[found[0]] == found[1] == expected


@given(st.integers(0, 3000))
def test_where_nothing_bounds_a_size_the_model_does(largest):
    asked = []
    found = reach(lambda number: asked.append(number) or (number if number <= largest else None))
    assert largest < found <= 2 * max(largest, 1) and len(asked) <= 20
    assert reach(lambda number: number) == MOST
