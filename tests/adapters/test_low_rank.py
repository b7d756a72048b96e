"""Scales, starts and learning rates of low-rank branches, against their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vimtune
from vimtune.adapters import adapter_parameters, check_gradients, settle, settles
from vimtune.adapters.rules import lora
from vimtune.testing.methods import build_test_model, close, disturb
from vimtune.training.optim import CosineSchedule, build_optimizer, set_learning_rate


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loss_of(model):
    return F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 3]))


def batch_of(model):
    def run():
        loss = loss_of(model)
        loss.backward()
        return float(loss.detach())

    return run


def owner_of(model, path):
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def rule_at(model, path):
    owner, name = owner_of(model, path)
    return owner.adapters[name]["default"]


@pytest.mark.parametrize(("scaling", "scale"), [("standard", 6 / 4), ("rslora", 6 / 4**0.5), ("direct", 6.0)])
@pytest.mark.parametrize("method", ["lora", "dora", "prodial"])
def test_scales(method, scaling, scale):
    model = vimtune.inject(build_test_model(), method, rank=4, alpha=6.0, scaling=scaling)
    branch = rule_at(disturb(model), "layers.0.mixer.in_proj.weight").branch
    close(branch.matrix(), scale * torch.einsum("or,ri->oi", branch.lora_B, branch.lora_A))


def test_lora_on_the_patch_embedding_is_a_narrow_convolution_and_a_pointwise_one():
    plain = build_test_model().patch_embed.proj
    model = disturb(
        vimtune.inject(build_test_model(), "lora", targets="patch_embed.proj", rank=4, alpha=0.1,
                       scaling="direct")
    )  # fmt: skip
    branch = rule_at(model, "patch_embed.proj.weight").branch
    narrow = F.conv2d(images(), branch.lora_A.view(4, *plain.weight.shape[1:]), stride=plain.stride)
    added = 0.1 * F.conv2d(narrow, branch.lora_B[:, :, None, None])
    close(model.patch_embed.proj(images()), plain(images()) + added)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_linear_layer_rows_and_the_patch_embedding_at_once(method):
    everywhere = "in_proj[x|z],x_proj[dt|B|C],dt_proj,out_proj,patch_embed.proj"
    plain = build_test_model().eval()(images())
    model = vimtune.inject(build_test_model(), method, targets=everywhere, rank=2).eval()
    assert vimtune.summary(model).adapted[method] == {
        "proj": 1,
        **{f"in_proj[{rows}]": 2 for rows in "xz"},
        **{f"{name}[{rows}]": 2 for name in ("x_proj", "x_proj_b") for rows in ("dt", "B", "C")},
        **{name: 2 for name in ("dt_proj", "dt_proj_b", "out_proj")},
    }
    close(model(images()), plain)
    expected = disturb(model)(images())
    expected.square().sum().backward()
    check_gradients(model)
    close(vimtune.merge(model)(images()), expected)


# --- starts


@pytest.mark.parametrize("method", ["lora", "dora", "prodial"])
def test_principal_components_at_the_start(method):
    plain, model = build_test_model(), build_test_model()
    vimtune.inject(model, method, rank=3, start="pissa", targets="in_proj,patch_embed.proj")
    for path in ("layers.1.mixer.in_proj.weight", "patch_embed.proj.weight"):
        weight = plain.get_parameter(path)
        branch, effective = rule_at(model, path).branch, getattr(*owner_of(model, path))
        close(effective, weight)
        left, values, right = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
        principal = (left[:, :3] * values[:3]) @ right[:3]
        close(branch.scale * branch.lora_B @ branch.lora_A, principal)
        close(branch.lora_A.norm(dim=1), branch.lora_B.norm(dim=0))
        assert not branch.matrix().any()
    disturb(model)
    branch = rule_at(model, "layers.1.mixer.in_proj.weight").branch
    moved = branch.scale * (branch.lora_B @ branch.lora_A - branch.start_B @ branch.start_A)
    close(branch.matrix(), moved)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"scaling": "rslora"}, {"use_rslora": True}),
        ({"start": "pissa"}, {"init_lora_weights": "pissa"}),
    ],
)
def test_equal_to_hf_peft(options, settings):
    peft = pytest.importorskip("peft", reason="the oracle for LoRA is not installed")
    torch.manual_seed(0)
    base = nn.ModuleDict({"in_proj": nn.Linear(12, 20)})
    x = torch.randn(5, 12)
    ours = vimtune.inject(copy.deepcopy(base), "lora", targets="in_proj", rank=3, alpha=6.0, **options)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["in_proj"], **settings)
    layer = peft.inject_adapter_in_model(config, copy.deepcopy(base)).in_proj
    branch = rule_at(ours, "in_proj.weight").branch
    pairs = [(branch.lora_A, layer.lora_A["default"].weight), (branch.lora_B, layer.lora_B["default"].weight)]
    with torch.no_grad():
        if "start" in options:  # Singular vectors are unique up to their sign.
            signs = (pairs[0][0] * pairs[0][1]).sum(1).sign()
            close(pairs[0][1] * signs[:, None], pairs[0][0])
            close(pairs[1][1] * signs, pairs[1][0])
            pairs[0][1].mul_(signs[:, None])
            pairs[1][1].mul_(signs)
        for mine, theirs in pairs:
            mine.add_(0.1 * torch.randn_like(mine))
            theirs.copy_(mine)
    close(ours["in_proj"](x), layer(x))


def test_a_start_at_principal_components_is_kept_in_files(tmp_path):
    model = disturb(vimtune.inject(build_test_model(), "lora", rank=3, start="pissa")).eval()
    vimtune.save_adapter(model, tmp_path / "a.safetensors")
    other = build_test_model()
    vimtune.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other.eval()(images()), model(images()))
    close(vimtune.merge(other)(images()), model(images()))


@pytest.mark.parametrize(
    ("method", "rounds", "excess"), [("lora", 4, 1.1), ("lora", 50, 1.001), ("dora", 4, 0)]
)
def test_a_start_at_the_gradient_is_the_best_first_step(method, rounds, excess, monkeypatch):
    """After the look at the data, a step of B is the best approximation to the step of full training."""
    monkeypatch.setattr(lora, "ROUNDS", rounds)
    path, rank = "layers.1.mixer.in_proj.weight", 6
    full = vimtune.inject(build_test_model(), "ft", targets=path)
    loss_of(full).backward()
    gradient = rule_at(full, path).value.grad
    model = vimtune.inject(build_test_model(), method, targets=path, rank=rank, start="gradient")
    expected = loss_of(model)
    assert settles(model)
    settle(model, iter([batch_of(model)]))
    close(loss_of(model), expected)
    branch = rule_at(model, path).branch
    close(branch.lora_A @ branch.lora_A.T, torch.eye(rank))
    if method == "lora":
        model.zero_grad()
        loss_of(model).backward()
        check_gradients(model)
        step = branch.lora_B.grad @ branch.lora_A / branch.scale
        left, values, right = torch.linalg.svd(gradient)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert (step - gradient).norm() < excess * (best - gradient).norm()


def test_only_targets_that_start_at_the_gradient_do():
    starts = {"in_proj": "gradient", "out_proj": "pissa"}
    model = vimtune.inject(
        build_test_model(), "lora+ssm", targets={"lora": "both,x_proj[B]"}, rank=3, start=starts
    )
    before = {item.key: item.parameter.clone() for item in adapter_parameters(model)}
    assert settles(model)
    settle(model, iter([batch_of(model)]))
    changed = {
        item.key for item in adapter_parameters(model) if not torch.equal(item.parameter, before[item.key])
    }
    assert changed == {f"layers.{layer}.mixer.in_proj.weight.branch.lora_A" for layer in (0, 1)}
    assert not settles(vimtune.inject(build_test_model(), "lora", rank=3, start={"in_proj": "pissa"}))


def test_a_gradient_that_is_not_finite():
    model = vimtune.inject(build_test_model(), "lora", rank=3, start="gradient")

    def overflow():
        (loss_of(model) * float("inf")).backward()
        return 0.0

    with pytest.raises(ValueError, match="gradient of the first batches is not finite, so that nothing can"):
        settle(model, iter([overflow]))


@pytest.mark.parametrize("start", ["pissa", "gradient"])
def test_more_components_than_there_are(start):
    message = rf"rank 8 with start '{start}': layers.0.mixer.dt_proj.weight of shape 32 x 1 has 1 singular"
    with pytest.raises(ValueError, match=message):
        vimtune.inject(build_test_model(), "lora", targets="dt_proj", rank=8, start=start)
    vimtune.inject(build_test_model(), "lora", targets="dt_proj", rank=8)


# --- learning rates


@pytest.mark.parametrize("method", ["lora", "prodial", "lora+dora"])
def test_b_learns_faster_than_a(method):
    model = vimtune.inject(build_test_model(), method, rank=3, lr_ratio=16.0)
    entries = list(adapter_parameters(model))
    optimizer = build_optimizer(entries, lr=1e-2, head_lr=3e-2, weight_decay=0.1)
    schedule = CosineSchedule(total_steps=10, warmup_steps=0, min_lr=1e-3)
    for step, rate, head in ((0, 1e-2, 3e-2), (10, 1e-3, 1e-3)):
        set_learning_rate(optimizer, schedule, step)
        rates = {
            id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]
        }
        for item in entries:
            expected = head if item.group == "head" else rate * (16 if item.name.endswith("lora_B") else 1)
            assert rates[id(item.parameter)] == pytest.approx(expected), item.name
    assert all(group["weight_decay"] in (0, 0.1) for group in optimizer.param_groups)


def test_the_diagonal_and_the_rows_of_prodial_have_a_learning_rate_of_their_own():
    model = vimtune.inject(
        build_test_model(), "prodial", rank=3, lr_ratio=16.0, diagonal_lr_ratio=0.1, lr_scale=2.0
    )
    expected = {"branch.lora_A": 2.0, "branch.lora_B": 32.0, "blocks": 0.2, "row_scale": 0.2}
    adapted = [item for item in adapter_parameters(model) if item.group == "adapter"]
    assert len(adapted) == 4 * len(expected)
    for item in adapted:
        assert item.learning_rate == pytest.approx(expected[item.key.partition("weight.")[2]]), item.key


# --- magnitudes


def test_magnitudes_of_columns():
    torch.manual_seed(0)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj = nn.Linear(12, 20)

        def forward(self, x):
            return self.in_proj(x)

    base = Wrapped()
    weight = base.in_proj.weight.detach().clone()
    model = disturb(vimtune.inject(base, "dora", targets="in_proj", rank=3, alpha=6.0, axis="input"))
    rule = model.in_proj.adapters["weight"]["default"]
    assert rule.magnitude.shape == (12,)
    updated = weight + 2 * rule.branch.lora_B @ rule.branch.lora_A
    expected = updated @ torch.diag(rule.magnitude / updated.square().sum(0).sqrt())
    close(model.in_proj.weight, expected)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_dropout_acts_on_the_input_of_the_branch_alone(axis):
    """What training adds is the same formula with a part of the inputs of A dropped."""
    model = disturb(
        vimtune.inject(build_test_model(), "dora", targets="in_proj", rank=3, dropout=0.5, axis=axis)
    )
    layer = model.layers[0].mixer.in_proj
    rule = layer.adapters["weight"]["default"]
    frozen = layer._parameters["weight"]
    x = torch.randn(9, layer.in_features)
    rule.branch.dropout = Halve()
    updated = frozen + rule.branch.matrix()
    scale = rule.direction_scale(updated)
    if axis == "output":
        expected = (x @ frozen.T + Halve()(x) @ rule.branch.matrix().T) * scale
    else:
        expected = (x * scale) @ frozen.T + (Halve()(x) * scale) @ rule.branch.matrix().T
    close(layer.train()(x), expected)


class Halve(nn.Module):
    """Stands for dropout, without chance."""

    def forward(self, x):
        return x / 2
