"""The checks that every registered method must pass; a new method needs no new test here."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from method_cases import CASES, COMPILED_WITHIN, COMPOSITIONS, disturb, label, options_for

import vimtune
from vimtune.adapters import adapter_parameters
from vimtune.adapters.composition import single_rules
from vimtune.adapters.rules.lora import LowRank
from vimtune.adapters.rules.prodial import ProDiaLRule
from vimtune.adapters.slots import iter_slots
from vimtune.testing import METHOD_CHECKS, MethodCase
from vimtune.testing.methods import build_test_model, check_compiling


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


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def is_compiled_elsewhere(case: tuple[str, dict]) -> bool:
    """Whether the compiler sees the rules of a case within another one, or in `test_compositions.py`."""
    method, extra = case
    return "+" in method or (not extra and method in COMPILED_WITHIN)


@pytest.mark.parametrize(
    ("check", "named"),
    [
        pytest.param(check, case, id=f"{check.__name__.removeprefix('check_')}-{label(case)}")
        for check in METHOD_CHECKS
        for case in CASES
        if check is not check_compiling or not is_compiled_elsewhere(case)
    ],
)
def test_every_method(check, named):
    method, extra = named
    check(MethodCase(method, options_for(method, extra)))


def test_what_is_not_compiled_alone_is_compiled_within_another():
    extras = dict(COMPOSITIONS)

    def rules(method: str) -> set[tuple[type, str, str]]:
        """The class of every rule, with the module and the name at which it stands."""
        model = MethodCase(method, options_for(method, extras.get(method, {}))).adapted()
        return {
            (type(rule), path.rpartition(".")[2].removesuffix("_b"), name)
            for path, _, name, slot in iter_slots(model)
            for rule in single_rules(slot.rule)
        }

    for method, whole in COMPILED_WITHIN.items():
        assert rules(method) <= rules(whole), method


def test_called_layers_keep_to_the_dtype_of_autocast(plain, case):
    """What comes after them would be computed in fp32 otherwise, and by slower kernels."""
    model = vimtune.inject(plain, case[0], **case[1]).train()
    for owner in (model.layers[0].mixer.in_proj, model.layers[0].mixer.out_proj):
        with torch.autocast("cpu", torch.bfloat16):
            assert owner(torch.randn(2, 7, owner.in_features)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["lora", "dora", "prodial"])
@pytest.mark.parametrize("targets", ["in_proj", "in_proj[x],in_proj[z]"])
def test_dropout_acts_on_the_branch_in_training_only(plain, method, targets):
    model = disturb(vimtune.inject(plain, method, targets=targets, rank=3, dropout=0.5))
    owner = model.layers[0].mixer.in_proj
    x = torch.randn(64, owner.in_features)
    torch.manual_seed(0)
    outputs = torch.stack([owner(x) for _ in range(400)])
    assert (outputs[0] != outputs[1]).any(0).all()  # every output channel
    model.eval()
    expected = owner(x)
    assert (outputs.mean(0) - expected).abs().max() < 6 * outputs.std(0).max() / 400**0.5
    assert torch.equal(owner(x), expected)


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
    model = vimtune.inject(plain, "prodial", **options_for("prodial", {}))
    model(images).square().sum().backward()
    diagonals = [
        torch.diagonal(item.parameter.grad, dim1=1, dim2=2)
        for item in adapter_parameters(model)
        if item.name.endswith("blocks")
    ]
    assert len(diagonals) == 4 and all((d != 0).all() for d in diagonals)


DIAGONALS = {
    "free": lambda x: 1 + x,
    "exp": torch.exp,
    "tanh": lambda x: 1 + torch.tanh(x),
    "paper": lambda x: 1 - torch.relu(x),
}
"""The diagonal of D_b in each variant of ProDiaL."""


@pytest.mark.parametrize("variant", DIAGONALS)
@pytest.mark.parametrize("train_scale", [True, False])
def test_formula_of_prodial_to_the_letter(variant, train_scale):
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    rule = ProDiaLRule(weight, LowRank(weight, rank=2, scale=8 / 2), 4, variant, train_scale=train_scale)
    close(rule.effective_weight(weight), weight)
    assert sum(parameter.numel() for parameter in rule.parameters()) == 2 * (6 + 8) + 4 * 8 + 6 * train_scale
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.normal_()
    D_a = torch.block_diag(*rule.blocks)
    off = 1 - torch.eye(8)
    D_b = torch.diag(DIAGONALS[variant](D_a.diagonal())) + off * D_a
    eps = (8 / 2) * rule.branch.lora_B @ rule.branch.lora_A
    s = rule.row_scale if train_scale else torch.ones(6)
    close(rule.effective_weight(weight), torch.diag(s) @ weight @ D_b + eps)


def test_prodial_without_factors_of_rows_has_none_to_decay():
    with pytest.raises(ValueError, match="scale_decay = 2 is for factors s that train"):
        vimtune.inject(build_test_model(), "prodial", train_scale=False, scale_decay=2.0)


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
