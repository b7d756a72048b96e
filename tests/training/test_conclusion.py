"""The end of a run: the result is written first, and nothing after it can take it back."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from nasty import NASTY_NAMES
from PIL import Image
from tiny_runs import logged_run, outcome_of, report_of

from vimtune.console import build_console
from vimtune.pages import page, style
from vimtune.run_folder import RunFolder
from vimtune.tasks.classes import confusion, reliability
from vimtune.tasks.classes.calibration import Temperature
from vimtune.tasks.classes.confusion import confusion_files, write_confusion_table
from vimtune.tasks.classes.details import ClassDetails, Examples
from vimtune.tasks.job import Outcome
from vimtune.tasks.report import Report
from vimtune.training import OutputError, conclusion, pictures
from vimtune.training.conclusion import conclude
from vimtune.training.logs import Logs
from vimtune.training.report import print_report, write_report
from vimtune.training.tracking import Tracker

CONFUSION = torch.tensor([[3, 1, 0], [2, 0, 2], [0, 0, 4]])
CLASSES = ["cat", "dog", "owl"]


def stored(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_bytes())


def finish(
    folder: Path, counts: torch.Tensor = CONFUSION, classes: list[str] = CLASSES, pictures: bool = True
) -> Report:
    report, outcome = report_of(counts, classes, folder), outcome_of(counts)
    report.recipe["pictures"] = pictures
    console, task = build_console(), outcome.task
    tracker = Tracker(console, task, epochs=1, total_steps=4)
    logs = Logs(tracker.warn)
    logs.open(["tensorboard"], logged_run(folder))
    files = confusion_files(counts, classes, "a title")
    details = details_of(outcome, classes)
    return conclude(report, outcome, details, files, RunFolder(folder), tracker, logs)


def details_of(outcome: Outcome, classes: list[str]) -> ClassDetails:
    examples = Examples(
        "path", "images", lambda index: f"{index}.jpg", lambda index: Image.new("RGB", (9, 9))
    )
    temperature = Temperature(None, "nobody asked")
    return ClassDetails(outcome.evaluation.answers, classes, "test", examples, temperature)


def raising(error: Exception):
    def fail(*args: object) -> None:
        raise error

    return fail


def test_everything_is_written(tmp_path, capsys):
    report = finish(tmp_path)
    assert report.warnings == [] and stored(tmp_path) == report.to_dict()
    assert {path.name for path in tmp_path.iterdir()} >= {
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "learning_curve.png",
        "report.html",
    }
    text = capsys.readouterr().out
    assert "dog taken for cat: 2 of 4" in text and "warning" not in text
    assert text.splitlines()[-1] == f"run folder: {tmp_path}"


def test_pictures_are_left_out_where_nobody_will_look_at_them(tmp_path):
    assert finish(tmp_path, pictures=False).warnings == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "confusion_matrix.csv",
        "metrics.jsonl",
        "report.json",
        "tensorboard",
    }


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ((confusion, "draw_confusion_matrix"), "confusion_matrix.png"),
        ((pictures, "draw_learning_curve"), "learning_curve.png"),
        ((reliability, "draw_reliability"), "report.html"),
        ((confusion, "write_confusion_table"), "confusion_matrix.csv"),
        ((Logs, "write_result"), "final scores in the logs"),
    ],
)
@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), TypeError("set_text()"), OSError(28, "No space left"), MemoryError()]
)
def test_a_failed_decoration_is_a_warning(tmp_path, monkeypatch, capsys, place, part, error):
    monkeypatch.setattr(style, "save_picture", lambda figure, path: path.touch())
    monkeypatch.setattr(page, "to_png", lambda figure: b"")
    (tmp_path / "learning_curve.png").write_text("of an earlier session")
    monkeypatch.setattr(*place, raising(error))
    report = finish(tmp_path)
    (warning,) = report.warnings
    assert warning.startswith(f"no {part}: {type(error).__name__}: ") and "\n" not in warning
    assert stored(tmp_path) == report.to_dict()
    text = capsys.readouterr().out
    assert f"warning: {warning}" in text and "top-1 (test)" in text
    assert not (tmp_path / part).exists()


def test_the_result_is_on_disk_before_anything_is_drawn_or_printed(tmp_path, monkeypatch):
    seen = []

    def look(*args: object) -> None:
        seen.append(stored(tmp_path)["top1"])

    for module, name in (
        (confusion, "write_confusion_table"),
        (style, "save_picture"),
        (conclusion, "print_report"),
    ):
        monkeypatch.setattr(module, name, look)
    report = finish(tmp_path)
    assert seen == [report.top1] * 4


def test_a_table_that_cannot_be_printed_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(style, "save_picture", lambda figure, path: path.touch())
    monkeypatch.setattr(conclusion, "print_report", raising(UnicodeError("no")))
    assert finish(tmp_path).warnings == []  # of report.json: they tell of files that are missing
    assert "warning: no final table: UnicodeError: no" in capsys.readouterr().out


def test_a_result_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(conclusion, "write_report", raising(OutputError("cannot write")))
    with pytest.raises(OutputError, match="cannot write"):
        finish(tmp_path)
    assert not (tmp_path / "learning_curve.png").exists()


def test_nasty_names_end_in_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vimtune.pages.style.FALLBACK_FONTS", ())
    classes = list(NASTY_NAMES)
    counts = torch.ones(len(classes), len(classes), dtype=torch.int64)
    assert finish(tmp_path, counts, classes).warnings == []
    assert (tmp_path / "confusion_matrix.png").exists()
    assert list(stored(tmp_path)["per_class"]) == classes
    assert (tmp_path / "report.json").read_text(encoding="ascii")
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("name", NASTY_NAMES)
def test_confusion_table_is_neutral_and_complete(tmp_path, name):
    write_confusion_table(torch.tensor([[1, 2], [3, 4]]), [name, "plain"], tmp_path / "table.csv")
    text = (tmp_path / "table.csv").read_text(encoding="utf-8")
    assert "\x1b" not in text and text.count("\n") == 3
    header, *rows = csv.reader(io.StringIO(text))
    assert [row[2:] for row in rows] == [["1", "2"], ["3", "4"]]
    assert header[2] == rows[0][1] and not header[2].startswith("=")
    assert rows[1][:2] == ["1", "plain"]


@pytest.mark.parametrize("width", [1, 8, 10, 20, 40, 59, 60, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_the_final_table_is_complete_on_every_terminal(monkeypatch, width, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = build_console()
    console.width = width
    print_report(report_of(CONFUSION, list(NASTY_NAMES[3:6]), "r\u685c"), console)
    stream.flush()
    lines = stream.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
    words = " ".join(line.strip("|\u2502 ") for line in lines).split()
    for word in ("58.33", "trainable", "100", "1,000", "test_vim,", "lora", r"ros\udce9"):
        assert word in words
    assert width < 60 or all(len(line) <= width for line in lines[:-1])


def test_numbers_that_are_not_finite_are_null(tmp_path):
    report = report_of()
    report.history[0]["train_loss"] = float("inf")
    object.__setattr__(report, "peak_memory", float("nan"))
    write_report(report, RunFolder(tmp_path))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["peak_memory"] is None and read["history"][0]["train_loss"] is None


def test_memory_that_was_not_measured(capsys):
    report = report_of()
    object.__setattr__(report, "peak_memory", None)
    object.__setattr__(report, "peak_memory_of", "not measured on Windows")
    print_report(report, build_console())
    assert "(not measured on Windows)" in capsys.readouterr().out
