"""A user's own validation file selects the best epoch; without a test file it is what is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from text_files import write_lines
from text_runs import LABELLED, SETTINGS, write_data

import vimtune
from vimtune.adapters import read_adapter_info
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.training import train

pytestmark = pytest.mark.usefixtures("no_pictures")

COLD = {"text": "cold", "label": "winter"}


def splits(folder: Path, **changes: Any) -> dict[str, tuple[int, str]]:
    """Number and source of the texts of each split that a run opens."""
    values = {**SETTINGS, "task": "text", "data_dir": str(folder), **changes}
    recipe = Recipe(**values)
    job = recipe.task.open(recipe, Processes())
    return {loader.split: (loader.num_examples, loader.source) for loader in job.loaders}


@pytest.mark.parametrize("name", ["val.jsonl", "valid.jsonl", "validation.jsonl", "dev.jsonl"])
def test_an_own_validation_file_selects_in_place_of_a_share(name: str, tmp_path: Path) -> None:
    folder = write_data("text", tmp_path)
    write_lines(folder / name, [LABELLED, COLD, COLD, COLD])
    found = splits(folder)
    assert {split: count for split, (count, _) in found.items()} == {"train": 12, "val": 4, "test": 2}
    assert name in found["val"][1] and found["val"][1].endswith(
        "(a file of its own, so val_share has no effect)"
    )
    (folder / "test.jsonl").unlink()
    found = splits(folder)
    assert {split: count for split, (count, _) in found.items()} == {"train": 12, "val": 4}


def test_a_validation_file_by_its_name_and_what_is_drawn_of_it(tmp_path: Path) -> None:
    folder = write_data("text", tmp_path)
    other = write_lines(tmp_path / "other.jsonl", [LABELLED, COLD, COLD, COLD])
    found = splits(folder, val_file=str(other), train_size=10)
    assert {split: count for split, (count, _) in found.items()} == {"train": 8, "val": 2, "test": 2}
    assert splits(folder, val_file=str(other), limit=3)["val"][0] == 3
    # Official data sets take one by its name alone.
    arc = write_data("arc_easy", tmp_path / "arc")
    assert splits(arc, task="arc_easy", val_file=str(arc / "ARC-Easy-test.jsonl"))["val"][0] == 2
    with pytest.raises(ValueError, match=r"val_file = .*none\.jsonl' is not a file"):
        Recipe(task="text", val_file=str(tmp_path / "none.jsonl")).check_paths()


def test_a_run_scores_its_validation_file_where_there_is_no_test_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("id,sentence,sentiment\n" + "1,warm,good\n2,cold,bad\n" * 6)
    (data / "val.csv").write_text("id,sentence,sentiment\n1,warm,good\n2,cold,bad\n")
    report = train(Recipe(**SETTINGS, task="text", data_dir=str(data), output_dir=str(tmp_path / "run")))
    assert (report.split, report.selection_split, report.num_examples) == ("val", "val", 2)
    assert "2 labels in column 'sentiment'; columns not used: 'id'" in report.data["train"]
    found = vimtune.evaluate(tmp_path / "run", split="val", device="cpu")
    assert found.evaluation.count == 2 and found.scores["acc"] == report.scores["acc"]


def test_columns_of_a_run_are_those_of_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("remark,mood\n" + "warm,good\ncold,bad\n" * 6)
    recipe = Recipe(
        **SETTINGS,
        task="text",
        train_file=str(tmp_path / "train.csv"),
        text_column="remark",
        label_column="mood",
        output_dir=str(tmp_path / "run"),
    )
    train(recipe)
    adapter = tmp_path / "run" / "adapter.safetensors"
    assert read_adapter_info(adapter).classes == ["bad", "good"]
    (answer,) = vimtune.load_predictor(adapter, device="cpu").predict([{"remark": "warm", "text": "x"}])
    assert answer.input == "warm" and set(answer.classes) == {"bad", "good"}
    assert vimtune.evaluate(tmp_path / "run", split="val", device="cpu").evaluation.count == 3
    with pytest.raises(ValueError, match="text_column = 'remark' is an option of task text"):
        Recipe(task="arc_easy", text_column="remark")


def test_an_adapter_of_own_texts_is_scored_on_another_task(tmp_path: Path) -> None:
    """Which has no columns to be named."""
    write_lines(tmp_path / "train.jsonl", [{"remark": "cold and wet"}] * 4)
    train(
        Recipe(
            **SETTINGS,
            task="text",
            train_file=str(tmp_path / "train.jsonl"),
            text_column="remark",
            output_dir=str(tmp_path / "run"),
        )
    )
    arc = write_data("arc_easy", tmp_path / "arc")
    found = vimtune.evaluate(
        tmp_path / "run", task="arc_easy", data_dir=str(arc), train_file=None, device="cpu"
    )
    assert found.evaluation.count == 2
