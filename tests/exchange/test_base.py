"""The base model in a card and in HF peft's settings is a repository of the hub, or is not named."""

from __future__ import annotations

import json

import pytest
import yaml
from adapter_files import make_adapter
from huggingface_hub.utils import validate_repo_id

import vimtune
from vimtune.exchange.base import base_on_hub
from vimtune.language.registry import LANGUAGE_MODELS
from vimtune.models.registry import MODELS

IN1K = "hustvl/Vim-tiny-midclstok"


def of_images(name: str, **recipe: object) -> vimtune.AdapterInfo:
    """What the file of an adapter of images says."""
    model = {"name": name}
    return vimtune.AdapterInfo("lora", {"lora": {}}, None, None, 0, "", model, extra={"recipe": recipe})


def of_texts(**recipe: object) -> vimtune.AdapterInfo:
    """What that of a language model says."""
    return vimtune.AdapterInfo("lora", {"lora": {}}, None, None, 0, "", {}, extra={"recipe": recipe})


def test_of_all_models_the_repository_of_the_weights_is_named_or_nothing():
    images = {name: base_on_hub(of_images(name)) for name, _ in MODELS.items()}
    texts = {name: base_on_hub(of_texts(model=name)) for name, _ in LANGUAGE_MODELS.items()}
    for name, found in {**images, **texts}.items():
        assert found != name
        if found is not None:
            validate_repo_id(found)
            assert "/" in found
    assert images["vim_tiny_patch16_224"] == IN1K and images["vim_nano_patch8_64.tiny_in200"] is None
    assert texts["mamba-130m"] == "state-spaces/mamba-130m-hf" and texts["mamba_tiny"] is None


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (of_images("vim_tiny_patch16_224"), IN1K),
        (of_images("vim_tiny_patch16_224.in1k", pretrained=True), IN1K),
        (of_images("vim_tiny_patch16_224", pretrained=False), None),
        (of_images("vim_tiny_patch16_224", checkpoint="mine.pth"), None),
        (of_images("nobody_registered_this"), None),
    ],
)
def test_other_weights_than_published_ones_have_no_repository(info, expected):
    assert base_on_hub(info) == expected


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"model": "owner/name"}, "owner/name"),
        ({"model": "owner/name", "pretrained": False}, None),
        ({"model": "mamba-130m", "checkpoint": "weights.safetensors"}, None),
        ({"model": "owner/name@main"}, None),
        ({"model": "a/b/c"}, None),
        ({"model": "/srv/models/mine"}, None),
        ({"model": 3}, None),
    ],
)
def test_of_texts_the_recipe_says_it(recipe, expected):
    assert base_on_hub(of_texts(**recipe)) == expected


def test_card_and_settings_name_the_same_base(tmp_path, monkeypatch):
    """The hub reads both."""
    make_adapter(tmp_path / "adapter.safetensors", rank=2)
    for place, named in (("none", None), ("published", "me/base")):
        for module in ("card", "base"):  # The weights of this adapter are random ones.
            monkeypatch.setattr(f"vimtune.exchange.{module}.base_on_hub", lambda info, named=named: named)
        folder = vimtune.convert(tmp_path / "adapter.safetensors", tmp_path / place, to="peft")
        front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1])
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert front.get("base_model") == settings["base_model_name_or_path"] == named
