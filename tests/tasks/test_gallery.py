"""Images with right and wrong answers: which are chosen, and the picture of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vimtune.data import ImageDataset, build_transform, create_dataset, create_loader
from vimtune.pages.photos import MAX_NAME
from vimtune.tasks.classes.answers import answers_of
from vimtune.tasks.images.batches import ImageBatches
from vimtune.tasks.images.examples import KEPT, Example, choose_examples
from vimtune.tasks.images.gallery import draw_gallery, write_gallery
from vimtune.text import shorten


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
    logits = torch.nn.functional.one_hot(predicted, num_classes).float()
    examples = choose_examples(answers_of(logits, labels))
    for right in (True, False):
        expected: list[int] = []
        for label in range(num_classes):
            expected += [20 * label + 2 * number + right for number in range(of_each)]
        chosen = [each for each in examples if each.right is right]
        assert [each.index for each in chosen] == expected[:KEPT]
        assert all(each.label == labels[each.index] for each in chosen)
        assert all(each.predicted == predicted[each.index] for each in chosen)


def test_the_picture_shows_images_answers_and_true_classes() -> None:
    long = "dog" * 20
    examples = [Example(7, 0, 0), Example(9, 1, 2), Example(8, 2, 2)]
    (axes,) = draw_gallery(examples, Greys(["rose", "$x_1$", long])).axes
    short = shorten(long, MAX_NAME)
    assert [text.get_text() for text in axes.texts] == ["rose", short, f"{short}\nis $x_1$"]
    shown = [np.unique(image.get_array()).tolist() for image in axes.images]
    assert shown == [[7], [8], [9]] and max(axes.images[0].get_array().shape) == 224


@pytest.mark.parametrize("examples", [[], [Example(0, 0, 0)], [Example(0, 0, 1)]])
def test_few_images_are_a_picture_too(examples: list[Example], tmp_path: Path) -> None:
    write_gallery(tmp_path / "examples.png", examples, Greys(["a", "b"]))
    assert Image.open(tmp_path / "examples.png").width > 500


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_are_scored_say_which_images_they_hold(tmp_path: Path, rank: int, workers: int) -> None:
    for number in range(20):
        path = tmp_path / "train" / f"class {number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(path)
    (tmp_path / "train" / "class 0" / "14.png").write_bytes(b"no image")
    dataset = create_dataset("folder", "train+val", tmp_path)
    transform = build_transform("none", train=False, img_size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    shared = {"num_workers": workers, "seed": 0, "rank": rank, "world_size": 2, "on_corrupt": "skip"}
    loader = create_loader(dataset, transform, batch_size=6, shuffle=False, drop_last=False, **shared)
    batches = ImageBatches(loader, numbered=True)
    found: list[int] = []
    for batch in (unfinished.to(torch.device("cpu")) for unfinished in batches):
        greys = (255 * batch.tensors["images"][:, 0, 0, 0]).round().int().tolist()
        names = [Path(dataset.describe(place)).stem for place in batch.tensors["places"].tolist()]
        assert [int(name) for name in names] == greys and len(greys) == batch.count
        found += batch.tensors["places"].tolist()
    batches.close()
    every = [[0, 1, 2, 6, 8, 12, 13, 14, 18], [3, 4, 5, 9, 10, 11, 15, 16, 17, 19]]
    assert found == every[rank]  # image 7 is the corrupt one
