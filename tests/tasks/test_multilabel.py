"""Images with any number of labels, from a table to answers."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from vimtune import evaluate, load_predictor
from vimtune.cli.predict import run as predict_command
from vimtune.commands.merge import run_merge
from vimtune.recipe import Recipe, RecipeError
from vimtune.runtime.distributed import Processes
from vimtune.tasks import TASKS
from vimtune.tasks.answers import TagPrediction
from vimtune.tasks.images.tag_scoring import TagTally, binary_losses, tag_evaluation
from vimtune.tasks.images.tags import positive_weights
from vimtune.training import Callback, train

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty images, each a mean of the colours that its labels say."""
    folder, chance = tmp_path_factory.mktemp("tags"), random.Random(0)
    rows = []
    for number in range(40):
        own = [name for name in COLOURS if chance.random() < 0.5]
        colour = tuple(max([0, *(COLOURS[name][band] for name in own)]) for band in range(3))
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{'|'.join(own)}")
    (folder / "labels.csv").write_text("\n".join(["file,tags", *rows]))
    return folder


def recipe(data, folder, **changes) -> Recipe:
    values = {
        "task": "multilabel",
        "dataset": "csv",
        "data_dir": str(data),
        "dataset_kwargs": {"separator": "|"},
        "augmentation": "none",
        "model": "test_vim",
        "model_kwargs": {"depth": 2},
        "pretrained": False,
        "peft": "lora",
        "num_workers": 0,
        "batch_size": 8,
        "device": "cpu",
        "backend": "torch",
        "epochs": 1,
        "output_dir": str(folder),
    }
    return Recipe(**{**values, **changes})


def test_lines_of_a_run_name_the_scores_as_its_table_does(data, tmp_path, capsys) -> None:
    train(recipe(data, tmp_path / "run", max_steps=1))
    (line,) = (line for line in "".join(capsys.readouterr()).splitlines() if line.startswith("epoch 1/1"))
    assert "  val mAP " in line and "  micro F1 " in line


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return train(recipe(data, tmp_path_factory.mktemp("run") / "run", epochs=6, lr=1e-2))


def test_it_learns_what_each_image_shows_and_reports_every_class(run) -> None:
    assert run.scores["map"] > 80 and set(run.per_class) == set(COLOURS)
    known = [value for value in run.per_class.values() if value is not None]
    assert run.scores["map"] == pytest.approx(sum(known) / len(known))
    with open(f"{run.run_dir}/classes.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == sorted(COLOURS)
    assert list(rows[0])[2:] == ["images", "answers", "average_precision", "precision", "recall", "f1"]
    assert run.macro_f1 == pytest.approx(sum(float(row["f1"]) for row in rows) / len(rows), abs=0.01)
    assert "micro F1 (test)" in dict(run.rows())
    assert any(name.startswith("lowest AP") for name, _ in run.rows())


def test_wrong_labels_are_listed_and_shown(run, data, tmp_path) -> None:
    """A label that every image lacks by mistake is among the first; damaged images are counted."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    lines = (folder / "labels.csv").read_text().splitlines()
    rows = dict(line.split(",") for line in lines[1:])
    shown = next(name for name, tags in rows.items() if tags == "red")
    rows[shown] = "green"
    damaged = next(name for name, tags in rows.items() if tags == "blue")
    (folder / damaged).write_bytes(b"no image")
    (folder / "labels.csv").write_text(
        "\n".join(["file,tags,split", *(f"{n},{t},test" for n, t in rows.items())])
    )
    given = {"data_dir": str(folder), "calibrate": False, "on_corrupt": "skip"}
    with pytest.raises(ValueError, match="cannot decode"):
        evaluate(run.run_dir, **given | {"on_corrupt": "error"})
    found = evaluate(run.run_dir, **given)
    wrong = found.mistakes()
    assert list(wrong[0]) == ["path", "class", "labelled", "probability", "loss"]
    assert found.mistakes_to_csv().splitlines()[0] == ",".join(wrong[0])
    mine = {row["class"]: row for row in wrong if row["path"].endswith(f"/{shown}")}
    assert mine["red"]["labelled"] == "no" and mine["red"]["probability"] > 0.5
    assert mine["green"]["labelled"] == "yes" and mine["green"]["probability"] < 0.5
    assert [row["loss"] for row in wrong] == sorted((row["loss"] for row in wrong), reverse=True)
    assert mine["red"]["loss"] == pytest.approx(-math.log(1 - mine["red"]["probability"]), rel=1e-4)
    assert found.numbers["notes"] == ["Left out because they cannot be decoded: 1 of 40 images."]
    section = found.sections["mistakes"]
    assert len(section.photos) == min(24, len(wrong)) and f"{len(wrong):,} labels of" in section.findings[0]
    found.save(tmp_path / "page.html")
    assert "is not labelled so" in (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Path(run.run_dir, "report.html").read_text(encoding="utf-8")
    assert "The worst mistakes" in page and "Left out because" not in page


def test_images_of_test_alone_are_scored_and_not_trained_on(run, data, tmp_path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "labels.csv").rename(folder / "test.csv")
    found = evaluate(run.run_dir, data_dir=str(folder))
    assert found.scores["count"] == 40 and found.scores["temperature"] is None
    assert "there is no validation split" in found.numbers["temperature_origin"]
    with pytest.raises(ValueError, match="no images to train on"):
        train(recipe(folder, tmp_path / "run"))


def test_probabilities_of_labels_are_compared_with_the_labels(run, data, tmp_path) -> None:
    """Over all labels of all images, in evaluations as in the report of the run."""
    found = evaluate(run.run_dir)
    scores, origin = found.scores, found.numbers["temperature_origin"]
    assert run.ece == pytest.approx(scores["ece"]) and origin.startswith("fitted to the 6 images of 'val'")
    assert scores["temperature"] > 0 and scores["calibrated_loss"] is not None
    bins = found.numbers["reliability"]
    assert sum(each["count"] for each in bins) == len(COLOURS) * scores["count"]
    labels = sum(row["count"] for row in found.numbers["classes"])
    assert sum(each["count"] * each["accuracy"] for each in bins) == pytest.approx(labels)
    gaps = sum(each["count"] * abs(each["confidence"] - each["accuracy"]) for each in bins)
    assert scores["ece"] == pytest.approx(100 * gaps / (len(COLOURS) * scores["count"]))
    assert {"calibration error (test)", "temperature"} <= {name for name, _ in found.rows()}
    found.save(tmp_path / "page.html")
    for page in (tmp_path / "page.html", Path(run.run_dir, "report.html")):
        text = page.read_text(encoding="utf-8")
        assert "Share of labels that are there by their probability" in text
        assert "The expected calibration error (ECE) is" in text
    alone = evaluate(run.run_dir, calibrate=False)
    assert alone.scores["temperature"] is None and alone.scores["ece"] == scores["ece"]
    held_out = evaluate(run.run_dir, split="val")
    assert held_out.scores["calibrated_loss"] < held_out.scores["loss"]


def test_each_class_has_a_probability_of_its_own_also_when_merged(run, data, tmp_path) -> None:
    merged = tmp_path / "merged.safetensors"
    assert run_merge(adapter=Path(run.run_dir), output=merged, device="cpu", backend="torch") == 0
    white = data / "white.png"
    Image.new("RGB", (32, 32), "white").save(white)
    found = [
        next(iter(load_predictor(path, device="cpu", backend="torch").predict([white], top_k=3)))
        for path in (run.run_dir, merged)
    ]
    assert sum(found[0].probabilities) > 1.5  # White is all of them; a softmax would share 1 out.
    assert found[0].probabilities == pytest.approx(found[1].probabilities, abs=1e-4)


def test_an_evaluation_tells_both_f1_and_the_weakest_classes(run, tmp_path) -> None:
    """Every class has what classification has, and the final table the lines of the training's."""
    found = evaluate(run.run_dir, calibrate=False)
    rows = found.numbers["classes"]
    for row in rows:
        right = row["recall"] * row["count"] / 100
        assert row["f1"] == pytest.approx(200 * right / (row["count"] + row["answers"]))
    assert found.scores["macro_f1"] == pytest.approx(sum(row["f1"] for row in rows) / len(rows))
    assert found.scores["macro_f1"] == pytest.approx(run.macro_f1)
    shown = dict(found.rows())
    assert shown["macro F1 (test)"] == f"{run.macro_f1:.2f} %" and "micro F1 (test)" in shown
    weakest = [value for name, value in run.rows() if name == "lowest AP"]
    assert weakest and shown["lowest AP"] in weakest
    found.save(tmp_path / "page.html")
    for page in (tmp_path / "page.html", Path(run.run_dir, "report.html")):
        text = page.read_text(encoding="utf-8")
        assert f"Macro F1 is {run.macro_f1:.2f} %." in text and "Micro F1 is" in text and "answers" in text


def test_an_image_has_the_labels_whose_probability_reaches_the_threshold(run, tmp_path) -> None:
    """Also those that are not among the most probable classes that are named."""
    white = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(white)
    predictor = load_predictor(run.run_dir, device="cpu", backend="torch")
    every = dict(zip(*_ranked(predictor, white), strict=True))
    for threshold in (0.0, 0.5, sorted(every.values())[1], 1.0):
        found = next(iter(predictor.predict(white, top_k=1, threshold=threshold)))
        assert found.labels == [name for name, value in every.items() if value >= threshold]
        assert len(found.classes) == 1 and found.classes[0] == next(iter(every))
    assert next(iter(predictor.predict(white))).labels == [name for name in every if every[name] >= 0.5]
    warm = next(iter(predictor.predict(white, temperature=3.0)))
    logits = torch.tensor([every[name] for name in warm.classes]).logit()
    assert torch.allclose(torch.tensor(warm.probabilities), (logits / 3).sigmoid(), atol=1e-5)
    for threshold in (-0.1, 1.5, "half", None):
        with pytest.raises(ValueError, match=r"threshold = .*: expected a number"):
            predictor.predict(white, threshold=threshold)


def _ranked(predictor, image) -> tuple[list[str], list[float]]:
    found = next(iter(predictor.predict(image)))
    return found.classes, found.probabilities


def test_labels_are_printed_and_written_beside_the_probabilities(run, tmp_path, capsys) -> None:
    for name in ("white", "black"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    found = {}
    for threshold in ("0.000001", "1"):
        files = [str(tmp_path / f"labels{threshold}{ending}") for ending in (".csv", ".json")]
        asked = [str(tmp_path / "white.png"), "--adapter", run.run_dir, "--device", "cpu", "--top-k", "2"]
        assert predict_command("x", [*asked, "--threshold", threshold, "-o", files[0], "-o", files[1]]) == 0
        with open(files[0], encoding="utf-8") as file:
            (row,) = csv.DictReader(file)
        (record,) = json.loads(Path(files[1]).read_text(encoding="utf-8"))
        assert list(row) == ["path", "labels", "class1", "probability1", "class2", "probability2"]
        assert [each["class"] for each in record["predictions"]] == [row["class1"], row["class2"]]
        found[threshold] = row["labels"], record["labels"], capsys.readouterr()
    assert set(found["0.000001"][0].split(";")) == set(found["0.000001"][1]) == set(COLOURS)
    assert found["1"][:2] == ("none", [])
    assert "labels" in (shown := "".join(found["1"][2])) and "none" in shown and "most probable" in shown


def test_the_threshold_is_an_option_of_this_task_alone() -> None:
    assert TASKS.get("multilabel").predict_options.build({"threshold": "0.25"}, "x").threshold == 0.25
    with pytest.raises(ValueError, match=r"threshold = 0\.5 is not a field of predictions of classification"):
        TASKS.get("classification").predict_options.build({"threshold": 0.5}, "predictions of classification")


def test_an_answer_with_labels_is_printed_as_a_line() -> None:
    answer = TagPrediction("a.jpg", [1, 0], ["sea", "sky"], [0.8125, 0.1], ["sea"])
    assert str(answer) == "a.jpg: sea (sea 81.2 %, sky 10.0 %)"
    assert answer.cells() == ("sea", "sea 81 %, sky 10 %")


def test_a_run_that_was_stopped_is_continued_to_the_same_end(data, tmp_path) -> None:
    whole = train(recipe(data, tmp_path / "whole", epochs=2, balanced=True))
    part = recipe(data, tmp_path / "part", epochs=2, balanced=True)

    class Stop(Callback):
        def on_epoch(self, session, epoch) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(part, callbacks=[Stop()])
    again = train(part.replace(resume=str(tmp_path / "part"), output_dir=str(tmp_path / "part")))
    assert again.loss == whole.loss and again.scores == whole.scores


def test_task_and_data_have_to_fit(data, tmp_path) -> None:
    for changes, told in (
        ({"task": "classification"}, "use task multilabel"),
        ({"dataset": "synthetic_flowers", "dataset_kwargs": {}, "data_dir": None}, "option separator"),
    ):
        values = recipe(data, tmp_path / "x", **changes)
        with pytest.raises(ValueError, match=told):
            values.task.open(values, Processes())
    with pytest.raises(RecipeError, match="option of task classification"):
        recipe(data, tmp_path / "x", mixup=0.1)
    values = recipe(data, tmp_path / "x", shots=2)
    with pytest.raises(ValueError, match="give train_size"):
        values.task.open(values, Processes())


def test_the_loss_is_the_mean_over_classes_and_the_sum_over_images() -> None:
    torch.manual_seed(0)
    logits, weights = torch.randn(5, 3), torch.tensor([1.0, 2.0, 5.0])
    targets = (torch.rand(5, 3) > 0.5).float()
    chances = torch.sigmoid(logits.double())
    expected = 0.0
    for row in range(5):
        for column in range(3):
            p, own = float(chances[row, column]), float(targets[row, column])
            expected -= float(weights[column]) * own * torch.tensor(p).log().item() / 3
            expected -= (1 - own) * torch.tensor(1 - p).log().item() / 3
    assert binary_losses(logits, targets, weights).item() == pytest.approx(expected, rel=1e-5)
    assert positive_weights([(0,), (0, 1), (), (0,)], 3).tolist() == pytest.approx([1 / 3, 3.0, 1.0])


def test_an_evaluation_is_the_same_however_the_images_are_shared_out() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 4), (torch.rand(7, 4) > 0.6).float()
    labels[:, 3] = 0
    order = torch.randperm(7)
    parts = [TagTally(4, 7) for _ in range(2)]
    for tally, places in zip(parts, (order[:3], order[3:]), strict=True):
        for share in places.split(2):
            tally.add(
                lambda images: images, {"images": logits[share], "labels": labels[share], "places": share}
            )
    for name, total in parts[0].totals.items():
        total += parts[1].totals[name]
    found, whole = parts[0].evaluation(), tag_evaluation(logits, labels, 0.0, torch.arange(7))
    assert found.scores == whole.scores and found.per_class == whole.per_class and found.count == 7
    assert found.per_class[3] is None and found.loss == pytest.approx(
        binary_losses(logits, labels).item() / 7
    )
    has, says, right = labels.sum(), (logits >= 0).sum(), (labels.bool() & (logits >= 0)).sum()
    assert whole.scores["f1"] == pytest.approx(float(200 * right / (has + says)))


def test_a_folder_of_classes_is_refused_with_what_to_do_instead(data, run, tmp_path) -> None:
    """Its labels would be a part of those that an image has. The message spoke of options of training."""
    others = tmp_path / "others"
    (others / "red").mkdir(parents=True)
    for number in range(6):
        shutil.copy(data / f"{number}.png", others / "red")
    with pytest.raises(ValueError, match="a class folder says one label of its images") as refused:
        evaluate(run.run_dir, folder=str(others))
    table = others / "test.csv"
    message = str(refused.value)
    assert repr(str(table)) in message and f"--dataset csv --data-dir {others} instead" in message
    # What it says to do works, with the separator of the run, and scores every row.
    rows = (data / "labels.csv").read_text().splitlines()
    table.write_text("\n".join([rows[0], *(f"red/{row}" for row in rows[1:7])]))
    found = evaluate(run.run_dir, dataset="csv", data_dir=str(others))
    assert found.scores["count"] == 6
    # Nothing is looked for in the folder before.
    with pytest.raises(ValueError, match="a class folder says one label"):
        evaluate(run.run_dir, folder=str(tmp_path / "nowhere"))
