"""Pictures are readable for few and many classes and epochs, and take every name as it is."""

from __future__ import annotations

import dataclasses
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from nasty import NASTY_NAMES
from PIL import Image
from tiny_runs import report_of

from vimtune.pages.style import save_picture
from vimtune.tasks.base import Score
from vimtune.tasks.classes.confusion import MAX_NAME, class_labels, draw_confusion_matrix, undrawable
from vimtune.tasks.report import Report
from vimtune.training.pictures import draw_learning_curve

TOP1 = Score("top1", "top-1")


def report(epochs: int = 2, every: int = 1, **changes: Any) -> Report:
    history: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        record = {"epoch": epoch, "step": epoch, "train_loss": 1 / epoch}
        if epoch % every == 0 or epoch == epochs:
            record |= {"loss": 1.5 / epoch, "top1": 100.0 - 50 / epoch, "top5": None}
        history.append(record)
    return dataclasses.replace(report_of(), history=history, best_epoch=epochs, **changes)


def drawn(figure: Figure) -> Figure:
    """`figure` with everything at its place; any warning of matplotlib is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(figure).draw()
    return figure


def inside(figure: Figure, artist: Any) -> bool:
    box, page = artist.get_window_extent(), figure.bbox
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1


def test_learning_curve_shows_the_history():
    shown = report(epochs=4, every=2)
    losses, accuracy = draw_learning_curve(shown, TOP1).axes
    train_loss, val_loss = losses.get_lines()
    assert train_loss.get_ydata().tolist() == [record["train_loss"] for record in shown.history]
    assert val_loss.get_xdata().tolist() == accuracy.get_lines()[0].get_xdata().tolist() == [2, 4]
    assert accuracy.get_lines()[0].get_ydata().tolist() == [75.0, 87.5]


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_learning_curve_has_whole_epochs_and_hides_nothing(epochs):
    figure = drawn(draw_learning_curve(report(epochs), TOP1))
    losses = figure.axes[0]
    low, high = losses.get_xlim()
    ticks = [tick for tick in losses.get_xticks() if low <= tick <= high]
    assert low < 1 and high > epochs and ticks and all(tick == int(tick) >= 1 for tick in ticks)
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 <= losses.get_tightbbox().y0 and inside(figure, legend)
    assert [text.get_text() for text in legend.get_texts()] == [
        "train loss",
        "val loss",
        "val top-1",
        f"best epoch ({epochs})",
    ]
    assert losses.get_lines()[0].get_marker() == ("o" if epochs < 50 else "None")


def test_learning_curve_of_losses_of_zero():
    zero = report(3)
    for record in zero.history:
        record["train_loss"] = record["loss"] = 0.0
    assert drawn(draw_learning_curve(zero, TOP1)).axes[0].get_ylim() == (0, 1)


@pytest.mark.parametrize("classes", [1, 2, 20, 30, 31, 102])
def test_confusion_matrix_is_readable(classes):
    confusion = torch.diag(torch.arange(classes)) * 3
    figure = drawn(draw_confusion_matrix(confusion, [f"class {i}" for i in range(classes)], "a title"))
    axes = figure.axes[0]
    shown = axes.get_images()[0].get_array()
    assert shown[0, 0] == 0  # a class without images
    assert classes == 1 or shown[1, 1] == 1
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == ({(i, i): str(3 * i) for i in range(1, classes)} if classes <= 20 else {})
    labels = [label for label in axes.get_yticklabels() if label.get_text()]
    if classes <= 30:
        assert [label.get_text() for label in labels] == [f"class {i}" for i in range(classes)]
        boxes = [label.get_window_extent() for label in labels]
        assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
        assert all(inside(figure, label) for label in labels)
    else:
        assert len(labels) < 20 and "confusion_matrix.csv" in axes.get_ylabel()
    assert inside(figure, axes.title) and inside(figure, axes.yaxis.label)


def test_numbers_contrast_with_their_cells():
    axes = draw_confusion_matrix(torch.tensor([[9, 1], [5, 5]]), ["a", "b"], "a title").axes[0]
    assert [text.get_color() for text in axes.texts] == ["white", "black", "black", "black"]


def test_names_are_taken_as_they_are(tmp_path):
    number = len(NASTY_NAMES)
    confusion = torch.ones(number, number, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_picture(draw_confusion_matrix(confusion, NASTY_NAMES, "a title"), tmp_path / "matrix.png")
        curve = draw_learning_curve(report(model="vim$_{x", method="lora$^"), TOP1)
        save_picture(curve, tmp_path / "curve.png")
    for name in ("matrix.png", "curve.png"):
        with Image.open(tmp_path / name) as image:
            image.load()


def test_labels_are_short_and_neutral():
    labels = class_labels(NASTY_NAMES)
    assert labels[:2] == ["a$b$_^{", r"c $\frac{1$"] and labels[4:6] == [r"ros\udce9", r"two\nlines"]
    assert all(len(label) <= MAX_NAME and "\x1b" not in label for label in labels)


def test_names_without_a_font_are_numbered(monkeypatch):
    monkeypatch.setattr("vimtune.pages.style.FALLBACK_FONTS", ())
    names = ["rose", "\u685c", "été"]
    assert undrawable(names) == [1] and class_labels(names) == ["rose", "class 1", "été"]
    axes = draw_confusion_matrix(torch.eye(3, dtype=torch.int64), names, "a title").axes[0]
    assert axes.get_xlabel() == "predicted class (numbers: see confusion_matrix.csv)"


def test_settings_of_the_user_do_not_reach_the_pictures(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "savefig.dpi": 10, "figure.facecolor": "red"}):
        save_picture(draw_learning_curve(report(), TOP1), tmp_path / "curve.png")
        assert matplotlib.rcParams["text.usetex"]
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (840, 552) and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
