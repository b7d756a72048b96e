"""Where rules go: what is chosen, how methods share a parameter, what is refused before anything changes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from method_cases import disturb, options_for
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import vimtune
from vimtune.adapters import active_adapter, adapter_parameters, adapter_state_dict, check_gradients
from vimtune.fields import options_of
from vimtune.methods import METHODS


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=5, depth=2, backend="torch").eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def refused(model, message, method="lora", **options):
    """`inject` raises one line with this message and leaves the model as it was."""
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message) as caught:
        vimtune.inject(model, method, **options_for(method, options))
    assert "\n" not in str(caught.value)
    after = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert list(after) == list(before)
    assert all(after[name][0] is x and after[name][1] == flag for name, (x, flag) in before.items())


# --- options and targets as they come from Python

FIELDS = [(name, field) for name, method in METHODS.items() for field in options_of(method)]
VALUES = {
    bool: ("true", 1, None, 0.5),
    int: ("2", 2.5, True, None, [2], 0, -1),
    float: ("x", True, None, float("nan"), float("inf"), 1j, 10**400, -1),
    str: (3, True, None, ["free"], "fre"),
    type(None): ("2", 2.5, True, [2], 0, -1),  # A size that is found unless it is given.
}


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_every_option_of_every_method_is_checked_by_type(method, field, model):
    default = options_of(METHODS.get(method))[field].default
    for value in VALUES[type(default)]:
        if type(value) is type(default) and value == default:  # Some numbers may be 0.
            continue
        refused(model, f"option {field} of method '{method}'", method, **{field: value})


def test_numbers_too_large_to_print(model):
    refused(model, "rank a whole number of 1329 bits does not fit", rank=10**400)
    refused(model, "block_size a whole number of 1329 bits does not divide", "prodial", block_size=10**400)


def test_whole_numbers_serve_as_floats(model):
    vimtune.inject(model, "lora", rank=2, alpha=3)
    assert active_adapter(model).options["lora"]["alpha"] == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "0-x"}, "layers = '0-x': expected block indices"),
        ({"layers": True}, "layers = True: expected block indices"),
        ({"layers": [0, True]}, "layers = .*: expected block indices"),
        ({"layers": 1.5}, "layers = 1.5: expected block indices"),
        ({"targets": 3}, "targets = 3: expected both"),
        ({"targets": {"lorra": "both"}}, "targets: 'lorra' is no method of this adapter"),
        ({"layers": {"ft": "0"}}, "layers: 'ft' is no method of this adapter"),
        ({"targets": {}}, "targets = {}: expected a mapping from methods"),
        ({"num_classes": True}, "num_classes = True: expected a whole number"),
        ({"num_classes": "x"}, "num_classes = 'x': expected a whole number"),
        ({"name": 3}, "adapter name 3 must be a plain identifier"),
        ({"lora": 3}, "options of method 'lora' are 3: expected a mapping"),
    ],
)
def test_arguments_of_wrong_types(model, options, message):
    refused(model, message, **options)


def test_method_of_a_wrong_type(model):
    with pytest.raises(ValueError, match="method = 3: expected the name of a method"):
        vimtune.inject(model, 3)


@pytest.mark.parametrize("layers", ["1", "-1", [1], (1,), range(1, 2), "1-1", 1])
def test_layers_as_on_the_command_line(model, layers):
    vimtune.inject(model, "lora", rank=2, layers=layers)
    names = {item.base_name for item in adapter_parameters(model) if item.group == "adapter"}
    assert names and all(name.startswith("layers.1.") for name in names)


def test_targets_and_layers_by_method(model):
    targets = {"lora": "both", "ft": "A_log,D"}
    vimtune.inject(model, "lora+ft", rank=2, targets=targets, layers={"lora": "0"})
    record = active_adapter(model)
    assert record.targets == {"lora": "both", "ft": ["A_log", "D"]} and record.layers == {"lora": [0]}
    assert record.sites == {
        "lora": ["layers.0.mixer.in_proj.weight", "layers.0.mixer.out_proj.weight"],
        "ft": [
            f"layers.{layer}.mixer.{name}" for layer in (0, 1) for name in ("A_log", "D", "A_b_log", "D_b")
        ],
    }
    disturb(model)(images()).sum().backward()
    check_gradients(model)


# --- methods that would train nothing

NOTHING = [(method, targets) for method in ("lora", "ft", "dora") for targets in ("head", ["head.weight"])]


@pytest.mark.parametrize(("method", "targets"), [*NOTHING, ("ft", "head.bias,head"), ("lora+ft", "head")])
def test_targets_in_the_head_alone(model, method, targets):
    refused(model, "is the classification head, and the head is trained in any case", method, targets=targets)


def test_a_method_that_finds_nothing():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    refused(model, "'bitfit' would train nothing with its own choice of targets", "bitfit")


def test_bitfit_takes_biases_of_every_kind():
    class Mamba2(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj = nn.Linear(4, 4)
            self.dt_bias = nn.Parameter(torch.zeros(4))
            self.rnn = nn.LSTM(4, 4)
            self.bias_table = nn.Linear(4, 4, bias=False)
            self.debiased = nn.Parameter(torch.zeros(4))

    model = vimtune.inject(Mamba2(), "bitfit")
    assert active_adapter(model).sites["bitfit"] == [
        "dt_bias",
        "in_proj.bias",
        "rnn.bias_ih_l0",
        "rnn.bias_hh_l0",
    ]
    twin = nn.ModuleDict({"in_proj": nn.Linear(4, 4), "out_proj": nn.Linear(4, 4)})
    assert active_adapter(vimtune.inject(twin, "bitfit", targets="both")).sites["bitfit"] == [
        "in_proj.bias",
        "out_proj.bias",
    ]
    model = vimtune.inject(Mamba2(), "bitfit", targets="in_proj,dt_bias")
    assert active_adapter(model).sites["bitfit"] == ["dt_bias", "in_proj.bias"]


# --- rules without effect


@pytest.mark.parametrize(
    ("method", "options", "path"),
    [
        ("strong", {"dropout": 0.1}, "layers.0.mixer.x_proj.weight"),
        ("lora", {"dropout": 0.1, "targets": "x_proj"}, "layers.0.mixer.x_proj.weight"),
        ("dora", {"dropout": 0.1, "targets": "in_proj,x_proj_b"}, "layers.0.mixer.x_proj_b.weight"),
        ("lora", {"dropout": 0.1, "rank": 1, "targets": "dt_proj"}, "layers.0.mixer.dt_proj.weight"),
        ("lora", {"dropout": 0.1, "targets": "A_log"}, "layers.0.mixer.A_log"),
    ],
)
def test_dropout_where_a_weight_is_read(model, method, options, path):
    refused(
        model,
        rf"acts on the input of a layer \(as dropout does\), but the model only reads {path}",
        method,
        **options,
    )


def test_what_the_model_reads_is_what_it_declares_to_read(model):
    """Whatever is declared as read is never called, and whatever is not declared is."""
    called = set()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(images())
    assert called == {
        name for name, module in linears.items() if not getattr(module, "weight_is_read", False)
    }


def test_dropout_in_a_layer_with_a_forward_of_its_own():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, 2 * self.weight)

    model = nn.Sequential(Scaled(8, 8, bias=False))
    refused(model, "acts on the input", dropout=0.1, targets="0")
    vimtune.inject(model, "lora", rank=2, targets="0")


def test_dropout_before_another_method(model):
    refused(
        model,
        "'dora' would follow one that acts on the input of layers.0.mixer.in_proj",
        "lora+dora",
        dropout=0.1,
    )
    refused(model, "'dora' would follow one", "lora+dora", lora={"dropout": 0.1})


def test_dropout_of_the_last_method_is_honoured(model):
    vimtune.inject(model, "lora+dora", rank=2, dora={"dropout": 0.5})
    owner = disturb(model).train().layers[0].mixer.in_proj
    x = torch.randn(64, owner.in_features)
    torch.manual_seed(0)
    outputs = torch.stack([owner(x) for _ in range(400)])
    expected = model.eval().layers[0].mixer.in_proj(x)
    assert not torch.equal(outputs[0], outputs[1])
    assert (outputs.mean(0) - expected).abs().max() < 6 * outputs.std(0).max() / 400**0.5


@pytest.mark.parametrize("method", ["lora+full", "lora+ft", "bitfit+full", "full+bitfit", "lora+dora+ft"])
def test_a_method_that_replaces_what_others_did(model, method):
    refused(model, "as a whole, so the methods before it would have no effect", method)


@pytest.mark.parametrize("method", ["full+lora", "ft+prodial", "lora+dora", "ft+lora+dora"])
def test_several_methods_on_one_parameter_all_train(model, method):
    expected = model(images())
    vimtune.inject(model, method, **options_for(method, {}))
    torch.testing.assert_close(model(images()), expected)
    disturb(model)(images()).square().sum().backward()
    check_gradients(model)
    assert all(item.parameter.grad.any() for item in adapter_parameters(model))


# --- parameters that cannot take a rule


def tied_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.in_proj = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def get_classifier(self):
            return self.head

        def forward(self, x):
            return self.head(self.in_proj(self.embed(x)))

    return Tied()


def tied_linears():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_tied_weights():
    refused(tied_embedding(), "embed.weight and head.weight are one tensor", "lora", targets="in_proj")
    vimtune.inject(tied_linears(), "ft", targets="2")  # frozen ones may be tied


@pytest.mark.parametrize("target", ["0.weight", "1.weight"])
@pytest.mark.parametrize("reversible", [True, False])
def test_tied_weights_are_one_site(target, reversible):
    model, x = tied_linears(), torch.randn(5, 4)
    plain = model(x)
    vimtune.inject(model, "lora", targets=target, rank=2)
    assert vimtune.summary(model).trainable == 16 and len(adapter_state_dict(model)) == 2
    disturb(model)
    assert model[0].weight is not model[0]._parameters["weight"]
    assert torch.equal(model[0].weight, model[1].weight)
    adapted = copy.deepcopy(model)(x)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    with vimtune.disabled(model):
        assert torch.equal(model(x), plain)
    vimtune.inject(model, "ft", targets=target, name="second")
    vimtune.delete_adapter(model, "second")
    vimtune.set_adapter(model, "default")
    vimtune.merge(model, reversible=reversible)
    assert model[0].weight is model[1].weight and "adapters" not in dict(model[1].named_children())
    torch.testing.assert_close(model(x), adapted)
    if reversible:
        vimtune.adapters.unmerge(model)
        torch.testing.assert_close(model(x), adapted)
    vimtune.delete_adapter(model, "default") if reversible else None
    assert type(model[1]) is nn.Linear


def two_in_one_memory(model):
    linears = [block.mixer.out_proj for block in model.layers]
    linears[1].weight.data = linears[0].weight.data


def tied_and_assigned(model):
    """Loading the weights of a model that ties them: torch makes a parameter of each name."""
    state = model.state_dict()
    state["layers.1.mixer.out_proj.weight"] = state["layers.0.mixer.out_proj.weight"]
    model.load_state_dict(state, assign=True)


def shifted(model):
    flat = torch.randn(16 * 32 + 5)
    for index, block in enumerate(model.layers):
        block.mixer.out_proj.weight.data = flat[5 * index :][: 16 * 32].view(16, 32)


@pytest.mark.parametrize("share", [two_in_one_memory, tied_and_assigned, shifted])
@pytest.mark.parametrize("layers", [[0], [1], None])
def test_parameters_in_one_memory(model, share, layers):
    share(model)
    refused(model, "out_proj.weight are two parameters in the same memory", layers=layers)
    vimtune.inject(model, "lora", rank=2, targets="in_proj")  # frozen ones may be


def test_parameters_beside_each_other_in_one_memory(model):
    for block in model.layers:
        mixer = block.mixer
        own = [mixer.out_proj.weight, mixer.in_proj.weight, mixer.x_proj.weight]
        flat = torch.cat([parameter.detach().flatten() for parameter in own])
        for parameter, part in zip(own, flat.split([p.numel() for p in own]), strict=True):
            parameter.data = part.view_as(parameter)
    model.empty = nn.ParameterList([nn.Parameter(torch.empty(0, 3)) for _ in range(2)])
    x = images()
    disturb(vimtune.inject(model, "strong", rank=1))
    expected = model(x)
    torch.testing.assert_close(vimtune.merge(model)(x), expected)
    meta = timm.create_model("test_vim", backend="torch").to("meta")
    vimtune.inject(meta, "lora", rank=2)


def test_one_module_in_two_places_is_one_site():
    shared = nn.Linear(4, 4)
    model = vimtune.inject(nn.Sequential(shared, nn.ReLU(), shared), "ft", targets="0")
    disturb(model)
    x = torch.randn(3, 4)
    expected = model(x)
    vimtune.merge(model)
    assert torch.equal(model(x), expected) and model[0] is model[2]


@pytest.mark.parametrize(
    "recompute",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["WeightNorm", "SpectralNorm", "weight_norm", "spectral_norm", "prune"],
)
@pytest.mark.parametrize("method", ["lora", "full", "bitfit"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_computed_from_others(model, method, recompute):
    recompute(model.layers[0].mixer.in_proj)
    refused(model, "layers.0.mixer.in_proj.weight is computed from other tensors", method)


def test_weights_of_fake_tensors():
    with FakeTensorMode():
        fake = timm.create_model("test_vim", backend="torch")
        refused(fake, "head.weight cannot take a rule: it is a FakeTensor")


def test_weights_that_are_no_floating_point_numbers(model):
    linear = model.layers[1].mixer.in_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    refused(model, r"layers.1.mixer.in_proj.weight cannot take a rule: it is of torch.int8")
