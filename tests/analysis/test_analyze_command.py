"""The command: run folders, adapter files and merged files, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from changed_models import FEW

import vimtune
from vimtune import cli
from vimtune.analysis.subject import open_subject
from vimtune.commands.merge import merge_to_file
from vimtune.data import build_transform, create_dataset
from vimtune.data.transforms import model_preprocessing
from vimtune.recipe import Recipe
from vimtune.training import train

SMALL = {
    "model": "test_vim",
    "pretrained": False,
    "dataset_kwargs": FEW,
    "batch_size": 6,
    "epochs": 1,
    "num_workers": 0,
    "device": "cpu",
    "backend": "torch",
    "pictures": False,
}
"""A run on few images, at whose pictures nobody looks."""
WEIGHTS = "components,transformation"
"""Analyses that need no images."""


def run(*arguments) -> int:
    return cli.main(["analyze", *map(str, arguments)])


def error(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_folder_gets_its_report(run_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    names = "components,gradient,similarity"
    assert run(folder, "--only", names, "--images", 5, "--batches", 1) == 0
    out = capsys.readouterr().out
    assert "Which parameters have moved" in out and f"report written to {folder / 'analysis.html'}" in out
    values = json.loads((folder / "analysis.json").read_text())
    assert values["facts"]["method"] == "lora" and values["facts"]["images"] == "5 of split 'test'"
    assert list(values["analyses"]) == names.split(",")
    assert values["analyses"]["similarity"]["images"] == 5
    assert values["analyses"]["gradient"]["batches"] == 1
    assert (folder / "analysis.html").read_text().startswith("<!DOCTYPE html>")


def test_the_function_gives_what_the_command_writes(run_folder, tmp_path):
    names = ["similarity", "components"]
    report = vimtune.analyze(run_folder, only=names, num_images=5)
    report.save(tmp_path / "own.json")
    assert (
        run(run_folder, "--only", "components,similarity", "--images", 5, "-o", tmp_path / "command.json")
        == 0
    )
    assert (tmp_path / "own.json").read_text() == (tmp_path / "command.json").read_text()
    assert list(report.sections) == ["components", "similarity"]
    assert "<h4>Which parameters have moved" in report._repr_html_()
    for wrong, expected in (
        ({"only": ["cka"]}, "unknown analysis 'cka'"),
        ({"split": "train"}, "expected test or val"),
        ({"num_images": 0}, "num_images = 0: expected a whole number >= 1"),
        ({"epochz": 3}, "unknown key 'epochz'"),
        ({"epochs": 3}, "unknown key 'epochs' of an analysis"),
    ):
        with pytest.raises(ValueError, match=expected):
            vimtune.analyze(run_folder, **wrong)
    with pytest.raises(ValueError, match=r"expected a name ending in .html or .json"):
        report.save(tmp_path / "report.csv")


def test_images_are_drawn_from_all_classes_and_mixed(run_folder):
    more = {**FEW, "test_per_species": 6}
    path = run_folder / "adapter.safetensors"
    values = {"dataset_kwargs": more}
    with open_subject(path, values, split="test", num_images=6, num_batches=1) as subject:
        images = torch.cat(subject.images())
        transform = build_transform("none", train=False, **model_preprocessing(subject.after))
    dataset = create_dataset("synthetic_flowers", "test", img_size=transform.img_size, **more)
    known = torch.stack([torch.as_tensor(transform(dataset.load(index))) for index in range(len(dataset))])
    distances, indices = torch.cdist(images.flatten(1), known.flatten(1)).min(1)
    assert distances.max() < 0.1 and len(set(indices.tolist())) == 6
    assert indices.tolist() != sorted(indices.tolist())
    assert len({dataset.targets[index] for index in indices}) > 1, "the first six are of one class"


def test_a_head_that_was_trained_on_features_is_analysed_on_images(tmp_path):
    folder = str(tmp_path / "run")
    train(Recipe(peft="linear", augmentation="none", output_dir=folder, **SMALL))
    assert run(folder, "--only", "gradient", "--batches", 2) == 0
    values = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert values["analyses"]["gradient"]["batches"] == 2


def test_a_base_that_differs_in_what_the_adapter_replaces_is_refused(tmp_path, capsys):
    folder, merged = tmp_path / "run", tmp_path / "merged.safetensors"
    train(Recipe(peft="bitfit", lr=0.05, output_dir=str(folder), **SMALL))
    merge_to_file(folder, merged, device="cpu", backend="torch")
    only = ("--only", "components")
    assert run(folder, *only) == 0
    assert run(folder, *only, "--checkpoint", merged) == 2
    assert "was trained on other base weights: what it replaces ('layers.0.mixer" in error(capsys)
    # What it computes is the same on either, and whoever insists is told that nothing has moved.
    assert run(folder, *only, "--checkpoint", merged, "--force") == 0
    assert cli.main(["evaluate", "--adapter", str(folder), "--checkpoint", str(merged)]) == 0


def test_a_merged_file_says_the_same_of_the_weights(run_folder, tmp_path):
    merged, wanted, found = (tmp_path / name for name in ("merged.safetensors", "run.json", "merged.json"))
    merge_to_file(run_folder, merged, device="cpu", backend="torch")
    assert run(run_folder, "--only", WEIGHTS, "-o", wanted) == 0
    # Its base is the random start of the run, which the seed repeats.
    common = (merged, "--no-pretrained", "--device", "cpu")
    assert run(*common, "--only", f"{WEIGHTS},similarity", "-o", found) == 0
    one, other = (json.loads(path.read_text()) for path in (wanted, found))
    assert other["left_out"]["similarity"].startswith("it needs images")
    for group, own in one["analyses"]["components"].items():
        assert other["analyses"]["components"][group]["relative_change"] == pytest.approx(
            own["relative_change"], rel=1e-3, abs=1e-6
        )
    data = ("--dataset", "synthetic_flowers", "--dataset-kwargs", json.dumps(FEW), "--num-workers", 0)
    assert run(*common, *data, "--only", "similarity,gradient", "--batches", 1, "-o", found) == 0
    assert list(json.loads(found.read_text())["analyses"]) == ["gradient", "similarity"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], "nothing does not exist; expected the folder of a run, or its adapter.safetensors\n"),
        (["{run}", "--images", "0"], "--images '0': expected a whole number >= 1"),
        (["{run}", "-o", "report.pdf"], "expected a name ending in .html or .json"),
        (["{run}", "--split", "train"], "--split 'train': expected test or val"),
        (["{run}", "--epochs", "3"], "unknown flag --epochs: training alone reads epochs, and it would"),
        (["{run}", "--data-dir", "."], "would not be read: the images of dataset = 'synthetic_flowers' are"),
        (["{run}", "--model", "vim_tiny_patch8_64"], "model = 'vim_tiny_patch8_64' would have no effect"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, run_folder, capsys):
    assert run(*(argument.format(run=run_folder) for argument in arguments)) == 2
    assert expected in f"{error(capsys)}\n"
    assert not (run_folder / "analysis.html").exists()


def test_help_has_the_table(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "scan_maps" in out and "{" not in out


def test_runs_on_texts_are_analysed_where_it_is_about_weights(tmp_path):
    pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")
    from text_runs import SETTINGS, write_data

    data = write_data("arc_easy", tmp_path / "data")
    recipe = Recipe(
        task="arc_easy", data_dir=str(data), output_dir=str(tmp_path / "run"), **{**SETTINGS, "lr": 0.05}
    )
    train(recipe)
    output = tmp_path / "found.json"
    assert run(tmp_path / "run", "--batches", 1, "-o", output) == 0
    values = json.loads(output.read_text())
    assert list(values["analyses"]) == ["components", "transformation", "gradient"]
    assert values["left_out"]["scan_maps"].startswith("it is about Vision Mamba")
    assert {own["projector"] for own in values["analyses"]["gradient"]["projectors"]} == {
        "in_proj",
        "out_proj",
    }
