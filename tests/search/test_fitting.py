"""Parts that a model cannot have are told before the first trial."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from search_runs import flags, tiny_plan

from vimtune import cli
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.search.fitting import check_parts
from vimtune.search.reading import SpaceError, read_space_file
from vimtune.search.search import begin
from vimtune.tasks import Task


def problems(parts: dict[str, Any], **values: Any) -> list[str]:
    """What is said about parts that test_vim cannot have."""
    with pytest.raises(SpaceError) as caught:
        check_parts(tiny_plan(space={"parts": parts, **values}))
    return caught.value.problems


def test_every_part_that_does_not_fit_is_named_with_its_value_and_what_was_expected() -> None:
    found = problems(
        {
            "right": {"method": "lora", "targets": "in_proj", "options": {"rank": 2}},
            "nowhere": {"method": "lora", "targets": "attention"},
            "wide": {"method": "oft", "options": {"block_size": {"choose": [2, 4, 3]}}},
            "high": {"method": "dora", "options": {"rank": {"low": 1, "high": 99}}},
            "later": {"method": "c3a", "refine": {"block_size": {"low": 4, "high": 5}}},
            "call": {"method": "affix", "targets": "in_proj()"},
        }
    )
    assert len(found) == 5
    for problem, part, message in zip(
        found,
        ("nowhere", "wide (block_size 3)", "high (rank 99)", "later (block_size 5)", "call"),
        ("attention", "block_size 3 does not divide", "rank 99 does not fit", "block_size 5", "in_proj"),
        strict=True,
    ):  # fmt: skip
        assert problem.startswith(f"part {part}: ") and message in problem and "\n" not in problem
    assert "expected 1 to " in found[2]


def test_of_alternatives_each_has_to_fit_alone() -> None:
    parts = {"a": {"method": "affix"}, "b": {"method": "state_offset"}}
    assert check_parts(tiny_plan(space={"parts": parts, "combine": "one"})) == []
    parts["c"] = {"method": "lora", "targets": "nowhere"}
    assert len(problems(parts, combine="one")) == 1


def test_parts_that_cannot_be_together(tmp_path, capsys) -> None:
    parts: dict[str, Any] = {
        "tokens": {"method": "affix", "options": {"num_tokens": 2}},
        "offset": {"method": "state_offset"},
        "low": {"method": "lora"},
    }
    message = "parts tokens (num_tokens 2), offset: method 'state_offset' computes a part of"
    begin(tiny_plan(space={"parts": parts}), tmp_path / "search")
    assert f"trials with both will fail: {message}" in " ".join(capsys.readouterr().out.split())
    for part in parts.values():
        part["optional"] = False
    (found,) = problems(parts)
    assert found.startswith(message)
    del parts["tokens"]
    assert check_parts(tiny_plan(space={"parts": parts})) == []


def test_the_published_space_fits_a_vim() -> None:
    assert check_parts(tiny_plan(space=read_space_file("mambapeft"))) == []


def test_nothing_is_left_of_a_search_that_cannot_be(tmp_path, capsys) -> None:
    space = tmp_path / "space.yaml"
    given = flags(tmp_path / "search", space)
    space.write_text(yaml.safe_dump({"parts": {"a": {"method": "lora", "targets": "nowhere"}}}))
    assert cli.main(["search", *given]) == 2
    assert "error: part a: " in capsys.readouterr().err and not (tmp_path / "search").exists()


def test_a_task_that_gives_no_model_is_searched_as_before(monkeypatch) -> None:
    monkeypatch.setattr("vimtune.tasks.classification.Classification.open_base", Task.open_base)
    space = {"parts": {"a": {"method": "lora", "targets": "nowhere"}}}
    assert check_parts(tiny_plan(space=space)) == []
    assert Task.open_base(Recipe().task, Recipe(), Processes()) is None
