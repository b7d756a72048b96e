"""evaluate: the scores are those of the run, for texts and for images, and every file is whole."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass

import pytest

from vimtune import cli
from vimtune.merging import merge_to_file
from vimtune.recipe import Recipe
from vimtune.tasks import Task
from vimtune.training import train
from vimtune.training.distributed import Processes

pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")

from text_runs import SETTINGS, write_data

IMAGES = {
    "dataset_kwargs": {"species": 3, "train_per_species": 4, "val_per_species": 2, "test_per_species": 2},
    "model": "test_vim",
    "pretrained": False,
    "num_workers": 0,
    "epochs": 1,
    "device": "cpu",
    "backend": "torch",
}
"""Keys of the recipe of a run on a few images."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with texts, and the report of a run on them."""
    folder = tmp_path_factory.mktemp("texts")
    data = write_data("arc_easy", folder / "data")
    recipe = Recipe(
        task="arc_easy", data_dir=str(data), output_dir=str(folder / "run"), **{**SETTINGS, "lr": 0.05}
    )
    return folder, train(recipe)


def run(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def error(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_scores_are_those_of_the_run(texts, tmp_path, capsys):
    folder, report = texts
    json_file, csv_file = tmp_path / "scores.json", tmp_path / "scores.csv"
    assert run("--adapter", folder / "run", "-o", json_file, "-o", csv_file) == 0
    found = json.loads(json_file.read_text())
    assert {name: found[name] for name in ("acc", "acc_norm")} == report.scores
    assert found["loss"] == pytest.approx(report.loss) and found["count"] == report.num_examples == 2
    assert len(found["examples"]) == 2 and len(found["examples"][0]["log_likelihoods"]) == 3
    (row,) = csv.DictReader(csv_file.open(newline=""))
    assert float(row["acc"]) == report.scores["acc"] and row["adapter"].endswith("adapter.safetensors")
    assert run("--adapter", folder / "run", "--split", "val", "-o", json_file) == 0
    found = json.loads(json_file.read_text())
    assert found["split"] == "val" and found["acc"] == report.best_scores["acc"]
    capsys.readouterr()
    assert run("--adapter", folder / "run") == 0
    assert "accuracy (test)" in capsys.readouterr().out


def test_a_file_that_is_passed_on_needs_its_data_named(texts, tmp_path, capsys):
    folder, report = texts
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / "run" / "adapter.safetensors").read_bytes())
    output = tmp_path / "scores.json"
    assert run("--adapter", alone, "--no-download", "-o", output) == 2
    assert "give a folder with" in error(capsys) and not output.exists()
    assert run("--adapter", alone, "--data-dir", folder / "data", "-o", output) == 0
    assert json.loads(output.read_text())["loss"] == pytest.approx(report.loss)


def test_without_an_adapter_the_model_itself_is_scored(texts, tmp_path):
    folder, report = texts
    output = tmp_path / "scores.json"
    data = ("--task", "arc_easy", "--data-dir", folder / "data")
    assert run(*data, "--model", "mamba_tiny", "--device", "cpu", "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["adapter"] is None and found["count"] == 2 and found["loss"] != pytest.approx(report.loss)


@pytest.mark.parametrize("task", ["piqa", "boolq", "text"])
def test_classification_heads_are_scored_as_in_the_run(task, tmp_path):
    data = write_data(task, tmp_path / "data")
    values = {**SETTINGS, "task": task, "data_dir": str(data), "head": "classifier"}
    report = train(Recipe(**values, output_dir=str(tmp_path / "run")))
    output = tmp_path / "scores.json"
    assert run("--adapter", tmp_path / "run", "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["acc"] == report.scores["acc"] and found["loss"] == pytest.approx(report.loss)


def test_images_are_scored_with_and_without_an_adapter(tmp_path, capsys):
    report = train(Recipe(**IMAGES, output_dir=str(tmp_path / "run")))
    output = tmp_path / "scores.json"
    assert run("--adapter", tmp_path / "run", "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["top1"] == report.top1 and found["count"] == report.num_images
    assert found["loss"] == pytest.approx(report.loss)
    few = json.dumps(IMAGES["dataset_kwargs"])
    values = ("--dataset-kwargs", few, "--model", "test_vim", "--no-pretrained", "--num-workers", 0)
    assert run(*values, "-o", output) == 0
    assert json.loads(output.read_text())["adapter"] is None
    # A merged file is taken like the adapter, as predict takes it; it does not say which data were its own.
    merged = tmp_path / "merged.safetensors"
    merge_to_file(tmp_path / "run", merged, device="cpu", backend="torch")
    data = ("--dataset", "synthetic_flowers", "--dataset-kwargs", few, "--num-workers", 0)
    assert run("--adapter", merged, *data, "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["top1"] == report.top1 and found["loss"] == pytest.approx(report.loss, rel=1e-4)
    assert found["model"] == "test_vim" and found["adapter"] == str(merged)
    assert run("--adapter", merged) == 2 and "name them with --dataset" in error(capsys)
    assert run("--adapter", merged, *data, "--checkpoint", merged) == 2
    assert "drop --checkpoint" in error(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--split", "train"], "--split 'train': expected test or val"),
        (["-o", "scores.txt"], "expected a name ending in .csv or .json"),
        (["--adapter", "{run}", "--config", "x.yaml"], "an adapter has a recipe of its own"),
        (["--adapter", "nothing"], "nothing"),
        (["--adapter", "{run}", "-o", "{run}/adapter.json/x.json"], "is not a writable folder"),
        (["--task", "arc_easy", "--head", "classifier"], "give its file with --adapter"),
        (["--adapter", "{run}", "--model", "mamba2_tiny"], "adapter"),
        (["--adapter", "{run}", "--seed", "5"], "other base weights than this model has"),
        (["--adapter", "{run}", "--lr", "1"], "unknown flag --lr"),
        (["--taks", "arc_easy"], "Did you mean '--task'"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, texts, capsys):
    folder, _ = texts
    assert run(*(argument.format(run=folder / "run") for argument in arguments)) == 2
    assert expected in error(capsys)


def test_a_task_may_only_train():
    @dataclass(frozen=True, kw_only=True)
    class Closed(Task):
        """A task that only trains."""

        name = "closed"

        def open(self, recipe, processes):
            raise NotImplementedError

    with pytest.raises(ValueError, match="task 'closed' has no evaluation apart from training"):
        Closed().open_trial(Recipe(), Processes(), "test", None, force=False)
    with pytest.raises(ValueError, match="task 'closed' has no answers to single inputs"):
        Closed().read_inputs(["x"], [])
