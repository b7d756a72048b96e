"""What sections, tables and pictures show of themselves in a notebook."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from vimtune import draw_dataset, draw_images
from vimtune.data import ImageDataset
from vimtune.pages.section import Photo, Picture, Section, Table


class Colors(ImageDataset):
    """Images in the colours of their classes."""

    def __init__(self, targets: list[int], tags: list[tuple[int, ...]] | None = None) -> None:
        self.classes, self.targets, self.tags = ["red", "green", "blue"], targets, tags
        self.loaded: list[int] = []

    def load(self, index: int) -> Image.Image:
        self.loaded.append(index)
        return Image.new("RGB", (20, 10), self.classes[self.targets[index]])

    def describe(self, index: int) -> str:
        return str(index)


def png(picture: Picture) -> Image.Image:
    content = picture._repr_png_()
    assert content is not None
    return Image.open(io.BytesIO(content))


def captions(picture: Picture) -> list[str]:
    (axes,) = picture.figure.axes
    return [text.get_text() for text in axes.texts]


def test_a_section_shows_itself_in_the_order_of_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    display = pytest.importorskip("IPython.display", reason="no IPython")
    shown: list[object] = []
    monkeypatch.setattr(display, "display", lambda *values: shown.extend(values))
    drawing = draw_images([Image.new("L", (4, 4))])
    photo = Photo(lambda: Image.new("RGB", (4, 4)), ["one", "two"], "path")
    table = Table("caption", ["a"], [["<b>"]])
    own = Section("<i>title", "why", ["found & lost"], {}, [table], [drawing], [photo])
    own._ipython_display_()
    text, first, photos, last = shown
    assert text.data == "<h4>&lt;i&gt;title</h4><p>found &amp; lost</p>"  # type: ignore[attr-defined]
    assert (first, last) == (drawing, table) and "&lt;b&gt;" in table._repr_html_()
    assert isinstance(photos, Picture) and captions(photos) == ["one\ntwo"]


def test_a_picture_is_a_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimtune.pages.page.DPI", 80)  # whatever other tests have set
    assert png(draw_images([Image.new("RGB", (9, 9), "red")] * 3, columns=2)).size == (216, 270)
    Image.new("RGB", (3, 3)).save(tmp_path / "there.png")
    assert png(Picture("", tmp_path / "there.png")).size == (3, 3)
    assert Picture("", tmp_path / "missing.png")._repr_png_() is None


@pytest.mark.parametrize("caption", ["Galia-Melon 83 %\nis Honeydew-Melon 17.2 %", "M" * 12, "x" * 90])
def test_a_caption_is_no_wider_than_its_image(caption: str) -> None:
    picture = draw_images([Image.new("RGB", (9, 9))], [caption])
    png(picture)
    (axes,) = picture.figure.axes
    extent, whole = axes.texts[0].get_window_extent(), picture.figure.bbox
    assert extent.x0 >= whole.x0 and extent.x1 <= whole.x1


def test_images_keep_their_own_pixels() -> None:
    image = Image.new("RGB", (500, 300))
    assert captions(draw_images([image, image.convert("1")], ["one\ntwo", "x" * 90])) == [
        "one\ntwo",
        "xxxxxxxxxxxxxx ... xxxxxxxxxxxxxx",
    ]
    assert image.size == (500, 300)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (([],), "no images to draw: expected at least one"),
        (([Image.new("L", (2, 2))], ["a", "b"]), "2 captions for 1 image: expected one each"),
    ],
)
def test_what_cannot_be_drawn(arguments: tuple[list[Image.Image], ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        draw_images(*arguments)
    with pytest.raises(ValueError, match="columns = 0: expected at least 1"):
        draw_images([Image.new("L", (2, 2))], columns=0)


def test_a_data_set_has_a_column_for_each_class() -> None:
    dataset = Colors([0, 0, 0, 2, 1, 2, 2, 1])
    picture = draw_dataset(dataset, each=2)
    assert dataset.loaded == [0, 4, 3, 1, 7, 5] and captions(picture) == ["red", "green", "blue"] * 2
    assert captions(draw_dataset(dataset, classes=1, each=9)) == ["red"] * 3
    assert captions(draw_dataset(Colors([2, -1, 1], [(0, 2), (), (1,)]))) == ["green", "red, blue"]
    with pytest.raises(ValueError, match="no images to draw"):
        draw_dataset(Colors([-1], [()]))
