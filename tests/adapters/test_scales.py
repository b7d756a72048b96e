"""The factors of learning rate and weight decay that every method has as options."""

from __future__ import annotations

import pytest
from method_cases import COMPOSITIONS, label, options_for

import vimtune
from vimtune.adapters import adapter_parameters
from vimtune.methods import list_methods
from vimtune.recipe import Recipe, RecipeError
from vimtune.testing.methods import build_test_model
from vimtune.training.optim import build_optimizer

WITHOUT_TENSORS = {"linear", "memba"}
"""Methods that train nothing but the head."""
CASES = [*((name, {}) for name in list_methods() if name not in WITHOUT_TENSORS), *COMPOSITIONS[::3]]


def multiples(model):
    """(learning rate, weight decay) of every trained tensor, as multiples of the run's."""
    return {item.key: (item.learning_rate, item.weight_decay) for item in adapter_parameters(model)}


def of_single(methods, options, scales):
    """`options` of a composition in which some methods have further ones."""
    return {**options, **{name: {**options.get(name, {}), **scales} for name in methods}}


@pytest.mark.parametrize("case", CASES, ids=label)
def test_what_a_method_trains_follows_its_factors_and_nothing_else_does(case):
    spec, options = case[0], options_for(*case)
    names = [name for name in spec.split("+") if name not in WITHOUT_TENSORS]
    options = of_single(names, options, {"lr_scale": 1.0, "decay_scale": 1.0})
    before = multiples(vimtune.inject(build_test_model(1), spec, **options))
    scaled = of_single(names[-1:], options, {"lr_scale": 0.5, "decay_scale": 3.0})
    after = multiples(vimtune.inject(build_test_model(1), spec, **scaled))
    assert before.keys() == after.keys()
    moved = {key for key in before if after[key] != before[key]}
    assert moved and not any(key.startswith("head.") for key in moved)
    assert moved != before.keys() - {key for key in before if key.startswith("head.")} or len(names) == 1
    for key in moved:
        assert after[key] == (0.5 * before[key][0], 3 * before[key][1])
    everywhere = of_single(names, options, {"lr_scale": 0.5, "decay_scale": 3.0})
    after = multiples(vimtune.inject(build_test_model(1), spec, **everywhere))
    for key, (rate, decay) in before.items():
        assert after[key] == ((rate, decay) if key.startswith("head.") else (0.5 * rate, 3 * decay))


def test_factors_by_target_and_their_groups(tmp_path):
    model = vimtune.inject(
        build_test_model(), "lora", targets="both", rank=2, lr_ratio=4.0, lr_scale={"in_proj": 0.5},
        decay_scale={"out_proj": 0.0},
    )  # fmt: skip
    expected = {
        "in_proj": {"lora_A": (0.5, 1.0), "lora_B": (2.0, 1.0)},
        "out_proj": {"lora_A": (1.0, 0.0), "lora_B": (4.0, 0.0)},
    }
    found = multiples(model)
    for key, value in found.items():
        if not key.startswith("head."):
            assert value == expected[key.split(".")[3]][key.rpartition(".")[2]]
    groups = build_optimizer(adapter_parameters(model), lr=1e-2, weight_decay=0.1).param_groups
    assert len(groups) == 4 + 2  # those of the head are its weight and its bias
    vimtune.save_adapter(model, tmp_path / "a.safetensors")
    loaded = build_test_model()
    vimtune.load_adapter(loaded, tmp_path / "a.safetensors")
    assert multiples(loaded) == found


def test_options_by_target_beside_one_for_all_targets():
    """Of a method whose sizes cannot differ by target the factors can."""
    targets = {"x_proj": 0.5, "A_log": 2.0}
    model = vimtune.inject(build_test_model(), "additional_scan", num_states=2, lr_scale=targets)
    rates = {key: rate for key, (rate, _) in multiples(model).items() if not key.startswith("head.")}
    assert rates and all(rate == (0.5 if "x_proj" in key else 2.0) for key, rate in rates.items())


@pytest.mark.parametrize("method", sorted(WITHOUT_TENSORS))
def test_factors_without_anything_to_train_are_refused(method):
    message = f"lr_scale = 0.5 would have no effect: method '{method}' trains nothing beside the head"
    by_target = [{"scan()": 0.5}] if method == "memba" else []
    for value in (0.5, *by_target):
        with pytest.raises(ValueError, match=message):
            vimtune.inject(build_test_model(), method, lr_scale=value)


def test_one_tensor_has_one_factor():
    options = {"hidden": 4, "lr_scale": {"layers.0.mixer.scan()": 0.5}}
    with pytest.raises(ValueError, match=r"lr_scale of method 'affix' is 0\.5 and 1 for .*give one value"):
        vimtune.inject(build_test_model(), "affix", num_tokens=2, **options)
    vimtune.inject(build_test_model(), "affix", num_tokens=2, **{**options, "hidden": 0})


def test_recipes_take_them_as_other_options():
    recipe = Recipe(peft="lora+a_tuning", peft_kwargs="{lora: {lr_scale: 5}, a_tuning: {decay_scale: 0}}")
    assert recipe.method.peft_kwargs == {"lora": {"lr_scale": 5.0}, "a_tuning": {"decay_scale": 0.0}}
    by_target = Recipe(peft="prodial", peft_kwargs="{lr_scale: in_proj=2}").method.peft_kwargs
    assert by_target == {"lr_scale": {"in_proj": 2.0}}
    with pytest.raises(RecipeError, match="lr_scale = 0: expected a number > 0"):
        Recipe(peft="lora", peft_kwargs="lr_scale=0")
