"""Mixed batches, against one pass for each adapter."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from counting import Count

import vimtune
from vimtune.adapters.mixing import forward_mixed, using
from vimtune.models import layers
from vimtune.testing.methods import build_test_model, close, disturb


def with_adapters(model, **adapters):
    """The model with random adapters by name: (method, options of `inject`)."""
    for seed, (name, (method, options)) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        vimtune.inject(model, method, name=name, **options)
        disturb(model, seed)
    return model.eval()


def one_by_one(model, inputs, names):
    """The reference: every row alone, under the active adapter."""
    before, rows = vimtune.adapters.active_adapter(model), []
    with torch.no_grad():
        for row, name in enumerate(names):
            vimtune.set_adapter(model, name)
            rows.append(model(inputs[row : row + 1])[0])
    vimtune.set_adapter(model, None if before is None else before.name)
    return rows


def check(model, inputs, names):
    expected = one_by_one(model, inputs, names)
    found = forward_mixed(model, inputs, names)
    assert [row.shape for row in found] == [row.shape for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        close(row, wanted, 2e-5)
    return found


def images(rows):
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    """Low-rank rules of several ranks, others, rules that are read or surround calls, heads of any size."""
    return with_adapters(
        build_test_model(),
        small=("lora", {"rank": 2, "num_classes": 3}),
        large=("lora", {"rank": 8, "targets": ["in_proj[x]", "in_proj[z]"]}),
        other=("prodial", {"rank": 4, "num_classes": 7}),
        head=("linear", {}),
        read=("bitfit", {"num_classes": 2}),
        around=("prompt", {}),
    )


def test_rows_have_their_own_adapters_and_heads(model):
    names = ["small", "around", None, "large", "small", "read", "other", "head", None, "read"]
    found = check(model, images(len(names)), names)
    assert [len(row) for row in found] == [3, 5, 5, 5, 3, 2, 7, 5, 5, 2]
    assert vimtune.adapters.active_adapter(model).name == "around"


@pytest.mark.parametrize("names", [["small", "large", "small", None], ["other", "small"], ["read", "read"]])
def test_what_can_goes_through_the_model_once(model, names, monkeypatch):
    passes = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, x, *rest: passes.append(len(x)) or forward(self, x, *rest)
    )
    forward_mixed(model, images(len(names)), names)
    assert passes == [len(names)]


def test_threads_choose_for_themselves(model):
    inputs = images(2)
    names = ["small", "other", "read", "around", None, "large"] * 4
    expected = {name: forward_mixed(model, inputs, [name, "small"]) for name in names}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: forward_mixed(model, inputs, [name, "small"]), names))
    for name, rows in zip(names, found, strict=True):
        assert all(torch.equal(row, wanted) for row, wanted in zip(rows, expected[name], strict=True))


def test_a_block_of_one_thread_has_its_adapter(model):
    inputs = images(1)
    active, (other,), (base,) = (
        model(inputs),
        *(one_by_one(model, inputs, [name]) for name in ("other", None)),
    )
    with torch.no_grad(), using(model, "other"), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(lambda: model(inputs)).result()
        close(model(inputs)[0], other)
        with using(model, None):
            close(model(inputs)[0], base)
    close(elsewhere, active)
    close(model(inputs), active, 0)


def test_adapters_do_not_change_within_a_block(model):
    model = copy.deepcopy(model)
    changes = [
        lambda: vimtune.merge(model),
        lambda: vimtune.set_adapter(model, "small"),
        lambda: vimtune.inject(model, "linear", name="new"),
        lambda: vimtune.disabled(model).__enter__(),
    ]
    for change in changes:
        with (
            using(model, "other"),
            pytest.raises(ValueError, match="within `using`, which has chosen 'other'"),
        ):
            change()
    assert vimtune.adapters.active_adapter(model).name == "around"


def test_adapters_that_come_and_go(model):
    model = copy.deepcopy(model)
    names = ["small", "new", "small"]
    with_adapters(model, new=("lora", {"rank": 3}))
    check(model, images(3), names)
    vimtune.delete_adapter(model, "new")
    with_adapters(model, new=("oft", {"block_size": 4}))
    check(model, images(3), names)
    check(pickle.loads(pickle.dumps(model)), images(3), names)
    with pytest.raises(ValueError, match="no adapter named 'gone'"):
        forward_mixed(model, images(1), ["gone"])


def test_a_model_of_timm():
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    with_adapters(
        model,
        a=("lora", {"targets": ["qkv[q|v]", "fc1"], "rank": 2}),
        b=("dora", {"targets": "qkv", "rank": 2, "num_classes": 2}),
        c=("bitfit", {"targets": ["qkv.bias"]}),
    )
    for names in (["a", "b", None, "a", "c"], ["a", "c"], ["a", "c", "c", None, None, None]):
        check(model, images(len(names)), names)


def test_layers_under_autocast_and_without(model):
    """Those are mixed in the dtype that each layer multiplies in."""
    model = copy.deepcopy(model)
    mixer = model.layers[1].mixer
    inside = mixer.forward

    def exactly(hidden, *flow):
        with torch.autocast("cpu", enabled=False):
            return inside(hidden.float(), *flow)

    mixer.forward = exactly
    names = ["small", "large", None, "small", "other", "large", "small"]
    for taken in (names, [name for name in names if name != "other"]):
        inputs = images(len(taken))
        with torch.autocast("cpu", torch.bfloat16):
            for row, wanted in zip(
                forward_mixed(model, inputs, taken), one_by_one(model, inputs, taken), strict=True
            ):
                close(row.float(), wanted.float(), 0.03)


def test_weights_that_are_larger_than_what_they_multiply():
    """They are not copied for each row: rows of one adapter are multiplied by one weight."""
    model = with_adapters(
        Wide(),
        a=("prodial", {"targets": "layer", "rank": 2}),
        b=("prodial", {"targets": "layer", "rank": 2}),
        c=("bitfit", {"targets": ["layer.bias"]}),
    )
    inputs = torch.randn(5, 64)
    for names in (["a", "b", "a", None, "a"], ["a", "c", "b", "c", "a"]):
        check(model, inputs, names)


class Wide(torch.nn.Module):
    """A large layer with one token."""

    batch_first, adapter_calls = True, ("forward",)

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x)


class Tied(torch.nn.Module):
    """Two layers have one weight."""

    batch_first, adapter_calls = True, ("forward",)

    def __init__(self):
        super().__init__()
        self.first, self.own, self.second = (torch.nn.Linear(8, 8) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.own(self.first(x)))


def test_adapters_beside_one_of_a_shared_weight():
    lora = {"rank": 2}
    model = with_adapters(
        Tied(),
        shared=("lora", {"targets": "first", **lora}),
        a=("lora", {"targets": "own", **lora}),
        b=("lora", {"targets": "own", **lora}),
    )
    check(model, torch.randn(5, 8), ["a", "shared", "b", None, "a"])


@pytest.mark.parametrize("method", ["lora", "prodial"])
def test_changes_of_tensors_are_seen_at_once(method):
    """Nothing that is computed from them is kept, as a change through `data` leaves no trace."""
    model = with_adapters(build_test_model(), a=(method, {}), b=(method, {}))
    names = ["a", "b", "b"]
    check(model, images(3), names)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    check(model, images(3), names)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9
    check(model, images(3), names)


def operations(method, num_adapters, depth, fused, monkeypatch):
    """Operations of one forward pass under one adapter, and of a mixed one with the same number of rows."""
    monkeypatch.setattr(layers, "has_add_rms_norm", lambda *_: fused)
    model = timm.create_model("test_vim", depth=depth, backend="torch")
    names = [f"adapter_{number}" for number in range(num_adapters)]
    with_adapters(model, **{name: (method, {"num_classes": 5}) for name in names})
    inputs, rows = images(8), [name for name in names for _ in range(8 // num_adapters)]
    with torch.no_grad(), Count() as one:
        model(inputs)
    forward_mixed(model, inputs, rows)  # The first one looks at all rules.
    with Count() as mixed:
        forward_mixed(model, inputs, rows)
    return one.total, mixed.total


@pytest.mark.parametrize("method", ["lora", "prodial"])
@pytest.mark.parametrize("fused", [False, True], ids=["blocks one by one", "blocks that carry pairs"])
def test_number_of_operations(method, fused, monkeypatch):
    """It does not grow with the number of adapters, and stays below twice that of one: on a GPU each
    operation takes its time, however small it is."""
    one, mixed = operations(method, 8, 6, fused, monkeypatch)
    assert mixed == operations(method, 2, 6, fused, monkeypatch)[1]
    assert mixed < 2 * one
    less_deep = operations(method, 8, 4, fused, monkeypatch)
    more, more_of_one = (deep - flat for deep, flat in zip((mixed, one), less_deep[::-1], strict=True))
    few = (
        2 if fused or method == "lora" else 6
    )  # Else a projector stacks the tensors of its rules for itself.
    assert more - more_of_one <= 4 * few, "those of four more projectors"


def test_a_model_that_nobody_has_declared_takes_one_pass_for_each_adapter():
    class Turned(torch.nn.Module):
        """Its layer is given the tokens first."""

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1).mean(1)

    model = with_adapters(
        Turned(), a=("lora", {"targets": "layer", "rank": 2}), b=("lora", {"targets": "layer", "rank": 2})
    )
    check(model, torch.randn(3, 3, 4), ["a", "b", "a"])


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="2 adapters for a batch of 3: expected one for each row"):
        forward_mixed(model, images(3), ["small", None])
    with pytest.raises(ValueError, match="the model has no adapter"):
        forward_mixed(build_test_model().eval(), images(1), [None])
    training = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        forward_mixed(training, images(1), ["small"])
    compiled = copy.deepcopy(model)
    compiled.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"'layers\.0' has gone through torch\.compile"):
        forward_mixed(compiled, images(1), ["small"])
