"""The workplace of the documents' commands and code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from document_blocks import ROOT, blocks_of
from PIL import Image
from quick_documents import HAS_TRANSFORMERS, TINY, TINY_TEXTS
from quick_runs import NO_PICTURES, replace_until_undone

from vimtune import cli
from vimtune.recipe import Recipe
from vimtune.search.plan import Plan


def image(path: Path, color: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), color).save(path)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with what the commands take for granted: images, a recipe, a run."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my-recipe.yaml").write_text("lr: 0.01\n")
    (space,) = {block.body for block in blocks_of("yaml")}
    (folder / "my-space.yaml").write_text(space)
    (folder / "runs" / "my-search").mkdir(parents=True)
    Plan("my", Recipe(), yaml.safe_load(space), trials=1, seed=0, prune=True).save(
        folder / "runs" / "my-search" / "search.yaml"
    )
    Recipe().save(folder / "runs" / "my-search" / "best.yaml")
    for plan in ("my-plan.yaml", "runs/equal/plan.yaml"):
        (folder / plan).parent.mkdir(parents=True, exist_ok=True)
        (folder / plan).write_text("methods: lora\n")
    image(folder / "photo.jpg", "red")
    for name, color in (("rose", "red"), ("violet", "blue")):
        for index in range(8):
            image(folder / "my" / "images" / name / f"{index}.png", color)
            image(folder / "my" / "photos" / f"{name}{index}.png", color)
    rows = [f"{name}{index}.png,{name}" for name in ("rose", "violet") for index in range(8)]
    (folder / "my" / "photos" / "labels.csv").write_text("\n".join(["path,label", *rows]))
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    question = {"id": "1", "question": "Which is a colour of roses?", "choices": choices, "answerKey": "A"}
    for split in ("train", "test"):
        path = folder / "my" / "arc" / f"ARC-Easy-{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{json.dumps(question)}\n" * 4, encoding="utf-8")
    (folder / "my" / "remarks").mkdir()
    (folder / "my" / "remarks" / "train.csv").write_text("remark,mood\n" + "warm,good\ncold,bad\n" * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        replace_until_undone(NO_PICTURES, patch)
        command = f"train --dataset folder --data-dir my/images --output-dir runs/my-run --peft lora {TINY}"
        assert cli.main(command.split()) == 0
        shutil.copytree("runs/my-run", "runs/my-other-run")
        data = "--dataset csv --data-dir my/photos --dataset-kwargs separator=;"
        command = f"train --task multilabel {data} --output-dir runs/my-tags --peft lora {TINY}"
        assert cli.main(command.split()) == 0
        few = "species=2,train_per_species=2,val_per_species=2,test_per_species=2"
        command = f"train --dataset-kwargs {few} --output-dir runs/flowers --peft lora {TINY}"
        assert cli.main(command.split()) == 0
        shutil.copy("runs/flowers/adapter.safetensors", "flowers.safetensors")
        assert (
            cli.main(
                ["embed", "my/images", "--adapter", "runs/my-run", "--device", "cpu", "-o", "images.npz"]
            )
            == 0
        )
        if HAS_TRANSFORMERS:
            texts = [{"text": "warm", "label": "summer"}, {"text": "cold", "label": "winter"}] * 2
            for split in ("train", "test"):
                path = folder / "my" / "texts" / f"{split}.jsonl"
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(f"{json.dumps(text)}\n" for text in texts), encoding="utf-8")
            command = "train --task text --data-dir my/texts --output-dir runs/my-texts --head classifier"
            assert cli.main([*command.split(), *TINY_TEXTS.split()]) == 0
    return folder


@pytest.fixture
def here(workplace, monkeypatch, tmp_path) -> Path:
    """A copy of the workplace as the working directory."""
    shutil.copytree(workplace, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def recipes(monkeypatch) -> list:
    """The recipes that reached the trainer, which is replaced."""
    reached: list = []
    monkeypatch.setattr("vimtune.training.train", reached.append)
    return reached
