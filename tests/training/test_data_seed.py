"""The seed of the data is not the seed of the run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vimtune.runtime.distributed import Processes
from vimtune.tasks.classification import Classification
from vimtune.training.identity import Facts, ResumeError, compare
from vimtune.training.state import Progress, RunState, load_run_state, save_run_state


def test_the_run_seed_draws_another_order_of_the_same_images(tiny) -> None:
    one, other, data = (
        Classification().open(tiny(**changes), Processes()) for changes in ({}, {"seed": 1}, {"data_seed": 1})
    )
    for loader in ("train", "selection", "final"):
        prints = [getattr(job, loader).fingerprint() for job in (one, other, data)]
        assert prints[0] == prints[1] != prints[2]
    assert one.classes == other.classes != data.classes
    labels = [[batch.tensors["labels"].tolist() for batch in job.train] for job in (one, other, data)]
    assert labels[0] != labels[1] and labels[0] == labels[2]


def test_a_state_of_before_data_seed_belongs_to_the_data_of_its_seed(tiny, tmp_path) -> None:
    recipe = tiny(seed=5, data_seed=5)
    facts = Facts(outputs={"classes": ["a", "b"]}, train_examples=2, base_hash="")
    path = tmp_path / "state.safetensors"
    save_run_state(path, RunState(recipe, facts, Progress(), {"w": torch.ones(1)}, {}, {}, {}))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    before = {name: value for name, value in recipe.to_dict().items() if name != "data_seed"}
    save_file({"adapter/w": torch.ones(1)}, path, metadata | {"recipe": json.dumps(before)})
    saved = load_run_state(path)
    assert saved.recipe.data.data_seed == 5
    assert not any("data_seed" in note for note in compare(saved.recipe, facts, recipe, facts, True))
    with pytest.raises(ResumeError, match="data_seed was 5 and is now 0"):
        compare(saved.recipe, facts, recipe.replace(data_seed=0), facts, True)
