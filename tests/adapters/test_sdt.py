"""SDT: what it chooses, how, and that nothing else is left of the choice."""

from __future__ import annotations

import itertools
import re

import pytest
import timm
import torch
import torch.nn.functional as F

import vimtune
from vimtune.adapters import (
    adapter_parameters,
    adapter_state_dict,
    load_adapter_state_dict,
    settle,
    settles,
)
from vimtune.adapters.rules.sdt import ColumnsRule, StatesRule
from vimtune.testing.methods import build_test_inputs, build_test_model, close, disturb

SIZES = {"frozen_channels": 0.9, "frozen_states": 0.75}
"""Of the 32 channels of test_vim 29 stay frozen, and of 16 states 12."""


def adapted(method="sdt", depth=2, **options):
    torch.manual_seed(1)
    own = {"frozen_channels", "frozen_states", "criterion", "selection_steps", "selection_lr"}
    sdt = {**SIZES, **{key: value for key, value in options.items() if key in own}}
    rest = {key: value for key, value in options.items() if key not in own}
    return vimtune.inject(build_test_model(depth).train(), method, sdt=sdt, **rest)


def batch_of(model):
    def run():
        loss = F.cross_entropy(model(*build_test_inputs()), torch.tensor([0, 1, 2]))
        loss.backward()
        return float(loss.detach())

    return run


def batches(model):
    return itertools.repeat(batch_of(model))


def sparse_rules(model):
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, StatesRule | ColumnsRule):
            found[path] = module
    return found


def largest(scores, channels, states):
    """Channels with the largest sums, and of each the states with the largest scores, in plain Python."""
    by_channel = sorted(range(len(scores)), key=lambda d: -float(scores[d].sum()))[:channels]
    return {
        d: sorted(sorted(range(scores.shape[1]), key=lambda n: -float(scores[d, n]))[:states])
        for d in sorted(by_channel)
    }


def kept_states(rule):
    """Channel -> kept states."""
    found = {}
    for place in rule.places.tolist():
        found.setdefault(place // rule.shape[1], []).append(place % rule.shape[1])
    return found


def expected_columns(rule, channels):
    return [row * rule.shape[1] + channel for row in range(rule.shape[0]) for channel in channels]


@pytest.mark.parametrize(
    ("model", "classes", "frozen_states", "expected"),
    [
        ("vim_tiny_patch16_224", 102, 0.75, 6_912),
        ("vim_small_patch16_224", 102, 0.75, 13_824),
    ],
)
def test_counts_of_vim(model, classes, frozen_states, expected):
    with torch.device("meta"):
        plain = timm.create_model(model, num_classes=classes)
    report = vimtune.summary(vimtune.inject(plain, "sdt", frozen_states=frozen_states))
    assert report.trainable - report.head == expected


def test_numbers_are_rounded_as_python_rounds():
    for share, channels in ((0.5, 16), (1 - 2.5 / 32, 2), (1 - 3.5 / 32, 4), (0.99, 1)):
        # 29.5 and 28.5 frozen channels are 30 and 28, half to even; of 32 frozen ones one is kept
        model = adapted(depth=1, frozen_channels=share)
        assert model.layers[0].mixer.A_log.shape == (32, 16)
        rule = model.layers[0].mixer.adapters["A_log"]["default"]
        assert rule.difference.shape == (channels, 4)


def test_the_formula():
    model = adapted(depth=1)
    mixer = model.layers[0].mixer
    plain = build_test_model(1).layers[0].mixer
    disturb(model)
    A = mixer.adapters["A_log"]["default"]
    expected = plain.A_log.clone()
    for value, (d, n) in zip(
        A.difference.flatten(), [(d, n) for d, states in kept_states(A).items() for n in states], strict=True
    ):
        expected[d, n] += value
    close(mixer.A_log, expected, 0)
    assert int((mixer.A_log != plain.A_log).sum()) == 3 * 4
    changed = mixer.x_proj_b.weight != plain.x_proj_b.weight
    channels = list(kept_states(mixer.adapters["A_b_log"]["default"]))
    assert changed[1:, channels].all() and int(changed.sum()) == 32 * 3  # the row of dt stays


@pytest.mark.parametrize("criterion", ["magnitude", "random", "delta", "gradient"])
def test_each_direction_chooses_by_its_scores(criterion):
    model = adapted(criterion=criterion, selection_steps=3, selection_lr=0.01)
    assert settles(model) == (criterion in ("delta", "gradient"))
    if criterion == "delta":
        state = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    plain = build_test_model().train()
    values = {
        (index, name): getattr(plain.layers[index].mixer, name)
        for index in (0, 1)
        for name in ("A_log", "A_b_log")
    }
    if settles(model):
        settle(model, batches(model))
        with torch.no_grad():
            plain.load_state_dict(
                {key: value for key, value in model.state_dict().items() if "adapters" not in key}
            )
        head = {key: value for key, value in adapter_state_dict(model).items() if key.startswith("head")}
        plain.head.load_state_dict({key.split(".")[1]: value for key, value in head.items()})
        optimizer = torch.optim.Adam([*values.values(), *plain.head.parameters()], lr=0.01)
        start = {key: value.detach().clone() for key, value in values.items()}
        for _ in range(3):
            if criterion == "delta":
                optimizer.zero_grad()
            batch_of(plain)()
            if criterion == "delta":
                optimizer.step()
        scores = {
            key: (value.grad if criterion == "gradient" else value.detach() - start[key]).square()
            for key, value in values.items()
        }
    elif criterion == "magnitude":
        scores = {key: value.detach().square() for key, value in values.items()}
    chosen = []
    for (index, name), _ in values.items():
        mixer = model.layers[index].mixer
        kept = kept_states(mixer.adapters[name]["default"])
        chosen.append(kept)
        assert len(kept) == 3 and all(len(states) == 4 for states in kept.values())
        if criterion != "random":
            assert kept == largest(scores[index, name], 3, 4)
        x_proj = mixer.x_proj if name == "A_log" else mixer.x_proj_b
        for rule in x_proj.adapters["weight"]["default"].rules:
            assert rule.places.tolist() == expected_columns(rule, list(kept))
    assert len({str(kept) for kept in chosen}) > 1 or criterion == "magnitude"
    if criterion == "delta":
        after = adapter_state_dict(model)
        assert after.keys() == state.keys()
        assert all(torch.equal(after[key], state[key]) for key in after if not key.endswith("places"))
        assert all(item.parameter.requires_grad for item in adapter_parameters(model))


def test_sdlora_starts_afresh_after_the_choice():
    """LoRA and the head train along while entries are sought, and afterwards are what they were."""
    options = {"rank": 2, "targets": {"lora": "out_proj"}, "selection_steps": 3, "selection_lr": 0.05}
    model = adapted("lora+sdt", **options)
    before = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    losses = []

    def run():
        losses.append(batch_of(model)())
        assert sum(item.key.endswith("trial") for item in adapter_parameters(model)) == 4
        return losses[-1]

    settle(model, itertools.repeat(run))
    assert len(losses) == 3 and losses[2] < losses[0]
    after = adapter_state_dict(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after if not key.endswith("places"))
    assert any(not torch.equal(after[key], before[key]) for key in after if key.endswith("places"))
    assert not any(item.parameter.grad is not None for item in adapter_parameters(model))


@pytest.mark.parametrize("failure", ["too few", "nan", "other"])
def test_whatever_goes_wrong_the_adapter_is_as_it_was(failure):
    model = adapted("lora+sdt", rank=2, selection_steps=3)
    before = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    run = batch_of(model)

    def broken():
        if failure == "other":
            raise OSError("no more data")
        run()
        return float("nan")

    given = {"too few": [run, run], "nan": [run, broken], "other": [run, broken]}[failure]
    message = {
        "too few": "asks for 3 training batches before the first step, and there are only 2",
        "nan": "the loss is nan in update 2 of 3 before the first step, with learning rate 0.001",
        "other": "no more data",
    }[failure]
    with pytest.raises(OSError if failure == "other" else ValueError, match=message):
        settle(model, given)
    after = adapter_state_dict(model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in after)
    assert all(item.parameter.requires_grad for item in adapter_parameters(model))


def test_what_was_chosen_is_saved_loaded_and_merged(tmp_path):
    model = adapted(selection_steps=1)
    settle(model, batches(model))
    disturb(model).eval()
    expected = model(*build_test_inputs())
    vimtune.save_adapter(model, tmp_path / "sdt.safetensors")
    other = build_test_model().eval()
    vimtune.load_adapter(other, tmp_path / "sdt.safetensors")
    close(other(*build_test_inputs()), expected, 0)
    ours, theirs = sparse_rules(model), sparse_rules(other)
    assert all(torch.equal(ours[path].places, theirs[path].places) for path in ours)
    close(vimtune.merge(model)(*build_test_inputs()), expected)


@pytest.mark.parametrize("places", [[0, 0], [1, 0], [-1, 0], [0, 32 * 16]])
def test_places_that_no_matrix_has_are_refused(places):
    model = adapted(depth=1)
    state = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    state["layers.0.mixer.A_log.places"][[0, -1]] = torch.tensor(places)
    message = "layers.0.mixer.A_log.places are no ascending places in a matrix of 512 entries"
    with pytest.raises(ValueError, match=message):
        load_adapter_state_dict(model, state)


@pytest.mark.parametrize(
    ("path", "places", "message"),
    [
        ("A_log", [0, 1, 2, 3, 16, 17, 18, 32, *range(64, 68)], "are not 4 states of each of 3 channels"),
        ("A_log", [*range(8), *range(64, 68)], "are not 4 states of each of 3 channels"),
        ("x_proj.weight.rules.0", [1, 3, 4], "are not the same 3 columns of each of 16 rows"),
    ],
)
def test_places_that_are_no_choice_are_refused(path, places, message):
    """So many states of each channel are kept, and of B and C the same columns in each row."""
    model = adapted(depth=1)
    state = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    key = f"layers.0.mixer.{path}.places"
    load_adapter_state_dict(model, state)
    state[key][: len(places)] = torch.tensor(places)
    with pytest.raises(ValueError, match=rf"mixer\.{re.escape(path)}\.places {message}"):
        load_adapter_state_dict(model, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": "x_proj[B]"},
            r"columns of layers.0.mixer.x_proj.weight\[B\] by A_log of the same direction",
        ),
        ({"targets": "A_log,A_b_log,D"}, "sdt acts on A_log and on rows B and C of x_proj, and not on .*D"),
        ({"criterion": {"A_log": "random"}}, "option criterion of sdt cannot differ from target to target"),
    ],
)
def test_places_where_it_cannot_act_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vimtune.inject(build_test_model(1), "sdt", **options)


def test_shares_may_differ_by_target():
    model = adapted(depth=1, frozen_states={"layers.0.mixer.A_log": 0.5})
    sizes = {len(rule.places) for rule in sparse_rules(model).values() if isinstance(rule, StatesRule)}
    assert sizes == {3 * 8, 3 * 4}


def test_one_direction_alone():
    model = vimtune.inject(build_test_model(1), "sdt", targets=["layers.0.mixer.A_log"])
    assert "layers.0.mixer.A_log" in vimtune.adapters.active_adapter(model).sites["sdt"]
