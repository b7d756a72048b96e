"""The seed of the data is not the seed of the run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vimtune.train.checkpoint import Progress, ResumeError, RunState, check_resumable
from vimtune.train.distributed import Processes
from vimtune.train.job import build_job


def test_the_run_seed_draws_another_order_of_the_same_images(tiny) -> None:
    one, other, data = (
        build_job(tiny(**changes), Processes()) for changes in ({}, {"seed": 1}, {"data_seed": 1})
    )
    for loader in ("train", "selection", "test"):
        prints = [getattr(job, loader).dataset.fingerprint() for job in (one, other, data)]
        assert prints[0] == prints[1] != prints[2]
    assert one.classes == other.classes != data.classes
    labels = [[labels.tolist() for _, labels in job.train] for job in (one, other, data)]
    assert labels[0] != labels[1] and labels[0] == labels[2]


def test_a_state_of_before_data_seed_belongs_to_the_data_of_its_seed(tiny) -> None:
    recipe = tiny(seed=5, data_seed=5)
    facts = {"classes": ["a", "b"], "train_images": 2, "base_hash": ""}
    state = RunState(recipe.to_dict(), facts, Progress(), {}, {}, {}, {})
    del state.recipe["data_seed"]
    assert check_resumable(state, recipe, facts) == []
    with pytest.raises(ResumeError, match="data_seed was 5 and is now 0"):
        check_resumable(state, replace(recipe, data_seed=0), facts)
