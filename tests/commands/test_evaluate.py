"""evaluate: the scores are those of the run, for texts and for images, and every file is whole."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from quick_runs import NO_PICTURES, replace_until_undone
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_files import ARC, write_lines
from text_runs import LINES, SETTINGS, write_data
from torch import nn

import vimtune
from vimtune import cli
from vimtune.commands.merge import merge_to_file
from vimtune.data import create_dataset
from vimtune.models.merged import read_merged_info
from vimtune.models.weights import weights_of
from vimtune.recipe import Recipe
from vimtune.runtime.distributed import Processes
from vimtune.tasks import TASKS, EvaluateOptions, Task
from vimtune.tasks.images.trial import WithFlips
from vimtune.training import train

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


def require_transformers():
    pytest.importorskip("transformers", minversion="5.21", reason="no transformers 5.21")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with texts, and the report of a run on them."""
    require_transformers()
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


def test_texts_have_mistakes_too(texts, tmp_path):
    folder, report = texts
    wrong, page = tmp_path / "mistakes.csv", tmp_path / "page.html"
    assert run("--adapter", folder / "run", "--mistakes", wrong, "-o", page) == 0
    rows = list(csv.DictReader(wrong.open(newline="")))
    assert len(rows) == round(2 * (1 - report.scores["acc"] / 100))
    assert all(row["true"] != row["predicted"] and float(row["margin"]) >= 0 for row in rows)
    assert "The worst mistakes" in page.read_text()


def test_texts_that_were_trained_on_are_told(texts, tmp_path, caplog):
    """The test file of these runs repeats what stands in their training file."""
    run_folder, page = texts[0] / "run", tmp_path / "page.html"
    told = "All 2 texts were trained on by this run: their scores say little about new texts."
    assert run("--adapter", run_folder, "-o", page) == 0
    assert told in caplog.text and told in page.read_text() and notes(run_folder) == [told]
    new = tmp_path / "new.jsonl"
    write_lines(new, [{**ARC, "question": "What is wide and blue?"}, ARC, {**ARC, "answerKey": "A"}])
    (some,) = notes(run_folder, test_file=str(new))
    assert some.startswith("2 of the 3 texts were trained on")  # Whichever of its answers is right.
    write_lines(new, [{**ARC, "question": "What is wide and blue?"}])
    assert notes(run_folder, test_file=str(new)) == []
    model = {"task": "arc_easy", "model": "mamba_tiny", "device": "cpu", "data_dir": str(texts[0] / "data")}
    assert notes(None, **model) == []


def test_texts_that_were_trained_on_make_no_temperature(heads):
    run_folder = heads / "run-text"
    assert "fitted to the 3 texts of 'val'" in origin(run_folder)[1]
    redrawn = [origin(run_folder, data_seed=seed) for seed in range(1, 9)]
    assert (None, "the texts of 'val' were trained on") in redrawn
    assert any("without 2 of them that were trained on" in text for _, text in redrawn)


def test_plain_texts_that_were_trained_on_are_told(tmp_path):
    require_transformers()
    data = tmp_path / "data"
    data.mkdir()
    lines = [{"prompt": f"The number {number} is", "completion": " one"} for number in range(9)]
    write_lines(data / "train.jsonl", lines[:8])
    write_lines(data / "test.jsonl", lines[8:])
    run_folder = tmp_path / "run"
    train(Recipe(**SETTINGS, task="text", data_dir=str(data), output_dir=str(run_folder)))
    assert notes(run_folder) == notes(run_folder, split="val") == []
    (told,) = notes(run_folder, test_file=str(data / "train.jsonl"))
    assert told.startswith("6 of the 8 texts were trained on by this run")
    (data / "train.jsonl").unlink()
    assert notes(run_folder) == []  # Nobody knows.


def test_without_an_adapter_the_model_itself_is_scored(texts, tmp_path):
    folder, report = texts
    output = tmp_path / "scores.json"
    data = ("--task", "arc_easy", "--data-dir", folder / "data")
    assert run(*data, "--model", "mamba_tiny", "--device", "cpu", "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["adapter"] is None and found["count"] == 2 and found["loss"] != pytest.approx(report.loss)


def write_different(task, folder):
    """The files of `write_data`, of which no two training texts are alike."""
    folder = write_data(task, folder)
    varied = {"piqa": "goal", "boolq": "passage", "text": "text"}[task]
    lines = [
        {**line, varied: f"{line[varied]} {number}"} for number, line in enumerate((LINES[task] * 6)[:12])
    ]
    write_lines(folder / TASKS.get(task).form.files["train"][0], lines)
    return folder


@pytest.mark.parametrize("task", ["piqa", "boolq", "text"])
def test_classification_heads_are_scored_as_in_the_run(task, tmp_path):
    require_transformers()
    data = write_different(task, tmp_path / "data")
    values = {**SETTINGS, "task": task, "data_dir": str(data), "head": "classifier"}
    report = train(Recipe(**values, output_dir=str(tmp_path / "run")))
    output = tmp_path / "scores.json"
    assert run("--adapter", tmp_path / "run", "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["acc"] == report.scores["acc"] and found["loss"] == pytest.approx(report.loss)
    # Texts that have the same classes are scored like images, others have their mistakes alone.
    assert ("classes" in found) == (task != "piqa")
    if task != "piqa":
        origin = found["temperature_origin"]  # All answers to three texts may be right.
        assert ("fitted to the" if found["temperature"] else "are all but right") in origin
        assert found["macro_f1"] is not None
        page = (tmp_path / "run" / "report.html").read_text()
        assert "accuracy is " in page and "op-1" not in page.partition("data:image")[0]
        assert "The confusion matrix." in (tmp_path / "run" / "report.html").read_text()


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A folder with the data of three tasks, and with runs with classification heads on two of them."""
    require_transformers()
    folder = tmp_path_factory.mktemp("heads")
    for task in ("piqa", "boolq", "text"):
        data = write_different(task, folder / task)
        if task != "boolq":
            values = {**SETTINGS, "task": task, "data_dir": str(data), "head": "classifier"}
            train(Recipe(**values, pictures=False, output_dir=str(folder / f"run-{task}")))
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("run-text --task boolq --data-dir boolq", "head for ['summer', 'winter'], and BoolQ"),
        ("run-text --task boolq --data-dir boolq", "needs one of ['no', 'yes']"),
        ("run-text --task piqa --data-dir piqa", "needs one that rates choices"),
        ("run-piqa --task text --data-dir text", "has a head that rates choices"),
        ("run-text --head likelihood", "a head of 2 outputs, and the model has none"),
    ],
)
def test_heads_answer_no_other_questions_than_their_own(arguments, expected, heads, monkeypatch, capsys):
    monkeypatch.chdir(heads)
    assert run("--adapter", *arguments.split(), "--device", "cpu") == 2
    found = error(capsys)
    assert expected in found and "--force" not in found


def test_an_adapter_without_a_head_has_no_classifier(texts, capsys):
    assert run("--adapter", texts[0] / "run", "--head", "classifier") == 2
    assert "it has no head, and the model has one" in error(capsys)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The folder and the report of a run on images."""
    folder = tmp_path_factory.mktemp("images") / "run"
    with pytest.MonkeyPatch.context() as patch:
        replace_until_undone(NO_PICTURES, patch)
        return folder, train(Recipe(**IMAGES, output_dir=str(folder)))


@pytest.fixture
def photos(tmp_path):
    """The test images of that run in folders of their classes, one of which the run does not know."""
    dataset = create_dataset("synthetic_flowers", "test", img_size=(32, 32), **IMAGES["dataset_kwargs"])
    for index in range(len(dataset)):
        name = dataset.classes[dataset.label(index)] if dataset.label(index) else "unknown"
        path = tmp_path / "photos" / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.load(index).save(path)
    return tmp_path / "photos"


def test_everything_about_images_is_written(images, tmp_path, no_pictures, capsys):
    folder, report = images
    outputs = [tmp_path / f"scores{suffix}" for suffix in (".json", ".html", ".csv")]
    wrong = tmp_path / "mistakes.csv"
    flags = [flag for output in outputs for flag in ("-o", output)]
    assert run("--adapter", folder, *flags, "--mistakes", wrong) == 0
    found = json.loads(outputs[0].read_text())
    assert found["top1"] == report.top1 and found["count"] == report.num_images
    assert found["loss"] == pytest.approx(report.loss)
    assert (found["macro_f1"], found["ece"]) == (report.macro_f1, pytest.approx(report.ece))
    assert [own["class"] for own in found["classes"]] == list(report.per_class)
    assert [own["recall"] for own in found["classes"]] == list(report.per_class.values())
    assert found["temperature"] > 0
    assert found["temperature_origin"].startswith("fitted to the 6 images of 'val'")
    assert found["calibrated_loss"] is not None
    (row,) = csv.DictReader(outputs[2].open(newline=""))
    assert float(row["macro_f1"]) == pytest.approx(report.macro_f1)
    mistakes = list(csv.DictReader(wrong.open(newline="")))
    assert len(mistakes) == round(report.num_images * (1 - report.top1 / 100)) > 0
    losses = [float(each["loss"]) for each in mistakes]
    assert losses == sorted(losses, reverse=True) and all(x["true"] != x["predicted"] for x in mistakes)
    page = outputs[1].read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count("data:image/jpeg") == len(mistakes)
    own = (folder / "report.html").read_text()
    assert own.count("data:image/jpeg") == len(mistakes) and f"{found['temperature']:.3f}, fitted" in own
    assert "macro F1 (test)" in capsys.readouterr().out


def test_the_function_says_what_the_command_does(images, photos, tmp_path, no_pictures, capsys):
    folder, report = images
    found = vimtune.evaluate(folder)
    assert found.scores["top1"] == report.top1 and found.scores["count"] == report.num_images
    assert capsys.readouterr().out == ""
    saved = tmp_path / "scores.json"
    found.save(saved)
    assert run("--adapter", folder, "-o", tmp_path / "command.json") == 0
    assert saved.read_text() == (tmp_path / "command.json").read_text()
    assert [row["class"] for row in found.numbers["classes"]] == list(report.per_class)
    wrong = found.mistakes()
    assert len(wrong) == round(report.num_images * (1 - report.top1 / 100))
    assert list(found.sections) == ["scores", "mistakes", "confusions", "classes", "calibration"]
    assert [photo.title for photo in found.sections["mistakes"].photos] == [row["path"] for row in wrong]
    assert f"<td>{report.top1:.2f} %</td>" in found._repr_html_()
    mirrored = vimtune.evaluate(str(folder), folder=str(photos), flip=True, device="cpu")
    assert mirrored.facts["flip"] is True and mirrored.facts["split"] == "folder"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"split": "train"}, "expected test or val"),
        ({"flipp": True}, "unknown key 'flipp'"),
        ({"flip": 3}, "flip = 3"),
        ({"mixup": 0.2}, "unknown key 'mixup' of an evaluation: training alone reads mixup, and 0.2 would"),
        ({"lr": 1}, "unknown key 'lr' of an evaluation"),
        ({"peft": "lora"}, "unknown key 'peft' of an evaluation"),
        ({"shots": 2}, "unknown key 'shots' of an evaluation: training alone reads shots, and 2 would"),
        ({"shots": 2, "folder": "x"}, "unknown key 'shots' of an evaluation"),
        ({"test": False}, "unknown key 'test' of an evaluation"),
        ({"folder": "x", "split": "val"}, "all images of the folder are scored"),
        ({"config": "x.yaml"}, "an adapter has a recipe of its own"),
        ({"data_dir": "."}, "would not be read: the images of dataset = 'synthetic_flowers' are generated"),
    ],
)
def test_the_function_refuses_what_the_command_refuses(keys, expected, images):
    with pytest.raises(ValueError, match=expected):
        vimtune.evaluate(images[0], **keys)


FOR_TRAINING = [
    "augmentation",
    "transforms",
    "mixup",
    "cutmix",
    "class-weights",
    "label-smoothing",
    "teacher",
    "teacher-targets",
    "teacher-weight",
    "teacher-temperature",
    "balanced",
    "shots",
    "drop-path",
    "no-test",
    "eval-split",
    "cache",
    "epochs",
    "opt",
    "compile",
    "output-dir",
    "resume",
    "peft",
]
"""Flags of `vimtune train` that change no scores of a model that is there."""


def key_of(flag):
    return flag.removeprefix("no-").replace("-", "_")


def test_flags_that_change_no_scores_are_not_offered(capsys):
    """Whoever gave one would take the scores for what it makes of them."""
    assert cli.main(["evaluate", "--help"]) == 0
    offered = capsys.readouterr().out
    for name in FOR_TRAINING:
        assert f"--{name} " not in offered and f"--[no-]{name.removeprefix('no-')}" not in offered
        assert run(f"--{name}", "1") == 2
        assert f"unknown flag --{name}: training alone reads {key_of(name)}, and it would" in error(capsys)
    for name in ("train-size", "folds", "data-seed", "head", "seed", "amp", "[no-]deterministic"):
        assert f"--{name} " in offered


def test_what_training_alone_read_may_be_gone(tmp_path, no_pictures):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    train(Recipe(**IMAGES, output_dir=str(teacher)))
    first = {"init_adapter": str(teacher), "peft": "prodial"}
    report = train(Recipe(**IMAGES, **first, teacher=str(teacher), output_dir=str(student)))
    shutil.rmtree(teacher)
    assert vimtune.evaluate(student).scores["top1"] == report.top1


def test_results_go_into_files_of_known_kinds(images, tmp_path):
    found = vimtune.evaluate(images[0])
    with pytest.raises(ValueError, match=r"expected a name ending in .csv or .html or .json"):
        found.save(tmp_path / "scores.txt")


def test_a_temperature_for_the_validation_split_says_so(images, tmp_path):
    output = tmp_path / "scores.json"
    assert run("--adapter", images[0], "--split", "val", "-o", output) == 0
    assert "which are the ones that are scored here" in json.loads(output.read_text())["temperature_origin"]
    assert run("--adapter", images[0], "--no-calibrate", "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["temperature"] is None and found["temperature_origin"] == "none was asked for"
    assert run("--adapter", images[0], "--train-split", "train+val", "-o", output) == 0
    assert "were trained on" in json.loads(output.read_text())["temperature_origin"]


def test_paths_of_mistakes_are_those_of_predictions_and_lead_to_files(images, photos, tmp_path):
    for photo in [*photos.glob("*/*.png")]:
        photo.rename(photo.with_name(f"new\nline \r {photo.name}"))
    wrong, answers = tmp_path / "mistakes.csv", tmp_path / "answers.csv"
    assert run("--adapter", images[0], "--folder", photos, "--mistakes", wrong) == 0
    assert cli.main(["predict", str(photos), "--adapter", str(images[0]), "-o", str(answers)]) == 0
    tables = [list(csv.DictReader(path.open(newline=""))) for path in (wrong, answers)]
    mistakes, predicted = ({row["path"] for row in rows} for rows in tables)
    assert mistakes and mistakes <= predicted and all(Path(path).is_file() for path in mistakes)


def test_a_folder_is_scored_by_the_names_of_its_classes(images, photos, tmp_path, caplog):
    folder, report = images
    (next(photos.glob("coral*")) / "bad.png").write_bytes(b"no image")
    output, wrong = tmp_path / "scores.json", tmp_path / "mistakes.csv"
    assert (
        run(
            "--adapter", folder, "--folder", photos, "--on-corrupt", "skip", "-o", output, "--mistakes", wrong
        )
        == 0
    )
    found = json.loads(output.read_text())
    first, *others = report.per_class
    assert found["split"] == "folder" and found["count"] == 4
    recalls = {own["class"]: own["recall"] for own in found["classes"]}
    assert recalls == {first: None, **{name: report.per_class[name] for name in others}}
    assert found["notes"] == [
        "Left out: 2 images of classes that the model does not know ('unknown').",
        f"The data have no class '{first}', which the model knows.",
        "Left out because they cannot be decoded: 1 of 5 images.",
    ]
    assert all(note in caplog.text for note in found["notes"][:2])
    assert found["temperature_origin"].startswith("fitted to the 6 images of 'val'")
    for row in csv.DictReader(wrong.open(newline="")):
        assert Path(row["path"]).parent.name == row["true"]


def test_an_image_that_cannot_be_decoded_is_not_told_of_runs(images, photos, capsys):
    """An evaluation is no run that could be continued or begun anew."""
    (next(photos.glob("coral*")) / "bad.png").write_bytes(b"no image")
    assert run("--adapter", images[0], "--folder", photos) == 2
    text = error(capsys)
    assert "cannot decode image" in text and "bad.png: no image of a known format" in text
    assert text.endswith("Leave such images out with --on-corrupt skip, or replace or remove the file")


def test_a_merged_file_has_classes_of_its_own(images, photos, tmp_path, capsys):
    """In whatever order: they are matched by name."""
    merged, output = tmp_path / "merged.safetensors", tmp_path / "scores.json"
    assert cli.main(["merge", str(images[0]), "-o", str(merged)]) == 0
    model = ("--model", "test_vim", "--checkpoint", merged)
    assert run(*model, "--folder", photos, "--device", "cpu", "-o", output) == 0
    found = json.loads(output.read_text())
    recalls = {own["class"]: own["recall"] for own in found["classes"]}
    known = {name: value for name, value in images[1].per_class.items() if recalls[name] is not None}
    assert {name: recalls[name] for name in known} == known and len(known) == 2
    capsys.readouterr()
    assert run(*model[2:], "--folder", photos, "-o", output) == 2
    default = Recipe().backbone.model
    assert f"holds a test_vim, and the model is {default!r}: add --model test_vim" in error(capsys)


@pytest.fixture(scope="module")
def own_photos(tmp_path_factory):
    """A folder with a run on photos of a folder; 15 are in train, 3 in val, 6 in test."""
    place = tmp_path_factory.mktemp("own")
    for name in ("cat", "dog", "owl"):
        (place / "photos" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (8, 8), (30 * number, 9, 9)).save(place / "photos" / name / f"{number}.png")
    keys = {name: value for name, value in IMAGES.items() if name != "dataset_kwargs"}
    data = {"dataset": "folder", "data_dir": str(place / "photos")}
    with pytest.MonkeyPatch.context() as patch:
        replace_until_undone(NO_PICTURES, patch)
        train(Recipe(**keys, **data, output_dir=str(place / "run")))
    return place


def notes(trained, **keys):
    return vimtune.evaluate(trained, **keys).numbers["notes"]


def test_photos_that_were_trained_on_are_told(own_photos, tmp_path, monkeypatch, capsys, caplog, no_pictures):
    """Their scores are better than those of new photos will be."""
    run_folder, photos = own_photos / "run", own_photos / "photos"
    parts = {part: vimtune.evaluate(run_folder, split=part).scores["count"] for part in ("val", "test")}
    trained = 24 - sum(parts.values())
    told = (
        f"{trained} of the 24 images were trained on by this run: their scores say little about new images."
    )
    monkeypatch.chdir(own_photos)  # The same files by another path.
    assert run("--adapter", run_folder, "--folder", "photos", "-o", tmp_path / "page.html") == 0
    assert told in caplog.text and told in (tmp_path / "page.html").read_text()
    (tmp_path / "linked").symlink_to(photos)
    assert notes(run_folder, folder=str(tmp_path / "linked")) == [told]
    # Drawn otherwise, some of the photos to train on are those that are scored.
    (other,) = notes(run_folder, data_seed=1)
    assert "images were trained on by this run" in other
    assert notes(run_folder, train_split="train+val", split="val") == []  # What the run did is what counts.


def origin(trained, **keys):
    """Where the temperature comes from, beside it."""
    numbers = vimtune.evaluate(trained, **keys).numbers
    return numbers["temperature"], numbers["temperature_origin"]


def test_photos_that_were_trained_on_make_no_temperature(own_photos, no_pictures):
    """Their answers are surer than those to new photos, and probabilities would stay too high."""
    run_folder = own_photos / "run"
    assert origin(run_folder)[1] == "fitted to the 3 images of 'val'"
    redrawn = [origin(run_folder, data_seed=seed) for seed in range(1, 6)]
    some = [text for _, text in redrawn if "the 1 image of 'val'" in text]
    assert some and all("; without 2 of them that were trained on" in text for text in some)
    assert (None, "the images of 'val' were trained on") in redrawn
    scored_too = [origin(run_folder, data_seed=seed, split="val") for seed in range(1, 13)]
    told = "of 'val', a part of those that are scored here: expect a little less of others; without"
    assert any(value is not None and told in text for value, text in scored_too)


def test_photos_that_nobody_knows_to_be_trained_on_are_not_told(own_photos, tmp_path, images, photos):
    run_folder = own_photos / "run"
    assert notes(run_folder) == notes(run_folder, split="val") == []
    copies = tmp_path / "copies"
    shutil.copytree(own_photos / "photos", copies)
    assert notes(run_folder, folder=str(copies)) == []
    alone = tmp_path / "alone.safetensors"
    shutil.copyfile(run_folder / "adapter.safetensors", alone)
    own = str(own_photos / "photos")
    assert notes(alone, folder=own) == []  # It does not say where its photos were.
    assert not any("trained on" in note for note in notes(images[0], folder=str(photos)))


def test_a_folder_is_scored_by_an_adapter_that_does_not_say_where_its_photos_were(own_photos, tmp_path):
    alone = tmp_path / "alone.safetensors"
    shutil.copyfile(own_photos / "run" / "adapter.safetensors", alone)
    photos = str(own_photos / "photos")
    found, of_run = (vimtune.evaluate(path, folder=photos) for path in (alone, own_photos / "run"))
    assert found.scores["count"] == 24 and found.scores["top1"] == of_run.scores["top1"]
    assert found.scores["temperature"] is None  # There is no validation split at hand.
    named = vimtune.evaluate(alone, folder=photos, data_dir=photos)
    assert named.scores["temperature"] == of_run.scores["temperature"] is not None
    with pytest.raises(ValueError, match="needs data_dir: the folder of your images"):
        vimtune.evaluate(alone)


def test_where_there_is_no_test_split_another_one_is_named(own_photos, tmp_path, no_pictures):
    names = sorted(path.relative_to(own_photos / "photos") for path in (own_photos / "photos").rglob("*.png"))
    lines = [f"{name.as_posix()},{name.parts[0]},{'val' if name.stem == '7' else 'train'}" for name in names]
    data = tmp_path / "data"
    shutil.copytree(own_photos / "photos", data)
    (data / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    keys = {**IMAGES, "dataset": "csv", "data_dir": str(data), "dataset_kwargs": {}}
    train(Recipe(**keys, output_dir=str(tmp_path / "run")))
    told = "has no test images: no row is one of test. To score the validation split instead: --split val"
    with pytest.raises(ValueError, match=told):
        vimtune.evaluate(tmp_path / "run")
    assert vimtune.evaluate(tmp_path / "run", split="val").scores["count"] == 3


def test_own_texts_without_a_test_file_have_a_validation_split(tmp_path):
    require_transformers()
    data = write_different("text", tmp_path / "data")
    (data / TASKS.get("text").form.files["test"][0]).unlink()
    train(Recipe(**SETTINGS, task="text", data_dir=str(data), output_dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"no file of the split 'test'.*: --split val$"):
        vimtune.evaluate(tmp_path / "run")
    assert vimtune.evaluate(tmp_path / "run", split="val").scores["count"] == 3


def test_a_split_that_the_run_took_to_train_on_is_told(tmp_path, no_pictures):
    train(Recipe(**IMAGES, train_split="train+val", output_dir=str(tmp_path / "run")))
    assert notes(tmp_path / "run") == []
    (told,) = notes(tmp_path / "run", split="val")
    assert told.startswith("All 6 images were trained on by this run")


def test_a_table_of_no_mistakes_has_its_columns(images, tmp_path, monkeypatch):
    """A program that reads the tables of several models expects the same columns of the best one, too."""
    few, all_right = tmp_path / "few.csv", tmp_path / "all_right.csv"
    assert run("--adapter", images[0], "--mistakes", few) == 0
    monkeypatch.setattr("vimtune.tasks.classes.details.ClassDetails.wrong", [])
    assert run("--adapter", images[0], "--mistakes", all_right) == 0
    (header,) = all_right.read_text().splitlines()
    assert (
        header
        == few.read_text().splitlines()[0]
        == ("path,true,predicted,probability,true_probability,loss,true_rank")
    )


def test_mirrored_images_count_alike(images, photos, tmp_path):
    output = tmp_path / "scores.json"
    assert run("--adapter", images[0], "--folder", photos, "--flip", "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["flip"] is True and found["folder"] == str(photos)


def test_a_folder_is_limited_by_what_the_command_says_and_not_by_the_run(images, photos, tmp_path):
    limited = tmp_path / "run"
    shutil.copytree(images[0], limited)
    recipe = yaml.safe_load((limited / "recipe.yaml").read_text())
    (limited / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "limit": 2}))
    assert vimtune.evaluate(limited, calibrate=False).scores["count"] == 2
    assert vimtune.evaluate(limited, calibrate=False, folder=str(photos)).scores["count"] == 4
    found = vimtune.evaluate(images[0], folder=str(photos), limit=3)
    assert found.scores["count"] < 4 and "for limit 3" in found.facts["data"]
    assert found.numbers["temperature_origin"].startswith("fitted to the 6 images of 'val'")


def test_scores_and_mistakes_are_two_files(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--adapter", images[0], "-o", "all.csv", "--mistakes", tmp_path / "all.csv") == 2
    assert "choose another file" in error(capsys) and not any(tmp_path.glob("*.csv"))


def test_logits_of_mirrored_images_are_of_the_mean_of_both():
    class Rows(nn.Module):
        """Takes the first row of an image for its logits."""

        def forward(self, images):
            return images[:, 0, 0]

    inputs = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    outputs = WithFlips(Rows())(inputs)
    both = (inputs[:, 0, 0].softmax(1) + inputs[:, 0, 0].flip(1).softmax(1)) / 2
    assert torch.allclose(outputs.softmax(1), both, atol=1e-6)
    assert torch.allclose(outputs, WithFlips(Rows())(inputs.flip(-1)))


def test_images_are_scored_without_an_adapter(tmp_path):
    output = tmp_path / "scores.json"
    few = json.dumps(IMAGES["dataset_kwargs"])
    values = ("--dataset-kwargs", few, "--model", "test_vim", "--no-pretrained", "--num-workers", 0)
    assert run(*values, "-o", output) == 0
    assert json.loads(output.read_text())["adapter"] is None


def test_weights_without_a_head_for_the_classes_are_not_scored(tmp_path, capsys, caplog):
    """Their answers would be those of a random head. A head of as many classes is used in their order, as is
    said."""
    few, base, page = (
        json.dumps(IMAGES["dataset_kwargs"]),
        tmp_path / "base.safetensors",
        tmp_path / "page.html",
    )
    save_file(timm.create_model("test_vim", num_classes=7).state_dict(), base)
    values = ("--dataset-kwargs", few, "--model", "test_vim", "--num-workers", 0, "--device", "cpu")
    assert run(*values, "--checkpoint", base) == 2
    assert "base.safetensors has no head for the 3 classes of the images" in error(capsys)
    save_file(timm.create_model("test_vim", num_classes=3).state_dict(), base)
    assert run(*values, "--checkpoint", base, "-o", page) == 0
    told = "no names of classes, so that their outputs are taken for the classes of the images in the order"
    assert told in caplog.text and told in page.read_text()
    assert run("--dataset-kwargs", few, "--num-workers", 0, "--device", "cpu") == 2
    assert f"{Recipe().backbone.model} has no head for the 3 classes" in error(capsys)


def test_published_weights_know_the_names_of_their_classes(tmp_path, capsys, caplog):
    """They are matched by name, as those of an adapter are, so that a part of the classes will do."""
    model = "vim_nano_patch8_64.tiny_in200"
    names = read_merged_info(weights_of(model).path).classes
    folder, page = tmp_path / "photos", tmp_path / "page.html"
    for number, name in enumerate([names[7], names[3]]):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (200 * number, 90, 0)).save(folder / name / "a.png")
    flags = ("--model", model, "--num-workers", 0, "--device", "cpu", "--folder")
    assert run(*flags, folder, "-o", page) == 0
    assert "no names of classes" not in caplog.text and "The data have no class" in caplog.text
    assert names[7] in page.read_text()
    for number in range(len(names)):
        (tmp_path / "others" / f"class {number}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "others" / f"class {number}" / "a.png")
    assert run(*flags, tmp_path / "others") == 2
    assert "the model knows none of the classes of the images" in error(capsys)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "vim_tiny_patch8_64"], "model = 'vim_tiny_patch8_64' would have no effect: "),
        (["--model", "vim_tiny_patch8_64"], "says by itself what it is, 'test_vim'. Leave it out"),
        (["--img-size", "96"], "img_size = 96 would have no effect"),
        (["--model-kwargs", "depth=1"], "model_kwargs = {'depth': 1} would have no effect"),
        (["--task", "multilabel"], "task = 'multilabel' would have no effect: "),
    ],
)
@pytest.mark.parametrize("kind", ["run", "merged"])
def test_what_a_file_decides_is_not_changed_by_flags(kind, flags, expected, images, tmp_path, capsys):
    """The table would name a model that was not scored."""
    source = images[0]
    if kind == "merged":
        source = tmp_path / "merged.safetensors"
        merge_to_file(images[0], source, device="cpu", backend="torch")
    few = json.dumps(IMAGES["dataset_kwargs"])
    data = ("--dataset", "synthetic_flowers", "--dataset-kwargs", few, "--num-workers", 0)
    assert run("--adapter", source, *data, *flags) == 2
    assert expected in error(capsys)
    assert run("--adapter", source, *data, "--model", "test_vim", "--task", "classification") == 0


def test_a_merged_file_knows_its_task(images, tmp_path, capsys):
    """Nobody has to say that its images have several labels."""
    merged, data = tmp_path / "merged.safetensors", tmp_path / "data"
    merge_to_file(images[0], merged, device="cpu", backend="torch")
    with safe_open(merged, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(merged), merged, metadata={**metadata, "task": "multilabel"})
    data.mkdir()
    names = json.loads(metadata["classes"])
    rows = [f"{number}.png,{names[number % 2]}{';' + names[2] if number % 3 else ''}" for number in range(12)]
    (data / "labels.csv").write_text("path,labels\n" + "\n".join(rows))
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(data / f"{number}.png")
    found = vimtune.evaluate(
        merged, dataset="csv", data_dir=str(data), dataset_kwargs={"separator": ";"}, num_workers=0
    )
    assert found.facts["task"] == "multilabel" and "map" in found.scores


def test_data_that_nobody_named_are_not_taken_for_a_temperature(images, photos, tmp_path):
    merged, output = tmp_path / "merged.safetensors", tmp_path / "scores.json"
    merge_to_file(images[0], merged, device="cpu", backend="torch")
    for path in photos.iterdir():
        path.rename(path.with_name(path.name.replace(" ", "-")))
    with safe_open(merged, "pt") as file:
        metadata = file.metadata()
    renamed = metadata["classes"].replace(" ", "-").replace(",-", ", ")
    save_file(load_file(merged), merged, metadata={**metadata, "classes": renamed})
    assert run("--adapter", merged, "--folder", photos, "--num-workers", 0, "-o", output) == 0
    origin = json.loads(output.read_text())["temperature_origin"]
    assert "name them with --dataset" in origin and "flowers" not in origin


def test_data_of_some_classes_that_nobody_named_are_not_taken_for_a_temperature(images, photos, tmp_path):
    merged = tmp_path / "merged.safetensors"
    merge_to_file(images[0], merged, device="cpu", backend="torch")
    unnamed = vimtune.evaluate(merged, folder=str(photos), num_workers=0)
    assert "name them with --dataset" in unnamed.numbers["temperature_origin"]
    data = {"dataset": "synthetic_flowers", "dataset_kwargs": IMAGES["dataset_kwargs"]}
    named = vimtune.evaluate(merged, folder=str(photos), num_workers=0, **data)
    assert named.numbers["temperature_origin"].startswith("fitted to the 6 images of 'val'")


def test_a_merged_file_is_taken_like_the_adapter(images, tmp_path, capsys):
    """As predict takes it; it does not say which data were its own."""
    folder, report = images
    few, output = json.dumps(IMAGES["dataset_kwargs"]), tmp_path / "scores.json"
    merged = tmp_path / "merged.safetensors"
    merge_to_file(folder, merged, device="cpu", backend="torch")
    data = ("--dataset", "synthetic_flowers", "--dataset-kwargs", few, "--num-workers", 0)
    assert run("--adapter", merged, *data, "-o", output) == 0
    found = json.loads(output.read_text())
    assert found["top1"] == report.top1 and found["loss"] == pytest.approx(report.loss, rel=1e-4)
    assert found["model"] == "test_vim" and found["adapter"] == str(merged)
    assert run("--adapter", merged) == 2 and "name them with --dataset" in error(capsys)
    assert run("--adapter", merged, *data, "--checkpoint", merged) == 2
    assert "drop --checkpoint" in error(capsys)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ([], "has no images"),
        (["strange", "odd"], "the model knows none of the classes of the images"),
    ],
)
def test_folders_that_cannot_be_scored(classes, expected, images, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in classes:
        (tmp_path / "photos" / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    output = tmp_path / "page.html"
    assert run("--adapter", images[0], "--folder", tmp_path / "photos", "-o", output) == 2
    assert expected in error(capsys) and not output.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--split", "train"], "--split 'train': expected test or val"),
        (["-o", "scores.txt"], "expected a name ending in .csv or .html or .json"),
        (["--folder", "x", "--split", "val"], "--split 'val': all images of the folder are scored"),
        (["--mistakes", "mistakes.json"], "expected a name ending in .csv"),
        (["--adapter", "{run}", "--flip"], "flip = True is not a field of evaluations of task 'arc_easy'"),
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
        Closed().open_trial(Recipe(), Processes(), "test", None, EvaluateOptions(), force=False)
    with pytest.raises(ValueError, match="task 'closed' has no answers to single inputs"):
        Closed().read_inputs(["x"], [])
