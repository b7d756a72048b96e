"""A run on texts that is interrupted and continued is the uninterrupted one, to the bit."""

from __future__ import annotations

import json
import random

import pytest
import torch

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from interruption import interrupt_at
from text_files import ARC, write_lines
from text_runs import SETTINGS

from vimtune.recipe import Recipe, load_recipe
from vimtune.tensor_file import read_tensors
from vimtune.training import Interrupted, train

pytestmark = pytest.mark.usefixtures("no_pictures")

EVERYTHING = {"epochs": 2, "grad_accum": 2, "ema": 0.9, "weight_decay": 0.1, "dropout": 0.2}
"""Whatever has a state or draws random numbers."""


def write_texts(folder):
    """Files of a data set whose lines have many lengths."""
    draw = random.Random(0)
    folder.mkdir()
    for split, number in (("train", 40), ("test", 6)):
        lines = [
            {**ARC, "question": "word " * int(1 + draw.expovariate(0.2)), "answerKey": "ABC"[index % 3]}
            for index in range(number)
        ]
        write_lines(folder / f"ARC-Easy-{split}.jsonl", lines)
    return str(folder)


def result(folder):
    """The tensors of state and adapter, and the records of a run without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in r.items() if not key.endswith("_per_second")} for r in records]
    files = (read_tensors(folder / f"{name}.safetensors") for name in ("checkpoint", "adapter"))
    return kept, {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("head", ["likelihood", "classifier"])
def test_a_resumed_run_is_the_uninterrupted_one(head, tmp_path, monkeypatch):
    recipe = Recipe(
        **{
            **SETTINGS,
            **EVERYTHING,
            "task": "arc_easy",
            "head": head,
            "data_dir": write_texts(tmp_path / "data"),
            "log_interval": 1,
            "output_dir": str(tmp_path / "straight"),
        }
    )
    train(recipe)
    records, tensors = result(tmp_path / "straight")
    steps = sum(record["kind"] == "step" for record in records)
    assert steps >= 8
    folder = tmp_path / "interrupted"
    given = recipe.replace(output_dir=str(folder))
    for call in (2, steps // 2 + 1):  # in the middle of the first epoch, and of the second
        with monkeypatch.context() as patch:
            interrupt_at(patch, "_compute_gradients", call)
            with pytest.raises(Interrupted):
                train(given)
        given = load_recipe(None, {"resume": str(folder)})
    train(given)
    again, others = result(folder)
    assert again == records and others.keys() == tensors.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], others[name])]
