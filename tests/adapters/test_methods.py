"""Checks that every registered method must pass; a new method needs no new test here."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from method_cases import CASES, SMALL, disturb, label, options_for

import vimtune
from vimtune import adapters, catalog
from vimtune.adapters import (
    adapter_parameters,
    adapter_state_dict,
    base_parameters,
    check_gradients,
    list_methods,
    method_fields,
)
from vimtune.adapters.rules.prodial import ProDiaLRule


@pytest.fixture(params=CASES, ids=label)
def case(request):
    method, extra = request.param
    return method, options_for(method, extra)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=5, depth=2)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def adapted(plain, case):
    method, options = case
    return vimtune.inject(copy.deepcopy(plain), method, **options)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_identity_at_the_start(plain, case, images):
    close(adapted(plain, case).eval()(images), plain.eval()(images))


def test_disabled_and_deleted_give_the_base_model(plain, case, images):
    model = disturb(adapted(plain, case)).eval()
    expected = plain.eval()(images)
    assert not torch.allclose(model(images), expected, atol=1e-3)
    with vimtune.disabled(model):
        close(model(images), expected, 0)
    assert not torch.allclose(model(images), expected, atol=1e-3)
    vimtune.delete_adapter(model, "default")
    close(model(images), expected, 0)
    assert type(model.layers[0].mixer.in_proj) is torch.nn.Linear
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in plain.named_parameters()
    }


def test_merge_gives_a_plain_model_with_the_same_output(plain, case, images):
    model = disturb(adapted(plain, case)).eval()
    expected = model(images)
    assert vimtune.merge(model) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    close(model(images), expected)
    merged = copy.deepcopy(model.state_dict())
    vimtune.merge(model)
    assert all(torch.equal(x, merged[name]) for name, x in model.state_dict().items())
    fresh = timm.create_model("test_vim", num_classes=5, depth=2).eval()
    fresh.load_state_dict(merged)
    close(fresh(images), expected)


def test_merge_refuses_non_finite_weights_and_leaves_the_model_alone(plain, case):
    model = adapted(plain, case)
    with torch.no_grad():
        list(adapter_parameters(model))[-1].parameter.view(-1)[0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="non-finite; nothing was merged"):
        vimtune.merge(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(x, after[name]) or torch.isnan(x).any() for name, x in before.items())


def test_gradients_reach_every_trained_tensor_and_no_frozen_one(plain, case, images):
    model = disturb(adapted(plain, case))
    model(images).square().sum().backward()
    check_gradients(model)
    trained = {id(item.parameter) for item in adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    for name, parameter in base_parameters(model):
        assert not parameter.requires_grad, name


def test_every_single_entry_trains(plain, case, images):
    """After one step from the start, no entry of any tensor has a gradient of exactly zero."""
    _, options = case
    model = adapted(plain, case).eval()  # no dropout: it zeroes gradients legitimately
    optimizer = torch.optim.SGD([item.parameter for item in adapter_parameters(model)], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(images) * torch.arange(1.0, 6)).square().sum().backward()
        optimizer.step()
    for item in adapter_parameters(model):
        dead = item.parameter.grad == 0
        if options.get("variant") == "paper" and item.name.endswith("blocks"):
            assert torch.diagonal(dead, dim1=1, dim2=2).all()  # the published formula never trains it
            dead = dead & ~torch.eye(dead.shape[-1], dtype=torch.bool)
        assert not dead.any(), f"{item.name}: {dead.sum()} of {dead.numel()} entries"


def test_only_the_adapter_changes_in_training(plain, case, images):
    model = adapted(plain, case)
    start = adapter_state_dict(model)
    start = {key: x.clone() for key, x in start.items()}
    optimizer = torch.optim.AdamW([item.parameter for item in adapter_parameters(model)], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
    original = dict(plain.named_parameters())
    assert all(torch.equal(p, original[name]) for name, p in base_parameters(model))
    unchanged = [key for key, x in adapter_state_dict(model).items() if torch.equal(x, start[key])]
    assert not unchanged


def without_chance(model):
    """`model` with dropout that keeps everything: what is left is the form that serves dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("training", [False, True])
def test_called_and_read_weights_are_the_same(plain, case, training):
    """Calling a layer equals multiplying by the weight one reads, output and gradients."""
    model = without_chance(disturb(adapted(plain, case)).train(training))
    for owner in (model.layers[0].mixer.in_proj, model.layers[0].mixer.out_proj):
        x = torch.randn(2, 7, owner.in_features, requires_grad=True)
        trained = [p for p in owner.parameters() if p.requires_grad]
        results = []
        for output in (owner(x), torch.nn.functional.linear(x, owner.weight)):
            loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
            results.append([output, *torch.autograd.grad(loss, [x, *trained])])
        for called, read in zip(*results, strict=True):
            close(called, read, 1e-4)


def test_called_layers_keep_to_the_dtype_of_autocast(plain, case):
    """What comes after them would be computed in fp32 otherwise, and by slower kernels."""
    model = adapted(plain, case).train()
    for owner in (model.layers[0].mixer.in_proj, model.layers[0].mixer.out_proj):
        with torch.autocast("cpu", torch.bfloat16):
            assert owner(torch.randn(2, 7, owner.in_features)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["lora", "dora", "prodial"])
def test_dropout_acts_on_the_branch_in_training_only(plain, method):
    model = disturb(vimtune.inject(plain, method, rank=3, dropout=0.5))
    owner = model.layers[0].mixer.in_proj
    x = torch.randn(64, owner.in_features)
    torch.manual_seed(0)
    outputs = torch.stack([owner(x) for _ in range(400)])
    assert not torch.equal(outputs[0], outputs[1])
    model.eval()
    expected = owner(x)
    assert (outputs.mean(0) - expected).abs().max() < 6 * outputs.std(0).max() / 400**0.5
    assert torch.equal(owner(x), expected)


def test_save_and_load(plain, case, images, tmp_path):
    model = disturb(adapted(plain, case)).eval()
    path = tmp_path / "adapter.safetensors"
    vimtune.save_adapter(model, path, classes=list("abcde"), preprocessing={"img_size": [32, 32]})
    torch.manual_seed(99)
    other = copy.deepcopy(plain).eval()
    info = vimtune.load_adapter(other, path)
    assert info.classes == list("abcde") and info.preprocessing == {"img_size": [32, 32]}
    assert info.method == case[0]
    close(other(images), model(images), 0)
    assert [item.name for item in adapter_parameters(other)] == [
        item.name for item in adapter_parameters(model)
    ]


def test_state_dict_round_trip(plain, case, images):
    model = disturb(adapted(plain, case)).eval()
    other = adapted(plain, case).eval()
    adapters.load_adapter_state_dict(other, adapter_state_dict(model))
    close(other(images), model(images), 0)
    third = adapted(plain, case).eval()
    third.load_state_dict(model.state_dict())
    close(third(images), model(images), 0)
    with pytest.raises(ValueError, match="missing"):
        adapters.load_adapter_state_dict(other, {})


def test_plain_checkpoint_loads_strictly_into_an_adapted_model(plain, case, images):
    model = disturb(adapted(plain, case)).eval()
    expected = model(images)
    model.load_state_dict(plain.state_dict())
    close(model(images), expected, 0)


def test_autocast_stays_close_and_finite(plain, case, images):
    model = disturb(adapted(plain, case))
    model.eval()
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert (logits.float() - expected).norm() / expected.norm() < 3e-2
    logits.float().square().sum().backward()
    check_gradients(model)
    assert all(torch.isfinite(item.parameter.grad).all() for item in adapter_parameters(model))


def test_bf16_model(plain, case, images):
    model = adapted(copy.deepcopy(plain).to(torch.bfloat16), case)
    logits = model(images.to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    check_gradients(model)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(plain, case, images, training):
    torch._dynamo.reset()
    model = without_chance(disturb(adapted(plain, case)).train(training))
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(images), expected)


def test_deepcopy_is_independent(plain, case, images):
    model = disturb(adapted(plain, case)).eval()
    twin = copy.deepcopy(model)
    expected = model(images)
    disturb(twin, seed=5)
    close(model(images), expected, 0)
    vimtune.delete_adapter(twin, "default")
    assert vimtune.list_adapters(model) == ["default"]


def test_summary_counts(plain, case):
    model = adapted(plain, case)
    report = vimtune.summary(model)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in plain.parameters())
    assert report.head == 5 * 16 + 5
    assert case[0] in str(report)


# Exact trainable counts on Vim-tiny without the head, as the paper's tables imply.
TINY_COUNTS = [
    ("full", None, {}, 6_974_694 - 102 * 193),
    ("linear", None, {}, 0),
    ("bitfit", None, {}, 37_056),
    ("strong", None, {"rank": 16}, 918_528),
    ("ft", "both", {}, 5_308_416),
    ("ft", "in_proj", {}, 3_538_944),
    ("ft", "out_proj", {}, 1_769_472),
    ("lora", "both", {"rank": 16}, 589_824),
    ("lora", "in_proj", {"rank": 16}, 368_640),
    ("lora", "out_proj", {"rank": 16}, 221_184),
    ("dora", "both", {"rank": 16}, 612_864),
    *(
        ("prodial", "both", {"rank": 16, "block_size": b}, 589_824 + 24 * 960 + 24 * 576 * b)
        for b in (1, 4, 64)
    ),
    ("prodial", "in_proj", {"rank": 16, "block_size": 4}, 368_640 + 24 * 768 + 24 * 192 * 4),
]


@pytest.mark.parametrize(("method", "targets", "options", "expected"), TINY_COUNTS)
def test_exact_trainable_counts(method, targets, options, expected):
    model = timm.create_model(
        "vim_tiny_patch16_224", num_classes=102, peft=method, peft_targets=targets, peft_kwargs=options
    )
    report = vimtune.summary(model)
    assert report.head == 102 * 193
    assert report.trainable - report.head == expected


def test_default_diagonal_trains_from_the_very_first_step(plain, images):
    model = vimtune.inject(plain, "prodial", **SMALL)
    model(images).square().sum().backward()
    diagonals = [
        torch.diagonal(item.parameter.grad, dim1=1, dim2=2)
        for item in adapter_parameters(model)
        if item.name.endswith("blocks")
    ]
    assert len(diagonals) == 4 and all((d != 0).all() for d in diagonals)


def test_paper_formula_to_the_letter():
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    rule = ProDiaLRule(weight, rank=2, alpha=8, dropout=0.0, block_size=4, variant="paper")
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.normal_()
    D_a = torch.block_diag(*rule.blocks)
    eye = torch.eye(8)
    D_b = (eye - torch.relu(eye * D_a)) + (torch.block_diag(*[torch.ones(4, 4)] * 2) - eye) * D_a
    eps = (8 / 2) * rule.branch.lora_B @ rule.branch.lora_A
    close(rule.effective_weight(weight), torch.diag(rule.row_scale) @ weight @ D_b + eps)


@pytest.mark.parametrize(("method", "use_dora"), [("lora", False), ("dora", True)])
def test_equals_hf_peft_on_a_plain_linear(method, use_dora):
    peft = pytest.importorskip("peft", reason="the oracle for LoRA and DoRA is not installed")
    torch.manual_seed(0)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj = torch.nn.Linear(12, 20)

        def forward(self, x):
            return self.in_proj(x)

    base = Wrapped()
    ours = vimtune.inject(copy.deepcopy(base), method, targets="in_proj", rank=3, alpha=8)
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["in_proj"], use_dora=use_dora)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    layer = theirs.base_model.model.in_proj
    rule = ours.in_proj.adapters["weight"]["default"]
    with torch.no_grad():
        for mine, other in (
            (rule.branch.lora_A, layer.lora_A["default"].weight),
            (rule.branch.lora_B, layer.lora_B["default"].weight),
        ):
            other.copy_(mine.normal_())
        if use_dora:
            layer.lora_magnitude_vector["default"].weight.copy_(rule.magnitude.mul_(1.3))
    x = torch.randn(5, 12)
    close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    close(rule.branch.lora_A.grad, layer.lora_A["default"].weight.grad, 1e-4)
    close(rule.branch.lora_B.grad, layer.lora_B["default"].weight.grad, 1e-4)
    if use_dora:
        close(rule.magnitude.grad, layer.lora_magnitude_vector["default"].weight.grad, 1e-4)
    merged = theirs.merge_and_unload()
    close(vimtune.merge(ours).in_proj.weight, merged.in_proj.weight)


def test_catalog_describes_the_registry():
    assert {name: adapters.get_method(name).summary for name in list_methods()} == catalog.METHODS
    assert {name: method_fields(name) for name in list_methods()} == catalog.METHOD_FIELDS
