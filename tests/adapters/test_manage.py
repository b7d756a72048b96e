"""Adapters are injected, switched, summed up and deleted."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from method_cases import disturb
from safetensors.torch import load_file, save_file
from torch import nn

import vimtune
from vimtune.adapters import (
    AdapterFileError,
    DeadAdapterError,
    adapter_parameters,
    base_hash,
    check_gradients,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=5, depth=2).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_several_adapters_with_heads_of_their_own(model, images):
    base = model(images)
    vimtune.inject(model, "lora", name="pets", rank=2, num_classes=3)
    disturb(model, 1)
    pets = model(images)
    vimtune.inject(model, "bitfit", name="birds")
    disturb(model, 2)
    birds = model(images)
    vimtune.inject(model, "full", name="cars", num_classes=9)
    disturb(model, 3)
    cars = model(images)
    assert [x.shape[1] for x in (base, pets, birds, cars)] == [5, 3, 5, 9]
    assert vimtune.list_adapters(model) == ["pets", "birds", "cars"]
    for name, expected in (("birds", birds), ("pets", pets), ("cars", cars)):
        vimtune.set_adapter(model, name)
        assert torch.equal(model(images), expected)
        assert model.num_classes == expected.shape[1]
        trained = {id(item.parameter) for item in adapter_parameters(model)}
        assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    with vimtune.disabled(model):
        assert torch.equal(model(images), base)
        assert not any(p.requires_grad for p in model.parameters())
    vimtune.delete_adapter(model, "pets")
    assert torch.equal(model(images), cars)
    vimtune.delete_adapter(model, "cars")
    assert torch.equal(model(images), base)
    vimtune.set_adapter(model, "birds")
    assert torch.equal(model(images), birds)
    with pytest.raises(ValueError, match=r"no adapter named 'bird'\. Did you mean 'birds'"):
        vimtune.set_adapter(model, "bird")


def test_a_head_of_several_layers_keeps_its_shapes(tmp_path):
    class Classifier(nn.Module):
        num_classes = 3

        def __init__(self):
            super().__init__()
            self.in_proj = nn.Linear(4, 4)
            self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def get_classifier(self):
            return self.head

        def forward(self, x):
            return self.head(self.in_proj(x))

    base = Classifier()
    model = disturb(vimtune.inject(copy.deepcopy(base), "lora", targets="in_proj", rank=2, num_classes=3))
    vimtune.save_adapter(model, tmp_path / "a.safetensors")
    other = copy.deepcopy(base)
    vimtune.load_adapter(other, tmp_path / "a.safetensors")
    x = torch.randn(2, 4)
    assert torch.equal(other(x), model(x))


def test_merge_with_another_number_of_classes(model, images):
    vimtune.inject(model, "lora", rank=2, num_classes=3)
    disturb(model, 1)
    expected = model(images)
    vimtune.merge(model)
    assert model.head.out_features == model.num_classes == 3
    assert model.head.weight.shape == (3, 16)
    torch.testing.assert_close(model(images), expected)


def test_disabled_restores_after_an_error(model):
    vimtune.inject(model, "lora", rank=2)
    with pytest.raises(RuntimeError, match="inside"), vimtune.disabled(model):
        raise RuntimeError("inside")
    assert any(p.requires_grad for p in model.parameters())


def test_flags_through_timm():
    model = timm.create_model(
        "test_vim", num_classes=5, peft="lora+bitfit", peft_layers=[-1], peft_kwargs={"rank": 2}
    )
    names = {item.base_name for item in adapter_parameters(model)}
    assert "layers.2.mixer.in_proj.weight" in names and "layers.2.mixer.conv1d.bias" in names
    assert not any(name.startswith(("layers.0", "layers.1")) for name in names)


def test_features_only_with_an_adapter(images):
    model = timm.create_model("test_vim", features_only=True, peft="lora", peft_kwargs={"rank": 2})
    sum(x.square().sum() for x in model(images)).backward()
    check_gradients(model.model)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lore", {}, "unknown method 'lore'. Did you mean 'lora'"),
        ("lora", {"rnak": 2}, "no option 'rnak'. Did you mean 'rank'"),
        ("lora", {"rank": 0}, "rank of method .lora.: expected a value greater than or equal to 1"),
        ("lora", {"rank": 65}, r"rank 65 .* of shape 64 x 16: expected 1 to 64"),
        ("lora", {"alpha": 0}, "alpha of method .lora.: expected a value greater than 0"),
        ("lora", {"dropout": 1.0}, "dropout of method .lora.: expected a value less than 1"),
        ("lora", {"targets": "in_prj"}, r"unknown target 'in_prj'. Did you mean 'in_proj'\? Targets of this"),
        ("lora", {"targets": []}, r"targets = \[\]: expected both, in_proj"),
        ("lora", {"targets": "D"}, "lora needs a matrix; layers.0.mixer.D"),
        ("lora", {"layers": [2]}, r"layers \[2\]: the blocks with such targets are 0 to 1"),
        (
            "prodial",
            {"block_size": 5},
            r"block_size 5 does not divide .* width 16 .* possible: 1, 2, 4",
        ),
        ("prodial", {"block_size": 0}, "block_size .*: expected a value greater than or equal to 1 .found 0"),
        (
            "prodial",
            {"variant": "papr"},
            "variant .*: expected 'free', 'exp', 'tanh' or 'paper' .found 'papr'",
        ),
        ("linear", {"rank": 2}, "no option 'rank'"),
        ("linear", {"targets": "both"}, "takes neither targets"),
        ("full", {"targets": "both"}, "use method 'ft'"),
        ("lora+lora", {}, "names one method twice"),
        ("lora", {"name": "a.b"}, "plain identifier"),
        ("lora", {"name": "keys"}, "plain identifier"),
        ("lora", {"num_classes": 0}, "num_classes = 0: expected a whole number >= 1"),
    ],
)
def test_wrong_options_leave_the_model_alone(model, images, method, options, message):
    before, expected = copy.deepcopy(model.state_dict()), model(images)
    small = {"rank": 2} if method in ("lora", "prodial") else {}
    with pytest.raises(ValueError, match=message):
        vimtune.inject(model, method, **{**small, **options})
    assert list(model.state_dict()) == list(before) and torch.equal(model(images), expected)
    assert all(p.requires_grad for p in model.parameters())


def test_name_is_taken(model):
    vimtune.inject(model, "lora", rank=2)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        vimtune.inject(model, "lora", rank=2)


def test_reset_classifier_is_refused_while_an_adapter_owns_the_head(model):
    vimtune.inject(model, "linear")
    with pytest.raises(ValueError, match="merge or delete"):
        model.reset_classifier(3)
    vimtune.merge(model).reset_classifier(3)


def test_raw_parameters_and_reads_are_adapted(model, images):
    """A_log is never called, only read: the rule acts all the same."""
    vimtune.inject(model, "ft", targets=["A_log", "pos_embed", "x_proj"])
    names = {item.base_name for item in adapter_parameters(model)}
    assert {"layers.0.mixer.A_log", "pos_embed", "layers.1.mixer.x_proj.weight"} <= names
    model(images).sum().backward()
    check_gradients(model)


class Bypassing(nn.Module):
    """Reads the parameter behind the module's back, as fused kernels of other libraries may."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(4, 4)
        self.out_proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.out_proj(x @ self.in_proj._parameters["weight"])


def test_dead_adapter_is_named():
    model = vimtune.inject(Bypassing(), "lora", rank=2)
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(
        DeadAdapterError, match=r"2 trainable tensor.*in_proj.adapters.weight.default"
    ) as caught:
        check_gradients(model)
    assert "out_proj" not in str(caught.value)


def test_weight_decay_and_groups(model):
    vimtune.inject(model, "prodial", rank=2)
    for item in adapter_parameters(model):
        assert item.group == ("head" if item.base_name.startswith("head.") else "adapter")
        assert item.weight_decay == (item.parameter.dim() > 1)
        assert dict(model.named_parameters())[item.name] is item.parameter
    vimtune.delete_adapter(model, "default")
    vimtune.inject(model, "full")
    decay = {item.base_name: item.weight_decay for item in adapter_parameters(model)}
    assert decay["layers.0.mixer.in_proj.weight"] and decay["layers.0.mixer.conv1d.weight"]
    undecayed = (
        "pos_embed",
        "cls_token",
        "layers.0.mixer.A_log",
        "layers.1.mixer.A_b_log",
        "layers.0.mixer.D",
    )
    assert not any(decay[name] for name in undecayed)


class TestFile:
    @pytest.fixture
    def saved(self, model, tmp_path):
        vimtune.inject(model, "lora", rank=2)
        disturb(model, 1)
        path = tmp_path / "adapter.safetensors"
        vimtune.save_adapter(model, path, classes=list("vwxyz"), extra={"top1": 12.5})
        return path

    def test_info_without_a_model(self, saved):
        info = vimtune.read_adapter_info(saved)
        assert info.model["name"] == "test_vim" and info.model["kwargs"]["depth"] == 2
        assert info.num_classes == 5 and info.extra == {"top1": 12.5} and len(info.base_hash) == 64

    def test_other_base_is_refused_unless_forced(self, saved, images):
        torch.manual_seed(1)
        other = timm.create_model("test_vim", num_classes=5, depth=2)
        vimtune.inject(other, "bitfit", name="mine")
        before = other(images)
        with pytest.raises(AdapterFileError, match="trained on other base weights"):
            vimtune.load_adapter(other, saved)
        assert vimtune.list_adapters(other) == ["mine"] and torch.equal(other(images), before)
        vimtune.load_adapter(other, saved, force=True)
        assert vimtune.list_adapters(other) == ["mine", "default"]

    def test_head_of_the_base_does_not_matter(self, saved, model, images):
        other = timm.create_model("test_vim", num_classes=8, depth=2).eval()
        base = {k: v for k, v in model.state_dict().items() if "adapters" not in k and "head" not in k}
        other.load_state_dict(base, strict=False)
        vimtune.load_adapter(other, saved)
        assert torch.equal(other(images), model(images))

    def test_a_second_copy_gets_a_free_name(self, saved, model):
        vimtune.load_adapter(model, saved)
        assert vimtune.list_adapters(model) == ["default", "default_2"]

    def test_full_does_not_depend_on_the_base(self, model, images, tmp_path):
        vimtune.inject(model, "full")
        disturb(model, 1)
        vimtune.save_adapter(model, tmp_path / "full.safetensors")
        other = timm.create_model("test_vim", num_classes=2, depth=2).eval()
        vimtune.load_adapter(other, tmp_path / "full.safetensors")
        assert torch.equal(other(images), model(images))

    @pytest.mark.parametrize("damage", ["truncated", "empty", "other", "missing", "folder", "tensors"])
    def test_bad_files_are_refused_in_one_line(self, saved, model, images, damage):
        expected = model(images)
        path = saved
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "other":
            save_file({"x": torch.zeros(1)}, path)
        elif damage == "missing":
            path = path.with_name("nowhere.safetensors")
        elif damage == "folder":
            path = path.parent / "without an adapter"
            path.mkdir()
        else:
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            tensors = load_file(path)
            tensors.pop("head.bias.value")
            save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError) as caught:
            vimtune.load_adapter(model, path)
        assert "\n" not in str(caught.value)
        assert vimtune.list_adapters(model) == ["default"] and torch.equal(model(images), expected)

    def test_class_names_must_fit_the_head(self, model, tmp_path):
        vimtune.inject(model, "lora", rank=2)
        with pytest.raises(ValueError, match="2 class names for a head of 5"):
            vimtune.save_adapter(model, tmp_path / "a.safetensors", classes=["a", "b"])
        assert not list(tmp_path.iterdir())

    def test_hash_depends_on_what_the_adapter_builds_on(self, model):
        vimtune.inject(model, "lora", rank=2)
        before = base_hash(model)
        with torch.no_grad():
            model.head._parameters["weight"].add_(1)  # replaced by the adapter's own head
        assert base_hash(model) == before
        with torch.no_grad():
            model.norm_f.weight[0] += 1e-6
        assert base_hash(model) != before
