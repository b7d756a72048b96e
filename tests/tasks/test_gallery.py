"""Images with right and wrong answers: which are chosen, and the picture of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vimtune.data import ImageDataset
from vimtune.recipe import Recipe
from vimtune.tasks.images import job as image_job
from vimtune.tasks.images.examples import KEPT, Example, Examples
from vimtune.tasks.images.gallery import MAX_NAME, draw_gallery, write_gallery
from vimtune.tasks.images.report import ImageReport
from vimtune.tasks.images.scoring import evaluation_of
from vimtune.text import shorten
from vimtune.training.distributed import Processes


class Greys(ImageDataset):
    """Images whose pixels are their number."""

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self.targets = [0] * 200

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (300, 200), (index,) * 3)

    def describe(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize(("num_classes", "of_each"), [(2, 8), (5, 4), (16, 1), (40, 1)])
def test_the_first_of_every_class_are_chosen(num_classes: int, of_each: int) -> None:
    labels = torch.arange(num_classes).repeat_interleave(20)  # as in a folder, one class after the other
    predicted = torch.where(torch.arange(len(labels)) % 2 == 1, labels, (labels + 1) % num_classes)
    examples = Examples(num_classes)
    for pairs in (labels * num_classes + predicted).split(7):
        examples.add(pairs)
    for right in (True, False):
        expected: list[int] = []
        for label in range(num_classes):
            expected += [20 * label + 2 * number + right for number in range(of_each)]
        chosen = [each for each in examples.chosen if each.right is right]
        assert [each.position for each in chosen] == expected[:KEPT]
        assert all(each.label == labels[each.position] for each in chosen)
        assert all(each.predicted == predicted[each.position] for each in chosen)


def test_the_picture_shows_images_answers_and_true_classes() -> None:
    long = "dog" * 20
    examples = [Example(0, 0, 0), Example(2, 1, 2), Example(1, 2, 2)]
    (axes,) = draw_gallery(examples, Greys(["rose", "$x_1$", long]), [7, 8, 9]).axes
    short = shorten(long, MAX_NAME)
    assert [text.get_text() for text in axes.texts] == ["rose", short, f"{short}\nis $x_1$"]
    shown = [np.unique(image.get_array()).tolist() for image in axes.images]
    assert shown == [[7], [8], [9]] and max(axes.images[0].get_array().shape) == 224


@pytest.mark.parametrize("examples", [[], [Example(0, 0, 0)], [Example(0, 0, 1)]])
def test_few_images_are_a_picture_too(examples: list[Example], tmp_path: Path) -> None:
    write_gallery(tmp_path / "examples.png", examples, Greys(["a", "b"]), [0])
    assert Image.open(tmp_path / "examples.png").width > 500


@pytest.mark.parametrize(("world_size", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6, 8, 9]), (2, [0, 1, 4, 5, 8])])
def test_positions_are_those_of_the_images_that_the_main_process_has_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, expected: list[int]
) -> None:
    for number in range(20):
        path = tmp_path / "test" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "test", tmp_path / split)
    values = {"model": "test_vim", "pretrained": False, "batch_size": 4, "num_workers": 0, "device": "cpu"}
    recipe = Recipe(dataset="folder", data_dir=str(tmp_path), **values)
    job = recipe.task.open(recipe, Processes())
    job.world_size = world_size
    monkeypatch.setattr(job.final, "left_out", lambda: {job.final.dataset.describe(7)})
    found = evaluation_of(torch.eye(2, dtype=torch.int64), top5_hits=2, loss=1.0)
    monkeypatch.setattr(image_job, "confusion_files", lambda *_: {})
    picture = job.result_files(ImageReport.__new__(ImageReport), found)["examples.png"]
    assert picture.keywords["indices"][: len(expected)] == expected
