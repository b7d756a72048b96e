"""Images with right and wrong answers: which are kept, and the picture of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vimtune.tasks.images.examples import KEPT, Gallery
from vimtune.tasks.images.gallery import MAX_NAME, draw_gallery, write_gallery
from vimtune.text import shorten

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}


def fill(gallery: Gallery, labels: list[int], predicted: list[int], batch: int = 7) -> Gallery:
    """Show a gallery images whose pixels are their number, in batches."""
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        count = len(labels[part])
        images = torch.arange(start, start + count).float().view(-1, 1, 1, 1).expand(-1, 3, 4, 6)
        gallery.add(images, torch.tensor(labels[part]), torch.tensor(predicted[part]))
    return gallery


@pytest.mark.parametrize(("num_classes", "of_each"), [(2, 8), (5, 4), (16, 1), (40, 1)])
def test_the_first_of_every_class_are_kept(num_classes: int, of_each: int) -> None:
    labels = sorted(list(range(num_classes)) * 20)  # as in a folder, one class after the other
    predicted = [label if index % 2 else (label + 1) % num_classes for index, label in enumerate(labels)]
    gallery = fill(Gallery(num_classes), labels, predicted)
    for kept, parity in ((gallery.right, 1), (gallery.wrong, 0)):
        expected: list[int] = []
        for label in range(num_classes):
            own = [i for i, other in enumerate(labels) if other == label and i % 2 == parity]
            expected += own[:of_each]
        assert [int(example.image.flatten()[0]) for example in kept] == expected[:KEPT]
        assert all(labels[int(e.image[0, 0, 0])] == e.label for e in kept)
        assert all((e.label == e.predicted) == bool(parity) for e in kept)


def texts(gallery: Gallery, classes: list[str]) -> list[str]:
    (axes,) = draw_gallery(gallery, classes, **STATISTICS).axes
    return [text.get_text() for text in axes.texts]


def test_the_picture_says_answers_and_true_classes() -> None:
    gallery = fill(Gallery(3), [0, 1, 2], [0, 2, 2])
    long = "dog" * 20
    short = shorten(long, MAX_NAME)
    assert texts(gallery, ["rose", "$x_1$", long]) == ["rose", short, f"{short}\nis $x_1$"]


@pytest.mark.parametrize("answers", [[], [0], [1]])
def test_few_images_are_a_picture_too(answers: list[int], tmp_path: Path) -> None:
    gallery = fill(Gallery(2), [0] * len(answers), answers)
    write_gallery(tmp_path / "examples.png", gallery, ["a", "b"], **STATISTICS)
    assert Image.open(tmp_path / "examples.png").width > 500


def test_pixels_are_those_of_the_image() -> None:
    image = torch.rand(3, 4, 4)
    mean, std = (torch.tensor(STATISTICS[name]).view(3, 1, 1) for name in ("mean", "std"))
    gallery = Gallery(2)
    gallery.add(((image - mean) / std)[None], torch.tensor([0]), torch.tensor([0]))
    (axes,) = draw_gallery(gallery, ["a", "b"], **STATISTICS).axes
    shown = torch.from_numpy(axes.images[0].get_array().data)
    assert torch.allclose(shown, image.permute(1, 2, 0), atol=1e-6)
