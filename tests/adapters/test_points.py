"""What targets stand for, options by target, and the points of models that are not ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import timm
import torch
from adapter_files import rewrite
from method_cases import disturb
from torch import nn

import vimtune
from vimtune.adapters import (
    Method,
    WeightRule,
    active_adapter,
    adapter_parameters,
    check_gradients,
    declarations,
    register_method,
)
from vimtune.adapters.points import Point, Points
from vimtune.adapters.sites import parse_targets
from vimtune.adapters.targets import available_targets, matches, split_targets
from vimtune.methods import METHODS
from vimtune.testing import METHOD_CHECKS, MethodCase
from vimtune.testing.methods import build_test_model, close


@pytest.fixture(scope="module")
def points():
    return Points(build_test_model())


def short(paths):
    """Paths of the two layers as one, without "layers.N."."""
    return list(dict.fromkeys(path.removeprefix("layers.0.").removeprefix("layers.1.") for path in paths))


# --- the grammar of targets


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("both", ["mixer.in_proj.weight", "mixer.out_proj.weight"]),
        ("mixer.in_proj", ["mixer.in_proj.weight"]),
        ("A_log, D", ["mixer.A_log", "mixer.D", "mixer.A_b_log", "mixer.D_b"]),
        ("conv1d.bias", ["mixer.conv1d.bias", "mixer.conv1d_b.bias"]),
        ("dt_proj.", [f"mixer.dt_proj{end}" for end in (".weight", ".bias", "_b.weight", "_b.bias")]),
        ("in_proj[x]", ["mixer.in_proj.weight[x]"]),
        (
            "x_proj[C|dt]",
            [f"mixer.{name}.weight[{rows}]" for name in ("x_proj", "x_proj_b") for rows in ("dt", "C")],
        ),
        ("mixer.A_log, D_b", ["mixer.A_log", "mixer.D_b"]),
        ("mixer.x_proj[C|dt]", ["mixer.x_proj.weight[dt]", "mixer.x_proj.weight[C]"]),
        ("x_proj.weight, x_proj_b", ["mixer.x_proj.weight", "mixer.x_proj_b.weight"]),
        ("x_proj[B|C],!x_proj_b", ["mixer.x_proj.weight[B]", "mixer.x_proj.weight[C]"]),
        (
            "x_proj[B|C],!mixer.x_proj[B]",
            [f"mixer.{rows}" for rows in ("x_proj.weight[C]", "x_proj_b.weight[B]", "x_proj_b.weight[C]")],
        ),
        ("A_log,D,!mixer.A_log", ["mixer.D", "mixer.A_b_log", "mixer.D_b"]),
        ("x_proj_b[B]", ["mixer.x_proj_b.weight[B]"]),
        (["in_proj[x]", "in_proj[z]"], ["mixer.in_proj.weight[x]", "mixer.in_proj.weight[z]"]),
        ("scan()", ["mixer.scan()"]),
        ("mixer.out_proj()", ["mixer.out_proj()"]),
        ("encode()", ["encode()"]),
        (r"re:mixer\.(A_log|D)$", ["mixer.A_log", "mixer.D"]),
        (r"re:out_proj\(\)$", ["mixer.out_proj()"]),
        ("both,!in_proj", ["mixer.out_proj.weight"]),
        ("norm.,!layers.0.", ["norm.weight"]),
        ("mixer.x_proj[dt|B|C],!x_proj[B]", ["mixer.x_proj.weight[dt]", "mixer.x_proj.weight[C]"]),
        (["re:A_.*log", "!re:b_log$"], ["mixer.A_log"]),
        (r"re:x_proj\.weight\[B\]$", ["mixer.x_proj.weight[B]"]),
        (
            r"re:\[(B|x)\]",
            [f"mixer.{rows}" for rows in ("in_proj.weight[x]", "x_proj.weight[B]", "x_proj_b.weight[B]")],
        ),
        (r"re:in_proj|x_proj\.weight\[C\]", ["mixer.in_proj.weight", "mixer.x_proj.weight[C]"]),
        (r"re:\[z\]$|scan\(\)$", ["mixer.in_proj.weight[z]", "mixer.scan()"]),
        ([r"mixer.x_proj[B|C]", r"!re:\[B\]"], ["mixer.x_proj.weight[C]"]),
        (
            ["mixer.x_proj[B|C]", r"re:(in|x)_proj\.weight\[(z|C)", r"!re:in_proj\.weight$|\[B\]"],
            ["mixer.x_proj.weight[C]"],
        ),
        (r"mixer.x_proj[B|C],!re:\[B\]", ["mixer.x_proj.weight[C]"]),
    ],
)
def test_what_a_target_stands_for(points, targets, expected):
    assert short(points.resolve(targets)) == expected


def test_exclusion_takes_single_layers_away(points):
    assert points.resolve("both,!layers.0.") == points.resolve("both", [1]) == points.resolve("both", [-1])


def test_every_target_that_is_offered_is_one(points):
    for target in available_targets(points):
        assert points.resolve(target)
    for path in [*points.parameters, *points.calls]:
        assert points.resolve([path]) == [path]
    for path, rows in points.rows.items():
        assert points.resolve([f"{path}[{row}]" for row in rows]) == [f"{path}[{row}]" for row in rows]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("in_porj", r"unknown target 'in_porj'. Did you mean 'in_proj'\?.*in_proj\[x\|z\]"),
        ("in_proj,D,nothing", "unknown target 'nothing'"),
        ("x_proj[A]", r"x_proj.weight has no rows 'A', it has \[dt\|B\|C\]"),
        ("A_log[x]", "'A_log\\[x\\]': the model has no such named rows"),
        ("in_proj[]", "expected a name such as in_proj, rows such as"),
        ("in_proj[x", "expected a name such as in_proj, rows such as"),
        ("conv1d()", "conv1d is no linear layer, and the model declares no such call. Targets of this model"),
        (
            "x_proj()",
            r"'x_proj\(\)': the model only reads the weight of layers.0.mixer.x_proj, so .* 'x_proj'\.",
        ),
        ("nowhere()", r"unknown target 'nowhere\(\)'"),
        ("re:(", r"target 're:\(' is no regular expression"),
        ("re:nowhere", "unknown target 're:nowhere'"),
        ("!in_proj", "name nothing to adapt"),
        ("in_proj,!out_proj", "'!out_proj' takes nothing away from in_proj"),
        ("in_proj,D,!D", "'D' selects nothing: all of it is taken away by the exclusions"),
        ("", "unknown target ''|expected a name"),
    ],
)
def test_targets_that_mean_nothing(points, targets, message):
    with pytest.raises(ValueError, match=message) as caught:
        points.resolve(targets)
    assert "\n" not in str(caught.value)


def test_a_target_outside_of_the_chosen_layers(points):
    with pytest.raises(ValueError, match="'pos_embed' selects nothing: all of it lies in none of the layers"):
        points.resolve("in_proj,pos_embed", [0])
    expected = ["layers.0.mixer.D", "layers.0.mixer.D_b", "layers.0.mixer.in_proj.weight"]
    assert points.resolve("in_proj,D", [0]) == expected


@pytest.mark.parametrize("path", ["a.b", "a.b.weight[x]", "a.scan()", "encode()"])
def test_paths_of_points_and_back(path):
    assert str(Point.parse(path)) == path


@pytest.mark.parametrize("path", ["", "a[x]()", "a()[x]", "a[x][y]", "a[x|y]", "a(b)", "[x]"])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match="is no path of a parameter"):
        Point.parse(path)


def test_names_match_whole_parts_of_paths():
    assert matches("layers.10.mixer.D", "layers.10.") and not matches("layers.10.mixer.D", "layers.1.")
    assert matches("layers.0.mixer.D", "D") and not matches("layers.0.mixer.D_b", "D")


# --- rows


@pytest.mark.parametrize("method", ["lora", "dora", "prodial", "ft"])
def test_rows_change_and_nothing_beside_them(method):
    options = {"block_size": 4} if method == "prodial" else {}
    rank = {} if method == "ft" else {"rank": 2}
    model = build_test_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    targets = "in_proj[z],x_proj[C]" if method != "lora" else "in_proj[z],x_proj[C],x_proj_b[B]"
    disturb(vimtune.inject(model, method, targets=targets, **rank, **options))
    changed = {path: model.get_submodule(path.rpartition(".")[0]).weight != before[path] for path in before
               if path.endswith("_proj.weight") or path.endswith("x_proj_b.weight")}  # fmt: skip
    rows = Points(model).rows
    for path, differs in changed.items():
        meant = [p for p in active_adapter(model).sites[method] if p.startswith(path + "[")]
        expected = torch.zeros(len(differs), dtype=torch.bool)
        for site in meant:
            expected[rows[path][Point.parse(site).rows]] = True
        assert torch.equal(differs.any(1), expected), path


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"rank": 2, "targets": "in_proj[x],x_proj[B],patch_embed.proj,dt_proj"}),
        ("ft+lora", {"rank": 2, "targets": {"lora": "both", "ft": "in_proj[z],D"}, "layers": {"lora": [1]}}),
        ("lora", {"rank": {"in_proj": 3, "in_proj[x]": 2}, "targets": "in_proj,in_proj[x]"}),
    ],
)  # fmt: skip
def test_rows_pass_every_check(method, options, check):
    check(MethodCase(method, options))


def test_rows_with_dropout_perturb_their_own_outputs_alone():
    model = disturb(
        vimtune.inject(build_test_model(), "lora", targets="in_proj[x]", rank=2, dropout=0.5)
    ).train()
    layer = model.layers[0].mixer.in_proj
    x = torch.randn(50, 16)
    first, second = layer(x), layer(x)
    half = layer.out_features // 2
    assert (first[:, :half] != second[:, :half]).any(0).all()
    assert torch.equal(first[:, half:], second[:, half:])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "lora+ft",
            {"targets": {"lora": "in_proj[x]", "ft": "in_proj"}},
            "replaces .*in_proj.weight as a whole",
        ),
        ("lora+ft", {"targets": {"lora": "in_proj", "ft": "in_proj[x]"}}, r"replaces .*\[x\] as a whole"),
        ("lora+dora", {"targets": "in_proj[x]", "lora": {"dropout": 0.5}}, "would follow one that acts on"),
        ("lora", {"targets": "in_proj,in_proj[x]", "dropout": 0.5}, "would follow one that acts on"),
        (
            "dora",
            {"targets": "in_proj,in_proj[x]"},
            r"\[x\] is a part of layers.0.mixer.in_proj.weight, which",
        ),
    ],
)
def test_compositions_that_make_no_sense(method, options, message):
    with pytest.raises(ValueError, match=message):
        vimtune.inject(build_test_model(), method, rank=2, **options)


def test_compositions_of_rows_that_do():
    model = vimtune.inject(
        build_test_model(),
        "lora+ft+dora",
        rank=2,
        targets={"lora": "in_proj[x]", "ft": "in_proj[z]", "dora": "in_proj"},
    )
    close(model.eval()(images()), build_test_model().eval()(images()))
    disturb(model)(images()).square().sum().backward()
    check_gradients(model)


def test_low_rank_updates_of_a_whole_and_of_its_rows_add_up():
    base = build_test_model().layers[0].mixer.in_proj.weight.detach().clone()
    rank, alpha = {"in_proj": 3, "in_proj[x]": 2}, {"in_proj": 3.0, "in_proj[x]": 1.0}
    model = vimtune.inject(
        build_test_model(), "lora", targets=["in_proj[x]", "in_proj"], rank=rank, alpha=alpha
    )
    disturb(model)
    tensors = [p.detach() for name, p in model.named_parameters() if ".0." in name and "lora_" in name]
    whole_a, whole_b, part_a, part_b = tensors[:4]
    assert (len(whole_a), len(part_a)) == (3, 2), "the whole comes first"
    expected = base + whole_b @ whole_a
    expected[: len(expected) // 2] += 0.5 * part_b @ part_a
    close(model.layers[0].mixer.in_proj.weight, expected)


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- options by target


def test_options_by_target(tmp_path):
    model = vimtune.inject(
        build_test_model(),
        "lora+ft",
        targets={"lora": "both,x_proj[B]", "ft": "A_log"},
        lora={"rank": {"in_proj": 8, "x_proj[B]": 2, "layers.1.mixer.out_proj": 3}, "alpha": 4.0},
    )
    ranks = {
        item.base_name: item.parameter.shape[0] for item in adapter_parameters(model) if "lora_A" in item.key
    }
    assert ranks == {
        "layers.0.mixer.in_proj.weight": 8,
        "layers.1.mixer.in_proj.weight": 8,
        "layers.0.mixer.x_proj.weight": 2,
        "layers.1.mixer.x_proj.weight": 2,
        "layers.0.mixer.x_proj_b.weight": 2,
        "layers.1.mixer.x_proj_b.weight": 2,
        "layers.0.mixer.out_proj.weight": 16,
        "layers.1.mixer.out_proj.weight": 3,
    }
    assert active_adapter(model).options["lora"]["rank"]["in_proj"] == 8
    disturb(model)
    vimtune.save_adapter(model, tmp_path / "a.safetensors")
    other = build_test_model()
    info = vimtune.load_adapter(other, tmp_path / "a.safetensors")
    assert info.options == active_adapter(model).options and info.version == 5
    assert torch.equal(other.eval()(images()), model.eval()(images()))


def test_an_option_of_an_earlier_file_is_for_the_direction_that_it_names(tmp_path):
    """There, x_proj was the forward direction alone, and x_proj_b had the default rank."""
    path = tmp_path / "a.safetensors"
    ranks = {"mixer.x_proj": 2, "in_proj,x_proj_b": 16}
    model = disturb(vimtune.inject(build_test_model(), "lora", targets="in_proj,x_proj", rank=ranks))
    vimtune.save_adapter(model, path)

    def as_in_version_3(info):
        info["version"], info["targets"] = 3, ["in_proj", "x_proj", "x_proj_b"]
        info["options"]["lora"]["rank"] = {"x_proj": 2}

    rewrite(path, as_in_version_3)
    other = build_test_model()
    vimtune.load_adapter(other, path)
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    vimtune.save_adapter(other, tmp_path / "again.safetensors")
    third = build_test_model()
    vimtune.load_adapter(third, tmp_path / "again.safetensors")
    assert torch.equal(third.eval()(images()), model(images()))


def test_every_parameter_of_the_reverse_direction_is_declared(points):
    assert set(points.shared_names) == {
        path for path in points.parameters if "_b" in path.partition("mixer")[2]
    }
    for path, name in points.shared_names.items():
        assert path.replace("_b", "") == f"{path.partition('mixer.')[0]}mixer.{name}"


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({"both": 3}, (3, 3, 16)),
        ({"both": 3, "out_proj": 5}, (3, 5, 16)),
        ({"in_proj, x_proj[B]": 4}, (4, 16, 4)),
        ({"both,x_proj[B]": 2}, (2, 2, 2)),
        ({r"re:\[B\]$": 2, "both": 4}, (4, 4, 2)),
        ({r"re:(in|out){1,2}_proj": 2, "x_proj[B]": 1}, (2, 2, 1)),
        ({r"re:^never,|in_proj": 2, "x_proj[B]": 1}, (2, 16, 1)),
    ],
)
def test_options_take_the_targets_that_methods_take(ranks, expected):
    model = vimtune.inject(
        build_test_model(), "lora", targets="both,x_proj[B]", rank={"x_proj[B]": 16} | ranks
    )
    found = {
        item.base_name: item.parameter.shape[0] for item in adapter_parameters(model) if "lora_A" in item.key
    }
    names = ("in_proj", "out_proj", "x_proj")
    assert tuple(found[f"layers.1.mixer.{name}.weight"] for name in names) == expected
    assert vimtune.Recipe(peft="lora", rank=ranks).method.rank == ranks


@pytest.mark.parametrize("key", ["!in_proj", "both,!in_proj", "! re:in_proj"])
def test_options_for_all_but_some_targets_are_refused(key):
    with pytest.raises(
        ValueError, match=r"option rank of method 'lora' .*: expected targets for which the value"
    ):
        vimtune.inject(build_test_model(), "lora", rank={key: 3})
    for rank in ({key: 3}, f"{{'{key}': 3}}", f"x_proj=3,{key.rpartition(',')[2]}=4"):
        with pytest.raises(
            ValueError, match=r"rank = .*: expected targets for which the value holds, not excl"
        ):
            vimtune.Recipe(peft="lora", rank=rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": {"in_proj,D": 2}}, "is given for 'D', where the method does not act"),
        (
            {"rank": {"x_proj": 2}},
            "option rank of method 'lora' is given for 'x_proj', where the method does not act",
        ),
        ({"rank": {"in_proj": "2"}}, "option rank of method 'lora' for 'in_proj'"),
        ({"rank": {"in_proj": 0}}, "rank .* for 'in_proj': expected a value .* 1 .found 0"),
        ({"alpha": {"in_proj": -1.0}}, "alpha .* for 'in_proj': expected a value greater than 0 .found -1.0"),
        ({"rank": {}}, "option rank of method 'lora'"),
    ],
)
def test_options_by_target_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        vimtune.inject(build_test_model(), "lora", **options)


# --- the summary


def test_the_summary_says_what_is_adapted_and_what_is_not():
    model = vimtune.inject(build_test_model(), "lora", targets="in_proj[x],out_proj", rank=2)
    report = vimtune.summary(model)
    assert report.adapted == {"lora": {"in_proj[x]": 2, "out_proj": 2}}
    assert {"A_log", "x_proj", "conv1d.bias", "pos_embed", "norm_f"} <= set(report.untouched)
    assert not {"in_proj", "out_proj", "head", "head.bias"} & set(report.untouched)
    assert "lora acts on: in_proj[x] (2), out_proj (2)" in str(report)


@pytest.mark.parametrize(
    ("targets", "layers", "line", "unchanged", "not_listed"),
    [
        ("in_proj[x]", None, "lora acts on: in_proj[x] (2)", {"in_proj[z]", "out_proj"}, {"in_proj"}),
        ("in_proj", [0], "lora acts on: in_proj (1 of 2)", {"out_proj"}, {"in_proj", "in_proj[x]"}),
        (
            "x_proj[B|C]",
            [1],
            "x_proj[B] (1 of 2), x_proj[C] (1 of 2)",
            {"x_proj[dt]"},
            {"x_proj", "x_proj[B]"},
        ),
        (
            "in_proj[x],in_proj[z]",
            None,
            "in_proj[x] (2), in_proj[z] (2)",
            {"x_proj"},
            {"in_proj", "in_proj[z]"},
        ),
    ],
)
def test_the_summary_of_rows_and_layers(targets, layers, line, unchanged, not_listed):
    report = vimtune.summary(
        vimtune.inject(build_test_model(), "lora", targets=targets, layers=layers, rank=1)
    )
    assert line in str(report)
    assert unchanged <= set(report.untouched) and not_listed.isdisjoint(report.untouched)


# --- decay


def test_decay_to_the_start_where_asked():
    model = vimtune.inject(build_test_model(), "ft", targets="A_log,D,in_proj", start_decay=0.5)
    for item in adapter_parameters(model):
        if item.group == "adapter":
            assert item.weight_decay == 0.5 and not item.parameter.any(), item.name
    model = vimtune.inject(build_test_model(), "prodial", rank=2, scale_decay=2.0)
    decay = {item.name.rpartition(".")[2]: item.weight_decay for item in adapter_parameters(model)}
    assert decay["row_scale_offset"] == 2.0 and decay["blocks"] == decay["lora_A"] == 1.0


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(
    ("method", "options"), [("ft", {"start_decay": 1.0}), ("prodial", {"rank": 2, "scale_decay": 1.0})]
)
def test_decay_to_the_start_passes_every_check(method, options, check):
    check(MethodCase(method, options))


# --- models that are not ours


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5)


def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


def hf_mamba(version: int):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 30, "state_size": 4, "expand": 2}
    if version == 1:
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, time_step_rank=2)).eval()
    heads = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **heads)).eval()


def run(model):
    if hasattr(model, "pretrained_cfg"):
        size = model.pretrained_cfg["input_size"]
        return model(torch.randn(2, *size, generator=torch.Generator().manual_seed(0)))
    return model(torch.arange(20).view(2, 10)).logits


FOREIGN = [
    (vit, "lora", "qkv[q|v]"),
    (vit, "lora", "attn.proj,fc1"),
    (vit, "dora", "qkv"),
    (resnet, "lora", "conv1,conv2"),
    (resnet, "bitfit", None),
    (lambda: hf_mamba(1), "lora", "in_proj[x],x_proj[B|C],out_proj"),
    (lambda: hf_mamba(1), "ft", "A_log,D"),
    (lambda: hf_mamba(2), "lora", "in_proj[z|x|B],out_proj"),
    (lambda: hf_mamba(2), "ft", "in_proj[dt],conv1d[B],A_log,dt_bias"),
]


@pytest.mark.parametrize(("build", "method", "targets"), FOREIGN)
def test_rules_on_models_of_others(build, method, targets):
    model = build()
    expected = run(copy.deepcopy(model).eval())
    options = {"rank": 2} if method in ("lora", "dora") else {}
    vimtune.inject(model, method, targets=targets, **options)
    model.eval()
    close(run(model), expected)
    disturb(model)
    adapted = run(model)
    assert not torch.allclose(adapted, expected, atol=1e-4)
    adapted.square().sum().backward()
    check_gradients(model)
    with vimtune.disabled(model):
        close(run(model), expected)
    vimtune.merge(model)
    close(run(model), adapted, 1e-4)


@pytest.mark.parametrize("build", [vit, resnet])
@pytest.mark.parametrize("method", ["lora", "prodial", "ft", "lora+bitfit"])
def test_default_targets_that_a_model_does_not_have(build, method):
    with pytest.raises(
        ValueError, match="'both' stands for in_proj and out_proj, and this model has no in_proj"
    ) as caught:
        vimtune.inject(build(), method)
    message = str(caught.value)
    assert "no in_proj and no out_proj: name the targets" in message and "Did you mean" not in message
    offered = message.partition("Targets of this model: ")[2].split(", ")
    assert "both" not in offered
    for target in offered:
        assert Points(build()).resolve(target)


def test_an_alias_of_which_a_model_has_a_part():
    model = nn.ModuleDict({"in_proj": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="this model has no out_proj: name the targets that are meant"):
        vimtune.inject(model, "lora")


def test_calls_of_models_of_others():
    model = vit()
    assert "blocks.0.attn.qkv()" in Points(model).calls
    with pytest.raises(ValueError, match=r"target 'norm1\(\)': blocks.0.norm1 is no linear layer"):
        Points(model).resolve("norm1()")
    with pytest.raises(ValueError, match=r"unknown target 'attn\(\)'"):
        Points(model).resolve("attn()")
    mamba = Points(hf_mamba(1))
    assert any(path.endswith("in_proj()") for path in mamba.calls)
    assert not any(path.endswith(("x_proj()", "out_proj()")) for path in mamba.calls)  # kernels read them
    with pytest.raises(ValueError, match=r"only reads the weight of backbone.layers.0.mixer.out_proj"):
        mamba.resolve("out_proj()")


@dataclass(frozen=True, kw_only=True)
class Grow(Method):
    summary = "two rows more"

    def build_rule(self, site):
        return MoreRows(site.weight)


class MoreRows(WeightRule):
    """Two further rows."""

    def __init__(self, weight):
        super().__init__()
        self.rows = nn.Parameter(weight[-2:].clone())

    def effective_weight(self, weight):
        return torch.cat([weight, self.rows])


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (
            build_test_model,
            "x_proj[B]",
            r"layers.0.mixer.x_proj.weight would have 35 rows, but \[dt\|B\|C\] are 33",
        ),
        (build_test_model, "in_proj", r"in_proj.weight would have 66 rows, but \[x\|z\] are 64"),
        (build_test_model, "A_log", r"in_proj.weight would have 64 rows, but \[x\|z\] are 68"),
        (vit, "qkv", r"qkv.weight would grow from shape \(192, 64\) to \(194, 64\).* of Attention are fixed"),
        (
            lambda: hf_mamba(1),
            "x_proj[B]",
            "x_proj.weight would grow .* of MambaMixer are fixed by its config",
        ),
        (lambda: hf_mamba(1), "A_log,x_proj", "A_log would grow .* of MambaMixer are fixed"),
        (lambda: hf_mamba(2), "in_proj[dt]", "in_proj.weight would grow .* of Mamba2Mixer are fixed"),
    ],
)
def test_growth_that_does_not_fit(build, targets, message, monkeypatch):
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    register_method("grow")(Grow)
    model = build()
    with pytest.raises(ValueError, match=message):
        vimtune.inject(model, "grow", targets=targets)
    assert vimtune.list_adapters(model) == [] and not any("adapters" in x for x, _ in model.named_modules())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("method", ["full", "ft"])
def test_parameters_of_foreign_scans_never_decay(version, method, monkeypatch):
    """Classes that inherit from those of the table, and have a line of their own there, are no exception."""
    model = hf_mamba(version).backbone
    kind = type(model.layers[0].mixer)
    model.layers[0].mixer.__class__ = type("OwnMixer", (kind,), {"__module__": "somewhere"})
    monkeypatch.setattr(declarations, "_FOREIGN", dict(declarations._FOREIGN))
    declarations.declare("somewhere.OwnMixer", declarations.Declaration())
    vimtune.inject(model, method, targets="A_log,D,in_proj" if method == "ft" else None)
    for item in adapter_parameters(model):
        name = item.base_name.rpartition("mixer.")[2]
        assert item.weight_decay == (item.parameter.dim() > 1 and name != "A_log"), item.name


@pytest.mark.parametrize("targets", ["lm_head", "embeddings"])
def test_tied_weights_of_a_language_model(targets):
    model = vimtune.inject(hf_mamba(1), "lora", targets=targets, rank=2)
    adapted = run(disturb(model).eval())
    vimtune.merge(model)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    close(run(model), adapted, 1e-4)


def test_dropout_is_refused_where_foreign_kernels_read():
    with pytest.raises(ValueError, match="only reads"):
        vimtune.inject(hf_mamba(1), "lora", targets="out_proj", rank=2, dropout=0.1)
    vimtune.inject(hf_mamba(1), "lora", targets="in_proj", rank=2, dropout=0.1)


# --- merging that is taken back


def test_unmerge_refuses_what_it_would_lose():
    model = vimtune.inject(build_test_model(), "lora", rank=2)
    with pytest.raises(ValueError, match="was not merged with reversible=True"):
        vimtune.adapters.unmerge(model)
    vimtune.merge(disturb(model), reversible=True)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.layers[0].mixer.in_proj.weight.add_(1)
    with pytest.raises(ValueError, match=r"layers.0.mixer.in_proj.weight has changed since"):
        vimtune.adapters.unmerge(changed)
    vimtune.inject(model, "linear")
    with pytest.raises(ValueError, match="has been given other adapters"):
        vimtune.adapters.unmerge(model)
    vimtune.delete_adapter(model, "default")
    assert vimtune.list_adapters(vimtune.adapters.unmerge(model)) == ["default"]


def test_unmerge_after_a_conversion():
    model = disturb(vimtune.inject(build_test_model(), "lora", rank=2)).eval()
    expected = model(images())
    vimtune.merge(model, reversible=True)
    model.double()
    with pytest.raises(
        ValueError, match=r"is of torch.float64 now and was of torch.float32 when .* was merged"
    ):
        vimtune.adapters.unmerge(model)
    assert torch.equal(vimtune.adapters.unmerge(model.float())(images()), expected)


def test_several_adapters_and_a_head_of_another_size_come_back():
    model = vimtune.inject(build_test_model(), "lora", rank=2)
    disturb(vimtune.inject(model, "prodial", name="other", num_classes=7, rank=2)).eval()
    expected = model(images())
    state = {name: x.clone() for name, x in model.state_dict().items()}
    vimtune.merge(model, reversible=True)
    assert model.num_classes == 7 and model.head.out_features == 7
    model = copy.deepcopy(model)
    vimtune.adapters.unmerge(model)
    assert vimtune.list_adapters(model) == ["default", "other"] and model.head.out_features == 5
    assert torch.equal(model(images()), expected)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    vimtune.set_adapter(model, "default")
    assert model(images()).shape == (2, 5)


# --- calls under wrappers


def test_calls_are_seen_through_wrappers():
    model = build_test_model()
    wrapped = nn.DataParallel(model)
    targets = ["in_proj", "scan()"]
    with pytest.raises(ValueError, match="is a call, and this method changes parameters"):
        vimtune.inject(wrapped, "lora", targets=targets, rank=2)
    assert vimtune.list_adapters(model) == [] and type(model.layers[0].mixer).__name__ == "BiMambaMixer"
    assert not any("adapters" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("re:mixer.(A_log|D){1,2}$", "re:mixer.(A_log|D){1,2}$"),
        (r"re:A_\(x,D", [r"re:A_\(x", "D"]),
        ("lora=re:(?=x){1,2},ft=D", {"lora": "re:(?=x){1,2}", "ft": "D"}),
        ("in_proj[x],x_proj[dt|B]", ["in_proj[x]", "x_proj[dt|B]"]),
    ],
)
def test_commas_in_brackets_belong_to_the_target(text, expected):
    assert parse_targets(text) == expected
    if isinstance(expected, list):
        assert [target.text for target in split_targets(text)] == expected


def test_ranks_by_regular_expression():
    recipe = vimtune.Recipe(peft="lora", rank=r"re:mixer.(in|out){1,2}_proj=8,re:(?=x)x_proj=4")
    assert recipe.method.rank == {"re:mixer.(in|out){1,2}_proj": 8, "re:(?=x)x_proj": 4}
