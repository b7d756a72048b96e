"""What every registered task says of itself, without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from vimtune.tasks import TASKS, Score, Task, register_task


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_it_counts_and_how_it_is_scored(name):
    task = TASKS.get(name)()
    assert task.name == name and task.unit and task.short_unit and task.examples
    names = [score.name for score in task.scores]
    assert len(set(names)) == len(names) and "loss" not in names


def test_tasks_are_known_without_torch():
    code = "import sys, vimtune.tasks; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def scored(*scores: Score) -> Task:
    @dataclass(frozen=True, kw_only=True)
    class Scored(Task):
        """With these scores."""

        def open(self, recipe, processes):
            raise NotImplementedError

    Scored.scores = scores
    return Scored()


def test_the_first_score_selects_and_the_loss_decides_between_equals():
    task = scored(Score("acc", "accuracy"), Score("other", "other"))
    assert task.rank(2.0, {"acc": 50.0, "other": 0.0}) > task.rank(1.0, {"acc": 40.0, "other": 90.0})
    assert task.rank(1.0, {"acc": 50.0, "other": 0.0}) > task.rank(2.0, {"acc": 50.0, "other": 90.0})


def test_a_lower_score_may_be_better_and_a_task_may_have_none():
    task = scored(Score("perplexity", "perplexity", percent=False, higher_is_better=False))
    assert task.rank(1.0, {"perplexity": 3.0}) > task.rank(1.0, {"perplexity": 4.0})
    assert scored().rank(1.0, {}) > scored().rank(2.0, {})


def test_a_task_needs_a_line_for_tables_and_a_name_of_its_own():
    with pytest.raises(ValueError, match="summary"):
        register_task("wordless")(type(scored()))
    with pytest.raises(ValueError, match=r"unknown task 'clasification'.*Did you mean 'classification'"):
        TASKS.get("clasification")
