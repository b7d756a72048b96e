"""Adapter files: what they keep, what older ones mean, and what is refused in files from anybody."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest
import timm
import torch
from method_cases import CASES, disturb, label, options_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import vimtune
from vimtune import schema
from vimtune.adapters import (
    AdapterFileError,
    active_adapter,
    adapter_parameters,
    adapter_state_dict,
    get_method,
    list_methods,
)
from vimtune.adapters.identity import _first_format_hash
from vimtune.adapters.info import NEUTRAL_OF_ALL, NEUTRAL_OPTIONS, VERSION_1_OPTIONS
from vimtune.methods.bitfit import BitFit
from vimtune.training.report import describe_method

PREPROCESSING = {
    "preset": "none",
    "img_size": [32, 32],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "train": False,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "library": "albumentations",
}


def plain(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=5, depth=2, backend="torch", **options).eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def info_of(path):
    return json.loads(metadata_of(path)["info"])


def rewrite(path, tensors=None, text=None, **changes):
    """Write a file again with other tensors or other metadata."""
    info = {**info_of(path), **changes}
    info = {key: value for key, value in info.items() if value is not ...}
    metadata = {**metadata_of(path), "info": json.dumps(info) if text is None else text}
    save_file(load_file(path) if tensors is None else tensors, path, metadata=metadata)


@pytest.fixture(params=CASES, ids=label)
def case(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def saved(path):
    model = disturb(vimtune.inject(plain(), "lora", rank=2))
    vimtune.save_adapter(
        model, path, classes=list("vwxyz"), preprocessing=PREPROCESSING, extra={"top1": 12.5}
    )
    return path


@pytest.fixture
def other_defaults(monkeypatch):
    """A vimtune in which every default of every method has changed."""
    others = {int: 1, float: 0.5, str: "paper", bool: True, type(None): 7}
    for name in list_methods():
        for field in dataclasses.fields(get_method(name)):
            monkeypatch.setattr(field, "default", others[type(field.default)])
        monkeypatch.setattr(get_method(name), "default_targets", "A_log")


# --- what a file keeps


def test_a_file_keeps_every_field_and_where_the_rules_are(case, path):
    method, extra = case
    model = vimtune.inject(plain(), method, **options_for(method, extra))
    vimtune.save_adapter(model, path)
    info = vimtune.read_adapter_info(path)
    assert info.version == 5 and list(info.options) == list(info.sites) == method.split("+")
    for name, own in info.options.items():
        assert own.keys() == {field.name for field in dataclasses.fields(get_method(name))}
    adapted = {item.base_name for item in adapter_parameters(model) if item.group == "adapter"}
    trained = {name: own for name, own in info.sites.items() if name != "memba"}  # has no tensors
    assert {path.partition("[")[0] for own in trained.values() for path in own} == adapted
    assert describe_method(info) == {"targets": None, "layers": None, **info.options}


def test_other_defaults_change_no_file(case, path, request):
    method, extra = case
    model = disturb(vimtune.inject(plain(), method, **options_for(method, extra)))
    vimtune.save_adapter(model, path)
    request.getfixturevalue("other_defaults")
    other = plain()
    vimtune.load_adapter(other, path)
    assert active_adapter(other).options == active_adapter(model).options
    assert torch.equal(other(images()), model(images()))


def test_targets_and_layers_by_method(path):
    where = {"targets": {"lora": "both", "ft": "A_log,D"}, "layers": {"lora": [0]}}
    model = disturb(vimtune.inject(plain(), "lora+ft", rank=2, **where))
    vimtune.save_adapter(model, path)
    info = vimtune.read_adapter_info(path)
    assert info.targets == {"lora": "both", "ft": ["A_log", "D"]} and info.layers == {"lora": [0]}
    other = plain()
    vimtune.load_adapter(other, path)
    assert torch.equal(other(images()), model(images()))


# --- files of version 2: the options that came later are not in them


def test_version_2_means_what_it_meant(case, path):
    method, extra = case
    model = disturb(vimtune.inject(plain(), method, **options_for(method, extra)))
    info = vimtune.save_adapter(model, path)
    options = {
        name: {
            key: value
            for key, value in own.items()
            if (key, value) not in {**NEUTRAL_OF_ALL, **NEUTRAL_OPTIONS.get(name, {})}.items()
        }
        for name, own in info.options.items()
    }
    rewrite(path, version=2, options=options)
    read = vimtune.read_adapter_info(path)
    assert read.version == 2 and read.options == info.options
    other = plain()
    vimtune.load_adapter(other, path)
    assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sites": {"lora": ["layers.0.mixer.x_proj.weight[Q]"]}},
            "named rows of that parameter are: dt, B, C",
        ),
        ({"sites": {"lora": ["layers.0.mixer.D[x]"]}}, "the named rows of that parameter are: none"),
        ({"sites": {"lora": ["layers.0.mixer.norm()"]}}, "is no call to adapt"),
        ({"sites": {"lora": ["layers.0.mixer.scan()"]}}, "is a call, and this method changes parameters"),
        ({"sites": {"lora": ["a[b](c)"]}}, "is no path of a parameter"),
        (
            {"options": {"lora": {"rank": {"nowhere": 2}}}},
            "given for 'nowhere', where the method does",
        ),
        ({"options": {"lora": {"rank": {}}}}, "is an empty mapping"),
    ],
)
def test_points_that_lie(saved, changes, message):
    rewrite(saved, **changes)
    check_refused(saved, message)


# --- files of version 1

GIVEN_IN_VERSION_1 = [
    ("prodial", {}, None),
    ("prodial", {"variant": "paper", "rank": 3}, "in_proj"),
    ("lora", {"rank": 2}, None),
    ("dora", {}, ["in_proj"]),
    ("strong", {"rank": 3}, None),
    ("ft", {}, None),
    ("bitfit", {}, None),
    ("full", {}, None),
    ("linear", {}, None),
    ("lora+bitfit", {"lora": {"alpha": 2.0}}, None),
]


def write_version_1(path, model, method, options, targets):
    """As `save_adapter` of version 1 did: only the options that were given, no sites."""
    info = {
        "method": method,
        "options": options,
        "targets": targets,
        "layers": None,
        "num_classes": 5,
        "base_hash": _first_format_hash(model, None),
        "model": model.creation,
        "classes": list("vwxyz"),
        "preprocessing": {**PREPROCESSING, "note": "of my own"},
        "extra": {"epoch": 3},
        "version": 1,
    }
    save_file(adapter_state_dict(model), path, {"format": "vimtune-adapter", "info": json.dumps(info)})


@pytest.mark.parametrize(("method", "options", "targets"), GIVEN_IN_VERSION_1)
def test_version_1_means_what_it_meant(method, options, targets, path, request):
    torch.manual_seed(0)
    base = {"num_classes": 5, "depth": 2, "embed_dim": 32, "backend": "torch"}  # as wide as rank 16 needs
    model = timm.create_model("test_vim", **base).eval()
    then = VERSION_1_OPTIONS.get(method, {}) | options
    disturb(vimtune.inject(model, method, targets=targets, **then))
    write_version_1(path, model, method, options, targets)
    expected = vimtune.read_adapter_info(path)
    assert expected.options == active_adapter(model).options
    assert expected.extra == {"epoch": 3, "preprocessing": {"note": "of my own"}}
    assert expected.preprocessing == PREPROCESSING
    request.getfixturevalue("other_defaults")
    assert vimtune.read_adapter_info(path) == expected
    torch.manual_seed(0)
    other = timm.create_model("test_vim", **base).eval()
    vimtune.load_adapter(other, path)
    assert torch.equal(other(images()), model(images()))
    vimtune.save_adapter(other, path)
    assert vimtune.read_adapter_info(path).sites == active_adapter(model).sites


def test_version_1_of_a_method_that_selects_more_today(path, monkeypatch):
    """BitFit did not know biases of other names than "bias" then."""

    class Mamba2(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj = nn.Linear(4, 4)
            self.dt_bias = nn.Parameter(torch.zeros(4))

    with monkeypatch.context() as then:
        then.setattr(BitFit, "select", lambda *_: ["in_proj.bias"])
        model = disturb(vimtune.inject(Mamba2(), "bitfit"))
    model.creation = {}
    write_version_1(path, model, "bitfit", {}, None)
    rewrite(path, num_classes=0, classes=[])
    other = Mamba2()
    vimtune.load_adapter(other, path, force=True)
    assert active_adapter(other).sites == {"bitfit": ["in_proj.bias"]}
    assert torch.equal(other.in_proj.bias, model.in_proj.bias)


@pytest.mark.parametrize(
    ("method", "options", "meant", "targets"),
    [
        ("strong", {"rank": 3, "dropout": 0.1}, {"rank": 3}, None),
        ("lora+dora", {"rank": 3, "dropout": 0.1}, {"rank": 3}, None),
        ("lora", {"rank": 3}, None, "head"),
    ],
)
def test_version_1_with_rules_that_are_refused_today(method, options, meant, targets, path):
    """Dropout without effect, a head alone: in evaluation such files compute what they computed."""
    model = disturb(
        vimtune.inject(plain(), "linear") if meant is None else vimtune.inject(plain(), method, **meant)
    )
    write_version_1(path, model, method, options, targets)
    for _ in range(2):
        other = plain()
        vimtune.load_adapter(other, path)
        assert torch.equal(other(images()), model(images()))
        vimtune.save_adapter(other, path)  # in the present version


# --- files from anybody

NEWER = {"replaced_hash": ..., "replaced_origin": ...}
"""What files of version 1 do not have, either."""
DEEP = json.loads("[" * 500 + "]" * 500)
BAD_INFO = [
    ({"method": "lore"}, r"unknown method, 'lore'. Did you mean 'lora'\?.*Update vimtune"),
    ({"method": "lora+nonsense"}, "unknown method, 'nonsense'.*Update vimtune"),
    ({"method": ["lora"]}, "method: Input should be a valid string"),
    ({"method": "bitfit"}, r"options of \['lora'\], but the method is 'bitfit'"),
    ({"version": 6}, "format version 6; this vimtune reads up to 5: update"),
    ({"version": "2"}, "version: Input should be a valid integer"),
    ({"version": True}, "version: Input should be a valid integer"),
    ({"version": 0}, "version: Input should be greater than or equal to 2"),
    ({"options": {"lora": {"rank": "2"}}}, "option rank of method 'lora'"),
    ({"options": {"lora": {"rank": [{}]}}}, "options.lora.rank"),
    ({"options": {"lora": {"rnak": 2}}}, "no option 'rnak'. Did you mean 'rank'"),
    ({"options": {"lora": 3}}, "options.lora: Input should be"),
    ({"options": {"lora": {"rank": True}}}, "option rank of method 'lora'"),
    ({"options": {"lora": {"rank": 10**9}}}, "rank 1000000000 does not fit"),
    ({"targets": 3}, "targets"),
    ({"layers": ["0"]}, "layers"),
    ({"layers": [True]}, "layers"),
    (
        {"sites": {"lora": ["layers.7.mixer.in_proj.weight"]}},
        "is no parameter to adapt. Did you mean 'layers",
    ),
    ({"sites": {"lora": ["head.weight"]}}, "'head.weight', which is no parameter to adapt"),
    ({"sites": {"lora": ["layers.0.mixer.in_proj.weight"] * 2}}, "twice by one method"),
    ({"sites": {"ft": []}}, r"sites of \['ft'\], but the method is 'lora'"),
    ({"num_classes": -1}, "num_classes: Input should be greater"),
    ({"num_classes": 10**9}, "num_classes: Input should be less"),
    ({"num_classes": 10**6, "classes": []}, "it says 1000000 classes"),
    ({"num_classes": 4}, "5 class names for a head of 4"),
    (
        {"num_classes": 4, "classes": list("abcd")},
        "it says 4 classes, but has no such tensor for head.weight",
    ),
    ({"classes": "vwxyz"}, "classes: Input should be a valid array"),
    ({"classes": [1, 2, 3, 4, 5]}, "classes.0: Input should be a valid string"),
    ({"base_hash": None}, "base_hash"),
    ({"model": {"name": "test_vim"}}, "expected the name and the kwargs of a model"),
    ({"model": {"name": 3, "kwargs": {}}}, "known model"),
    (
        {"model": {"name": "test_vim", "kwargs": {"pretrained_cfg_overlay": {"url": "x"}}}},
        "pretrained_cfg_overlay",
    ),
    ({"model": {"name": "x", "kwargs": {}, "url": "x"}}, "expected the name and the kwargs of a model"),
    ({"preprocessing": {**PREPROCESSING, "evil": 1}}, "preprocessing does not have the expected form: evil"),
    ({"preprocessing": {"img_size": [32]}}, r"img_size=.* must be two numbers"),
    ({"preprocessing": {"img_size": [0, 32]}}, r"img_size=.* must be two numbers"),
    ({"preprocessing": {"std": [1.0, 0.0, 1.0]}}, "std positive"),
    ({"preprocessing": {"mean": [math.nan] * 3}}, "the number NaN is not allowed"),
    ({"preprocessing": {"mean": [math.inf] * 3}}, "the number Infinity is not allowed"),
    ({"preprocessing": {"crop_pct": 1.5}}, "crop_pct=1.5"),
    ({"preprocessing": {"train": 1}}, "preprocessing.*train"),
    ({"extra": 3}, "extra"),
    ({"unheard": 1}, "unheard"),
    ({"method": ...}, "method"),
    ({"options": DEEP}, "options"),
    ({"version": 1, "options": {}}, "sites"),  # no field of version 1
    (
        {"version": 1, "sites": ..., "base_origin": ..., **NEWER, "options": {"rank": 2, "rnak": 2}},
        "no option 'rnak'",
    ),
    (
        {"version": 1, "sites": ..., "base_origin": ..., **NEWER, "options": {"rank": "2"}},
        "option rank of method 'lora'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_INFO)
def test_metadata_that_lies(saved, changes, message):
    rewrite(saved, **changes)
    check_refused(saved, message)


@pytest.mark.parametrize("text", ["", "3", "null", "[]", "{", '{"a": 1, "a": 2}', "[" * 10**5, "\u0000"])
def test_metadata_that_are_no_description(saved, text):
    rewrite(saved, text=text)
    check_refused(saved, "adapter file .*adapter.safetensors")


def test_metadata_without_a_description(saved):
    save_file(load_file(saved), saved, metadata={"format": "vimtune-adapter"})
    check_refused(saved, "is missing")


def check_refused(path, message):
    """`load_adapter` raises one line with this message, and the model stays as it was."""
    model = plain()
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(AdapterFileError, match=message) as caught:
        vimtune.load_adapter(model, path, force=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    after = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert list(after) == list(before)
    assert all(after[name][0] is x and after[name][1] == flag for name, (x, flag) in before.items())


LORA_A = "layers.0.mixer.in_proj.weight.branch.lora_A"
BAD_TENSORS = {
    "NaN": (LORA_A, lambda x: x * math.nan, "not finite"),
    "inf": (LORA_A, lambda x: x + math.inf, "not finite"),
    "inf in half precision": (LORA_A, lambda x: x.double() + 1e300, "not finite"),
    "whole numbers": (LORA_A, lambda x: x.long(), "is of torch.int64, expected torch.float32"),
    "booleans": (LORA_A, lambda x: x > 0, "is of torch.bool, expected torch.float32"),
    "to be broadcast": (LORA_A, lambda x: x[:1], r"has shape \(1, 16\), expected \(2, 16\)"),
    "a scalar": (LORA_A, lambda x: x.sum(), r"has shape \(\), expected \(2, 16\)"),
    "empty": (LORA_A, lambda x: x[:0], r"has shape \(0, 16\), expected \(2, 16\)"),
    "large": (LORA_A, lambda x: torch.zeros(10**6), r"has shape \(1000000,\), expected \(2, 16\)"),
    "head": ("head.weight.value", lambda x: x[:4], r"has shape \(4, 16\), expected \(5, 16\)"),
    "missing": (LORA_A, None, f"missing {LORA_A}"),
    "unexpected": ("more", lambda _: torch.zeros(1), "unexpected 'more'"),
}


@pytest.mark.parametrize(("key", "change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_do_not_fit(saved, key, change, message):
    tensors = load_file(saved)
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors.get(key)).contiguous()
    rewrite(saved, tensors)
    check_refused(saved, message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_tensors_are_converted(saved, dtype):
    rewrite(saved, {key: value.to(dtype) for key, value in load_file(saved).items()})
    model = plain()
    vimtune.load_adapter(model, saved)
    for key, value in adapter_state_dict(model).items():
        assert value.dtype == torch.float32 and torch.equal(value, load_file(saved)[key].float())


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(AdapterFileError, match="is no regular file"):
        vimtune.read_adapter_info(tmp_path / "pipe.safetensors")


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    model = vimtune.inject(plain(), "lora", rank=2)
    with pytest.raises(OSError, match="a device or a pipe"):
        vimtune.save_adapter(model, tmp_path / "pipe.safetensors")
    assert (tmp_path / "pipe.safetensors").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_names_of_files_are_shown_harmlessly(tmp_path):
    with pytest.raises(AdapterFileError, match=r"adapter file .*a\\x1b\[31m does not exist"):
        vimtune.read_adapter_info(tmp_path / "a\x1b[31m")


# --- what is written can be read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra": {"top1": math.nan}}, "not finite"),
        ({"extra": {"model": object()}}, "holds what a file cannot"),
        ({"preprocessing": {"size": 32}}, "preprocessing.*size"),
        ({"preprocessing": {"mean": [0.5, 0.5]}}, "must be 3 finite numbers"),
        ({"classes": ["a"] * 4}, "4 class names for a head of 5"),
        ({"classes": [1, 2, 3, 4, 5]}, "classes.0"),
        ({"tensors": {}}, "missing"),
    ],
)
def test_what_could_not_be_read_is_not_written(path, arguments, message):
    model = vimtune.inject(plain(), "lora", rank=2)
    with pytest.raises(ValueError, match=message):
        vimtune.save_adapter(model, path, **arguments)
    assert not path.exists()


def test_metadata_that_are_too_long_to_read_are_not_written(path, monkeypatch):
    monkeypatch.setattr(schema, "MAX_TEXT_BYTES", 10_000)
    model = vimtune.inject(plain(), "lora", rank=2)
    vimtune.save_adapter(model, path)
    with pytest.raises(ValueError, match="at most 10,000 are read"):
        vimtune.save_adapter(model, path.with_name("long.safetensors"), extra={"text": "x" * 10_000})
    assert list(path.parent.iterdir()) == [path]


def test_tensors_that_are_not_finite_are_not_written(path):
    model = vimtune.inject(plain(), "lora", rank=2)
    with torch.no_grad():
        next(adapter_parameters(model)).parameter.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="holds values that are not finite"):
        vimtune.save_adapter(model, path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["plain.pth", "plain.safetensors"])
def test_plain_weights_are_said_to_be_read_otherwise(name, tmp_path):
    weights = {"head.weight": torch.zeros(2, 2)}
    torch.save(weights, tmp_path / name) if name.endswith(".pth") else save_file(weights, tmp_path / name)
    with pytest.raises(
        AdapterFileError, match="plain weights, which name no classes, are for --model NAME --checkpoint"
    ):
        vimtune.read_adapter_info(tmp_path / name)
