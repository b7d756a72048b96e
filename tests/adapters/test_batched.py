"""Effective weights computed for all layers at once are those that each layer computes for itself."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from counting import Count
from method_cases import CASES, disturb, label, options_for
from torch import nn

import vimtune
from vimtune.adapters import (
    WeightRule,
    adapter_parameters,
    adapter_state_dict,
    batched,
    check_gradients,
    shared_effective_weights,
)
from vimtune.adapters.composition import Composition
from vimtune.adapters.sites import Site
from vimtune.adapters.slots import attach, computed_ahead, has_rules, iter_weight_slots

BATCHED = ["lora", "prodial", "dora", "strong"]
TOLERANCE = 1e-6  # of the norm: products of stacks may sum in another order


def build(method="lora", depth=3, **options):
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=5, depth=depth, backend="torch")
    return disturb(vimtune.inject(model, method, **options_for(method, options)))


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close(actual, expected, tolerance=TOLERANCE):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    assert (actual - expected).norm() <= tolerance * expected.norm()


def ahead():
    """How many weights are there before anyone reads them."""
    return len(computed_ahead.get() or {})


def read(model):
    """Every effective value, by path."""
    return {path: getattr(owner, name) for path, owner, name, _ in iter_weight_slots(model)}


def gradients(model):
    """Those of what took part: rules of calls do not, where only weights are read."""
    return {
        item.name: item.parameter.grad
        for item in adapter_parameters(model)
        if item.parameter.grad is not None
    }


def use(model, shared, amp=False):
    """Effective values and outputs of linear layers, and the gradients of a loss that all of them enter."""
    model.zero_grad()
    torch.manual_seed(2)
    outputs = {}
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=amp),
        shared_effective_weights(model) if shared else nullcontext(),
    ):
        values = read(model)
        for path, owner, name, _ in iter_weight_slots(model):
            if isinstance(owner, nn.Linear) and name == "weight":
                outputs[path] = owner(torch.randn(4, owner.in_features))
    loss = sum((x.float() * torch.randn(x.shape)).sum() for x in (*values.values(), *outputs.values()))
    loss.backward()
    called = tuple(item.name for item in adapter_parameters(model) if item.base_name.endswith("()"))
    return values, outputs, {name: x for name, x in gradients(model).items() if name not in called}


@pytest.fixture(params=CASES, ids=label)
def case(request):
    return request.param


@pytest.mark.parametrize("amp", [False, True])
def test_values_and_gradients(case, amp):
    model = build(case[0], **case[1])
    for expected, actual in zip(use(model, False, amp), use(model, True, amp), strict=True):
        assert list(actual) == list(expected)
        for name in expected:
            close(actual[name], expected[name])


@pytest.mark.parametrize("amp", [False, True])
def test_a_step_of_the_model(case, amp):
    model = build(case[0], depth=2, **case[1]).eval()
    results = []
    for block in (nullcontext(), shared_effective_weights(model)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), block:
            logits = model(images())
        logits.float().square().sum().backward()
        check_gradients(model)
        results.append((logits, gradients(model)))
    close(results[1][0], results[0][0], 1e-6)
    for name, gradient in results[0][1].items():
        close(results[1][1][name], gradient, 1e-5)


def count(method, depth, shared, amp):
    """Operations for the values of all projectors, forward and backward; casts included, products not."""
    model = build(method, depth)
    linears = [m for m in model.layers.modules() if isinstance(m, nn.Linear) and has_rules(m)]
    inputs = [torch.zeros(1, m.in_features, dtype=torch.bfloat16) for m in linears]
    model.zero_grad()
    found = []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=amp),
        Count() as forward,
        shared_effective_weights(model) if shared else nullcontext(),
    ):
        for linear, x in zip(linears, inputs, strict=True):
            found.append(linear(x) if amp else linear.weight)
    ones = [torch.ones_like(x) for x in found]
    with Count() as backward:
        torch.autograd.backward(found, ones)
    products = len(linears) if amp else 0  # of the layers, one each way
    return forward.total - products, backward.total - products


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("method", ["lora", "prodial", "dora", "strong"])
def test_number_of_operations_is_that_of_one_layer_a_group(method, amp):
    single, together = (count(method, 24, shared, amp) for shared in (False, True))
    print(f"{method}{' under autocast' if amp else ''}: {single} operations become {together}")
    assert together == count(method, 4, True, amp)
    assert all(10 * few < many for few, many in zip(together, single, strict=True))


def grouped(model):
    with shared_effective_weights(model):
        return ahead()


@pytest.mark.parametrize("method", BATCHED)
def test_what_is_grouped(method):
    model = build(method)
    projectors = 3 * (4 if method == "strong" else 2)
    assert grouped(model) == projectors
    assert grouped(model.layers) == projectors
    assert grouped(model.layers[0]) == 0  # a layer has no two of a kind
    with vimtune.disabled(model):
        assert grouped(model) == 0
    assert grouped(vimtune.merge(model)) == 0


@pytest.mark.parametrize("method", ["full", "bitfit", "linear", "ft"])
def test_parameters_that_are_the_value_are_left_alone(method):
    assert grouped(build(method)) == 0


def test_dropout_changes_outputs_and_no_weight():
    model = build("lora", dropout=0.5)
    assert grouped(model.train()) == 6
    assert grouped(model.eval()) == 6


def projector(model, layer):
    return model.layers[layer].mixer.in_proj


def rule_of(model, layer):
    return projector(model, layer).adapters["weight"]["default"]


DIFFERENCES = {
    "attribute": lambda rule: setattr(rule.branch, "scale", 3.0),
    "type of an attribute": lambda rule: setattr(rule.branch, "scale", torch.tensor(1.0)),
    "new attribute": lambda rule: setattr(rule, "note", [1]),
    "text": lambda rule: setattr(rule, "variant", "paper"),
    "training": lambda rule: rule.branch.train(not rule.training),
    "frozen tensor": lambda rule: rule.row_scale.requires_grad_(False),
    "dtype": lambda rule: rule.branch.to(torch.float64),
    "class": lambda rule: setattr(rule, "__class__", type("Other", (type(rule),), {})),
    "child": lambda rule: setattr(rule.branch, "dropout", nn.Dropout(0.0)),
    "buffer": lambda rule: rule.register_buffer("step", torch.zeros(())),
    "hook": lambda rule: rule.branch.dropout.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_rule_that_differs_computes_for_itself(change):
    model = build("prodial", depth=4).eval()
    change(rule_of(model, 1))
    with shared_effective_weights(model):
        assert ahead() == 7
        assert rule_of(model, 1) not in computed_ahead.get()
    if change is not DIFFERENCES["dtype"]:
        for expected, actual in zip(use(model, False), use(model, True), strict=True):
            for name in expected:
                if expected[name] is not None:
                    close(actual[name], expected[name])


def test_frozen_weight_that_differs():
    model = build(depth=4)
    projector(model, 1)._parameters["weight"].data = projector(model, 1)._parameters["weight"].data.double()
    assert grouped(model) == 7


def test_ranks_that_differ_fall_apart_into_groups():
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=5, depth=5, backend="torch")
    low = vimtune.adapters.get_method("lora")(rank=2)
    high = vimtune.adapters.get_method("lora")(rank=3)
    vimtune.inject(model, "linear")
    for layer, method in enumerate([low, high, low, high, vimtune.adapters.get_method("lora")(rank=4)]):
        site = Site("w", projector(model, layer), projector(model, layer).weight)
        attach(projector(model, layer), "weight", "default", method.build_rule(site))
    vimtune.set_adapter(model, "default")
    disturb(model)
    assert grouped(model) == 4
    for expected, actual in zip(use(model, False), use(model, True), strict=True):
        for name in expected:
            close(actual[name], expected[name])


class Noise(WeightRule):
    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.ones(()))

    def effective_weight(self, weight):
        return weight + self.size * torch.randn_like(weight)


class Decides(Noise):
    batchable = False

    def effective_weight(self, weight):
        return weight if self.size > 0 else -weight


def with_rules(*rules):
    """Linear layers with equal weights, each under one of the rules."""
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in rules))
    for layer, rule in zip(layers, rules, strict=True):
        nn.init.zeros_(layer.weight)
        attach(layer, "weight", "default", rule)
        layer.adapters["weight"].active = "default"
    return layers


def test_random_rules_draw_for_each_layer():
    model = with_rules(Noise(), Noise())
    with shared_effective_weights(model):
        assert ahead() == 2
        first, second = (layer.weight for layer in model)
    for x in (first, second):
        assert 0.9 < x.std() < 1.1
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.1


def test_rules_that_cannot_be_stacked_say_so():
    model = with_rules(Decides(), Decides())
    assert grouped(model) == 0
    assert grouped(with_rules(*(Composition([Noise(), Decides()], [None, None]) for _ in range(2)))) == 0


def test_one_rule_for_two_weights_serves_neither_wrongly():
    site = Site("w", nn.Linear(64, 64), torch.zeros(64, 64))
    shared = vimtune.adapters.get_method("lora")(rank=2).build_rule(site)
    model = with_rules(shared, shared)
    nn.init.ones_(model[1]._parameters["weight"])
    expected = [layer.weight for layer in model]
    with shared_effective_weights(model):
        for layer, value in zip(model, expected, strict=True):
            close(layer.weight, value)


def test_weights_nobody_reads():
    """A parameter that is never read still stands out: its rules have no gradient in any layer."""
    model = build("strong")
    with shared_effective_weights(model):
        loss = sum(block.mixer.x_proj.weight.sum() for block in model.layers[:2])
    loss.backward()
    for item in adapter_parameters(model):
        read_somewhere = ".x_proj.weight" in f".{item.base_name}"
        assert (item.parameter.grad is not None) == read_somewhere, item.name
        if "layers.2" in item.name and read_somewhere:
            assert not item.parameter.grad.any()


def test_gradients_are_tensors_like_any_other():
    """They lie in one stack; accumulating, scaling and zeroing them in place leaves the others alone."""
    model = build("prodial")
    once = {name: gradient.clone() for name, gradient in use(model, True)[2].items()}
    for name, gradient in gradients(model).items():
        gradient.mul_(2)
        close(gradient, 2 * once[name])
    nn.utils.clip_grad_norm_([item.parameter for item in adapter_parameters(model)], 1e-3)
    model.zero_grad(set_to_none=False)
    for _ in range(2):
        with shared_effective_weights(model):
            sum(x.sum() for x in read(model).values()).backward()
    summed = copy.deepcopy(gradients(model))
    model.zero_grad()
    sum(2 * x.sum() for x in read(model).values()).backward()
    for name, gradient in gradients(model).items():
        close(summed[name], gradient)


def test_autocast_rounds_for_products_alone():
    """And each product anew, as gradients of several are summed in full precision."""
    model = build().eval()
    owner = projector(model, 0)
    x = torch.randn(5, 16)
    results = []
    for shared in (False, True):
        model.zero_grad()
        block = shared_effective_weights(model) if shared else nullcontext()
        with torch.autocast("cpu", torch.bfloat16), block:
            before = owner.weight
            outputs = [owner(x), owner(x), owner(2 * x)]
            assert owner.weight.dtype == before.dtype == torch.float32
            with torch.autocast("cpu", torch.float16):
                assert owner(x).dtype == torch.float16
            with torch.autocast("cpu", enabled=False):
                assert owner(x).dtype == torch.float32
        sum(y.float().square().sum() for y in outputs).backward()
        results.append([*outputs, *(p.grad for p in rule_of(model, 0).parameters())])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


def test_blocks_in_blocks():
    model = build()
    with shared_effective_weights(model.layers[1:]):
        assert ahead() == 4
        inner = projector(model, 1).weight
        with shared_effective_weights(model.layers):
            assert ahead() == 4  # a single layer is left
            assert projector(model, 1).weight is inner
            with torch.no_grad(), shared_effective_weights(model.layers):
                assert ahead() == 6
                assert not projector(model, 1).weight.requires_grad
        assert projector(model, 1).weight is inner
        assert ahead() == 4
    assert ahead() == 0
    assert projector(model, 1).weight is not inner


def test_errors_leave_nothing_behind():
    model = build()
    expected = read(model)
    for wrong in (lambda: projector(model, 0)(torch.zeros(1, 3)), lambda: 1 / 0):
        with pytest.raises((RuntimeError, ZeroDivisionError)), shared_effective_weights(model):
            wrong()
        assert ahead() == 0
    rule_of(model, 0).effective_weight = lambda weight: None
    rule_of(model, 1).effective_weight = rule_of(model, 2).effective_weight = lambda weight: 1 / 0
    rule_of(model, 2).effective_weight = rule_of(model, 1).effective_weight
    with pytest.raises(ZeroDivisionError), shared_effective_weights(model):
        pass
    assert ahead() == 0
    for layer in range(3):
        del rule_of(model, layer).effective_weight
    assert all(torch.equal(x, expected[name]) for name, x in read(model).items())


def test_nothing_is_kept_on_the_modules():
    model = build().eval()
    expected, keys = model(images()), list(model.state_dict())
    with shared_effective_weights(model):
        assert list(model.state_dict()) == keys
        twin = copy.deepcopy(model)
        blob = pickle.dumps(model.state_dict())
        disturb(twin)
        assert not torch.equal(projector(twin, 0).weight, projector(model, 0).weight)
        assert torch.equal(twin(images()), disturb(copy.deepcopy(model))(images()))
    assert torch.equal(model(images()), expected)
    model.load_state_dict(pickle.loads(blob))
    assert torch.equal(model(images()), expected)


def test_threads_do_not_see_each_other():
    model = build()
    seen = []

    def look():
        seen.append((ahead(), projector(model, 0).weight.requires_grad))
        with shared_effective_weights(model):
            seen.append((ahead(), projector(model, 0).weight.requires_grad))

    with torch.no_grad(), shared_effective_weights(model):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert not projector(model, 0).weight.requires_grad
    assert seen == [(0, True), (6, True)]


def test_grad_mode():
    model = build()
    with torch.no_grad(), shared_effective_weights(model):
        assert ahead() == 6
        assert not projector(model, 0).weight.requires_grad
        with torch.enable_grad():
            assert projector(model, 0).weight.requires_grad
    with shared_effective_weights(model):
        assert projector(model, 0).weight.requires_grad
        with torch.no_grad():
            assert not projector(model, 0).weight.requires_grad
    with torch.inference_mode(), shared_effective_weights(model):
        assert projector(model, 0).weight.is_inference()


def test_switching_disabling_and_merging_within():
    model = build()
    vimtune.inject(model, "prodial", name="other", rank=3, num_classes=7)
    disturb(model)
    model.eval()
    other = model(images())
    vimtune.set_adapter(model, "default")
    default = model(images())
    with vimtune.disabled(model):
        base = model(images())
    with shared_effective_weights(model):
        assert ahead() == 6
        close(model(images()), default)
        vimtune.set_adapter(model, "other")
        close(model(images()), other)
        with vimtune.disabled(model):
            assert torch.equal(model(images()), base)
        vimtune.set_adapter(model, "default")
        close(model(images()), default)
        state = adapter_state_dict(model)
        vimtune.merge(model)
        close(model(images()), default)
        assert type(projector(model, 0)) is nn.Linear and not projector(model, 0).weight.grad_fn
    assert state and ahead() == 0
    close(model(images()), default)


def test_the_compiler_sees_the_single_rules(monkeypatch):
    """Whatever the method: what it sees is the call of the model."""
    torch._dynamo.reset()
    model = build("prodial", depth=2).eval()
    expected = model(images())

    def run(x):
        with shared_effective_weights(model):
            return model(x)

    def shared(modules):
        raise AssertionError("weights are shared under the compiler")

    with monkeypatch.context() as patched:
        patched.setattr(batched, "_sharing", shared)
        with pytest.raises(AssertionError, match="are shared"):
            run(images())
        close(torch.compile(run, fullgraph=True, backend="eager")(images()), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with shared_effective_weights(model):
        close(compiled(images()), expected)


@pytest.mark.parametrize("method", BATCHED)
def test_tracing_sees_the_single_rules(method):
    model = build(method, depth=2).eval()
    expected = model(images())
    with shared_effective_weights(model):
        traced = torch.jit.trace(Sharing(model), images(), check_trace=False)
    close(traced(images()), expected)
    disturb(model)
    close(traced(images()), model(images()))


class Sharing(nn.Module):
    """Enters a block wherever its model is run."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with shared_effective_weights(self.model):
            return self.model(x)


def test_functional_transforms():
    model = build().eval()
    names = [item.name for item in adapter_parameters(model)]
    values = {name: model.get_parameter(name).detach() for name in names}

    class Weights(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.model = model
            self.shared = shared

        def forward(self):
            with shared_effective_weights(self.model) if self.shared else nullcontext():
                return sum(x.square().sum() for x in read(self.model).values())

    def loss(values, shared):
        named = {f"model.{name}": value for name, value in values.items()}
        return torch.func.functional_call(Weights(shared), named, ())

    for transform in (torch.func.grad, lambda f: torch.func.vmap(f, in_dims=(0, None))):
        many = transform is not torch.func.grad
        given = {name: torch.stack([x, 2 * x]) if many else x for name, x in values.items()}
        expected, actual = (transform(loss)(given, shared) for shared in (False, True))
        for x, y in zip(*(r.values() if isinstance(r, dict) else r for r in (expected, actual)), strict=True):
            close(y, x)


def test_linear_reads_what_it_multiplies_by():
    model = build().eval()
    x = torch.randn(2, 16)
    with shared_effective_weights(model):
        assert torch.equal(projector(model, 0)(x), F.linear(x, projector(model, 0).weight))
