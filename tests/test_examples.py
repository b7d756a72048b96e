"""The examples train an adapter with the loops of others, and `vimtune evaluate` takes what they write."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from vimtune import read_adapter_info
from vimtune.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {"lightning_adapter": ["--accelerator", "cpu"], "accelerate_adapter": ["--cpu"]}
"""What keeps an example on the CPU."""


def test_all_examples_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*ARGUMENTS, "flowers"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_leaves_an_adapter_that_vimtune_evaluates(name, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip(name.partition("_")[0])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    flowers = importlib.import_module("flowers")
    kwargs = {"species": 4, "train_per_species": 8, "val_per_species": 2, "test_per_species": 4}
    monkeypatch.setattr(flowers, "RECIPE", flowers.RECIPE.replace(dataset_kwargs=kwargs, batch_size=8))
    with torch.random.fork_rng():
        importlib.import_module(name).main([*ARGUMENTS[name], "--output", "flowers.safetensors"])
    (said,) = re.findall(r"top-1 on the test split: (.*) %", capsys.readouterr().out)
    command = ["evaluate", "--adapter", "flowers.safetensors", "--device", "cpu", "-o", "scores.json"]
    assert main(command) == 0
    scores = json.loads(Path("scores.json").read_text())
    assert scores["top1"] == pytest.approx(float(said), abs=0.01)
    assert float(said) >= 50  # Chance gives 25.
    info = read_adapter_info("flowers.safetensors")
    assert len(info.classes) == 4 and info.extra["recipe"]["dataset"] == "synthetic_flowers"
