"""Every block of Python in the documents runs as it is written.

What a test cannot do within seconds is replaced, and only as stated here:

- Models start from random weights, the same ones whenever they are created, instead of downloaded ones.
- The language model is a tiny one.
- Blocks with tests of their own are those of `OWN_TESTS`. The other blocks of a page run one after the other,
  as a reader would run them, with what `PREPARED` gives them. Models of 7 million parameters that they create
  are tiny ones, training has a few images.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from document_blocks import DOCUMENTS, Block, blocks_of, commands_of
from PIL import Image

import vimtune
from vimtune import cli
from vimtune.data import build_transform, load_image
from vimtune.methods import METHODS

OWN_TESTS = {
    "timm.create_model": "README.md",
    "create_language_model": "docs/language.md",
    "import onnxruntime": "docs/export.md",
    "extra_files=about": "docs/export.md",
}
"""A part of each block that a test of its own runs, and the page."""


def block_with(part: str) -> Block:
    """The block with this part on its page."""
    (block,) = (block for block in blocks_of("python", OWN_TESTS[part]) if part in block.body)
    return block


def python_with(part: str) -> str:
    """What stands in it."""
    return block_with(part).body


def test_the_python_of_the_readme(here):
    body = python_with("timm.create_model")
    body = body.replace("pretrained=True", "pretrained=False")
    before, save, after = body.partition("vimtune.save_adapter")
    assert save
    namespace: dict = {}
    torch.manual_seed(0)
    exec(before, namespace)
    # "Pets" were trained on the same base weights.
    namespace["vimtune"].save_adapter(namespace["model"], "pets.safetensors")
    exec(save + after, namespace)
    assert namespace["vimtune"].list_adapters(namespace["model"]) == []
    (call,) = re.findall(r"`(vimtune\.inject\([^`]+\))`", DOCUMENTS["README.md"])
    exec(call, namespace)
    assert namespace["vimtune"].list_adapters(namespace["model"]) == ["default"]


def test_language_models(here):
    transformers = pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")
    body = python_with("create_language_model")
    changed = body.replace("state-spaces/mamba-130m-hf", "mamba_tiny")
    assert changed != body
    exec(changed, {"vimtune": vimtune})
    assert type(transformers.AutoModelForCausalLM.from_pretrained("merged")).__name__ == "MambaForCausalLM"


def test_onnxruntime(here, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    (line,) = (line for line in commands_of("README.md") if line.startswith("vimtune export"))
    assert cli.main(shlex.split(line)[1:]) == 0
    body = python_with("import onnxruntime")
    for name, (width, height) in {"wide": (90, 61), "tall": (57, 200)}.items():
        coarse = Image.effect_noise((7, 5), 90).convert("RGB")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(f"{name}.png")
    predictor = vimtune.load_predictor("runs/my-run")
    capsys.readouterr()
    exec(body, {})
    (found,) = predictor.predict(["photo.jpg"])
    assert capsys.readouterr().out.strip() == found.classes[0]
    assert cli.main(["export", "runs/my-run", "-o", "flowers.pt2"]) == 0
    exec(body + python_with("extra_files=about"), namespace := {})
    torch.testing.assert_close(namespace["logits"], predictor.logits(torch.from_numpy(namespace["images"])))
    assert json.loads(namespace["about"]["classes"]) == predictor.classes
    half = Image.effect_noise((64, 64), 90).convert("RGB")
    half.putalpha(Image.linear_gradient("L").resize((64, 64)))
    half.save("clear.png")
    fine = np.linspace(0, 65535, 90 * 61).reshape(61, 90).astype(np.uint16)
    Image.fromarray(fine).save("fine.png")  # 16 bits

    file = onnx.load("flowers.onnx")
    (stated,) = (each for each in file.metadata_props if each.key == "preprocessing")
    for change in ({}, {"crop_mode": "center", "crop_pct": 0.875, "interpolation": "bilinear"}):
        how = json.loads(stated.value) | change
        stated.value = json.dumps(how)
        onnx.save(file, "flowers.onnx")
        for name in ("wide.png", "tall.png", "clear.png", "fine.png"):
            namespace = {}
            exec(body.replace("photo.jpg", name), namespace)
            expected = build_transform(**how)(load_image(name))
            # Pillow rounds once for each of two steps where one step would do.
            torch.testing.assert_close(torch.from_numpy(namespace["images"])[0], expected, rtol=0, atol=0.03)


def with_two_adapters() -> dict[str, Any]:
    model = timm.create_model("test_vim", num_classes=5)
    for name in ("flowers", "pets"):
        vimtune.inject(model, "lora", name=name, rank=2)
    return {"model": model.eval(), "images": torch.randn(3, 3, 32, 32)}


def with_a_vim() -> dict[str, Any]:
    return {"model": timm.create_model("vim_tiny_patch16_224", num_classes=5)}


def with_pets() -> dict[str, Any]:
    """The file of an adapter of the same base weights."""
    model = timm.create_model("vim_tiny_patch16_224", num_classes=102, peft="prodial")
    vimtune.save_adapter(model, "pets.safetensors")
    return {}


PREPARED: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/adapters.md": with_pets,
    "docs/budgets.md": with_a_vim,
    "docs/from_peft.md": with_two_adapters,
    "docs/sharing.md": with_two_adapters,
}
"""What the blocks of a page take for granted beside the package, the run and the photos of `workplace`."""
FEW = {"species": 3, "train_per_species": 4, "val_per_species": 2, "test_per_species": 2}
"""Sizes of the generated data set in training."""
PAGES = sorted({block.page for block in blocks_of("python") if block.page.startswith("docs/")})


def test_every_block_of_python_has_its_test():
    (first,) = blocks_of("python", "README.md")
    assert first == block_with("timm.create_model")
    elsewhere = {block.page for block in blocks_of("python")} - {"README.md", "CONTRIBUTING.md", *PAGES}
    assert not elsewhere


@pytest.mark.usefixtures("no_pictures", "each_flower_is_painted_once")
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page(page, here, monkeypatch):
    create, train = timm.create_model, vimtune.train

    def same(name: str, *arguments: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        small = "test_vim" if name == "vim_tiny_patch16_224" else name
        return create(small, *arguments, **options | {"pretrained": False})

    own = [block_with(part) for part in OWN_TESTS]
    blocks = [block for block in blocks_of("python", page) if block not in own]
    if any("timm.create_model" in block.body for block in blocks):
        monkeypatch.setattr(timm, "create_model", same)
    monkeypatch.setattr(
        vimtune, "train", lambda recipe, **more: train(recipe.replace(dataset_kwargs=FEW), **more)
    )
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    module = ModuleType("page_of_the_documents")  # by whose name classes are pickled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update({"vimtune": vimtune} | PREPARED.get(page, dict)())
    for block in blocks:
        exec(compile(block.body, str(block), "exec"), vars(module))
