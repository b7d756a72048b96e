"""Training that goes on from an adapter file."""

from __future__ import annotations

import pytest
import timm
import torch

import vimtune
from vimtune.adapters import AdapterFileError, adapter_state_dict, start_from

OLD = ["ant", "bee", "cat", "dog"]


def adapted(num_classes: int, method: str = "lora", seed: int = 0, **options):
    """A model with an adapter whose values are all drawn, on the base weights of `seed`."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vim", num_classes=num_classes, depth=2, backend="torch")
    base = timm.create_model("test_vim", num_classes=3, depth=2, backend="torch")
    torch.manual_seed(7)
    state = {name: torch.randn_like(value) / 8 for name, value in base.state_dict().items()}
    model.load_state_dict({name: value for name, value in state.items() if "head" not in name}, strict=False)
    vimtune.inject(model, method, **options)
    torch.manual_seed(seed + 100)
    for tensor in adapter_state_dict(model).values():
        tensor.normal_()
    return model


@pytest.fixture
def path(tmp_path):
    vimtune.save_adapter(adapted(4, rank=2), tmp_path / "old.safetensors", classes=OLD)
    return tmp_path / "old.safetensors"


@pytest.mark.parametrize(
    "classes", [OLD, OLD[::-1], ["dog", "ant"], ["eel", "cat", "fox", "ant", "bee", "dog"], ["x", "y"]]
)
def test_classes_keep_their_rows_by_name_and_all_else_its_values(classes, path) -> None:
    before = adapter_state_dict(adapted(4, rank=2))
    model = adapted(len(classes), rank=2, seed=1)
    fresh = {key: value.clone() for key, value in adapter_state_dict(model).items()}
    start_from(model, path, classes=classes)
    for key, value in adapter_state_dict(model).items():
        if not key.startswith("head."):
            assert torch.equal(value, before[key])
            continue
        for row, name in enumerate(classes):
            expected = before[key][OLD.index(name)] if name in OLD else fresh[key][row]
            assert torch.equal(value[row], expected)


def test_without_names_the_head_has_to_be_of_the_same_size(path, tmp_path) -> None:
    vimtune.save_adapter(adapted(4, rank=2), tmp_path / "nameless.safetensors")
    model = adapted(4, rank=2, seed=1)
    start_from(model, tmp_path / "nameless.safetensors", classes=["a", "b", "c", "d"])
    before = adapter_state_dict(adapted(4, rank=2))
    assert all(torch.equal(value, before[key]) for key, value in adapter_state_dict(model).items())
    with pytest.raises(AdapterFileError, match="4 outputs and this one 5"):
        start_from(adapted(5, rank=2), tmp_path / "nameless.safetensors", classes=list("abcde"))


def test_what_does_not_fit_is_refused_and_the_model_stays(path) -> None:
    for model, told in (
        (adapted(4, "bitfit"), "of method lora.* of bitfit"),
        (adapted(4, rank=3), "has shape"),
        (adapted(4, rank=2, layers=[0]), "unexpected"),
    ):
        before = {key: value.clone() for key, value in adapter_state_dict(model).items()}
        with pytest.raises(AdapterFileError, match=told):
            start_from(model, path, classes=OLD)
        assert all(torch.equal(value, before[key]) for key, value in adapter_state_dict(model).items())


def test_a_head_is_in_the_file_and_in_the_model_or_in_neither(path, tmp_path) -> None:
    vimtune.save_adapter(adapted(0, rank=2), tmp_path / "headless.safetensors")
    for file, num_classes, told in (
        (path, 0, "it has a head of 4 outputs, and the model has none: create the model with a head"),
        (tmp_path / "headless.safetensors", 4, "it has no head, and the model has one: create"),
    ):
        with pytest.raises(AdapterFileError, match=told):
            start_from(adapted(num_classes, rank=2), file, classes=OLD)
        model = adapted(num_classes, rank=2)
        with pytest.raises(AdapterFileError, match=told):
            vimtune.load_adapter(model, file, name="another", force=True)
        assert vimtune.list_adapters(model) == ["default"]


def test_other_base_weights_are_refused_unless_forced(path) -> None:
    model = adapted(4, rank=2)
    with torch.no_grad():
        model.pos_embed += 1
    with pytest.raises(AdapterFileError, match="other base weights"):
        start_from(model, path, classes=OLD)
    start_from(model, path, classes=OLD, force=True)


def test_other_options_are_named(path, caplog) -> None:
    """The same values may be another function, as those of prodial are with another diagonal."""
    start_from(adapted(4, rank=2, seed=1), path, classes=OLD)
    start_from(adapted(4, rank=2, lr_scale=3.0, decay_scale=0.5), path, classes=OLD)  # This is of training.
    assert "other options" not in caplog.text
    start_from(adapted(4, rank=2, alpha=3.0, lr_scale=3.0), path, classes=OLD)
    assert "may start as another function: alpha of lora was 8.0 and is 3.0" in caplog.text
