"""Mixed batches, against one pass for each adapter."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import vimtune
from vimtune.adapters.mixing import forward_mixed, using
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
    check(model, images(5), ["a", "b", None, "a", "c"])


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
