"""Images whose classes are matched with those of a model by name, and folders that are scored whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vimtune.data import DatasetError
from vimtune.data.matching import match_classes
from vimtune.data.own.labelled_folder import LabelledFolder


def fill(folder: Path, **classes: int) -> Path:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> LabelledFolder:
    return LabelledFolder(fill(tmp_path / "photos", cat=2, dog=3, eel=0, owl=1))


def test_every_image_below_a_class_folder_counts(folder: LabelledFolder) -> None:
    assert folder.classes == ["cat", "dog", "eel", "owl"] and folder.targets == [0, 0, 1, 1, 1, 3]
    assert "no images of 'eel'" in folder.source and folder.split == "folder"
    assert folder.load(0).size == (4, 4) and folder.describe(0).endswith("cat/0.png")


def test_one_class_is_enough_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    root = fill(tmp_path, cat=1)
    Image.new("RGB", (4, 4)).save(root / "loose.png")
    found = LabelledFolder(root)
    assert found.targets == [0] and "left out: 1 images beside the class folders" in found.source


def test_the_same_classes_are_left_alone(folder: LabelledFolder) -> None:
    found = match_classes(folder, ["cat", "dog", "eel", "owl"])
    assert found.dataset is folder and found.notes() == []


def test_labels_are_those_of_the_model(folder: LabelledFolder) -> None:
    found = match_classes(folder, ["owl", "fox", "dog", "eel"])
    assert found.dataset.classes == ["owl", "fox", "dog", "eel"] and found.dataset.targets == [2, 2, 2, 0]
    names = [Path(found.dataset.describe(index)).parent.name for index in range(4)]
    assert names == ["dog", "dog", "dog", "owl"] and found.dataset.load(3).size == (4, 4)
    assert found.unknown == {"cat": 2} and found.absent == ["fox"]
    assert found.notes() == [
        "Left out: 2 images of classes that the model does not know ('cat').",
        "The data have no class 'fox', which the model knows.",
    ]
    assert found.dataset.fingerprint() != match_classes(folder, ["owl", "dog"]).dataset.fingerprint()


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (
            ["ant", "bee"],
            "the model knows none of the classes of the images: it has 'ant', 'bee'; the images",
        ),
        (["cat", "cat"], "several classes of one name .'cat'."),
    ],
)
def test_classes_that_cannot_be_matched(classes: list[str], expected: str, folder: LabelledFolder) -> None:
    with pytest.raises(DatasetError, match=expected):
        match_classes(folder, classes)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "has no images; expected"),
        ({"cat": 0}, "has no images"),
        ({"train/cat": 2, "test/cat": 1}, "holds folders of splits .'test', 'train'.: name one of them"),
    ],
)
def test_folders_without_labels_are_refused(content: dict[str, int], expected: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=expected):
        LabelledFolder(fill(tmp_path, **content))


def test_images_without_a_class_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(DatasetError, match="has 1 images beside no class folder"):
        LabelledFolder(tmp_path)
    (tmp_path / "labels.csv").touch()
    told = r"and 'labels.csv', which --dataset csv --data-dir .* reads; expected"
    with pytest.raises(DatasetError, match=told):
        LabelledFolder(tmp_path)
    with pytest.raises(DatasetError, match="there is no such folder"):
        LabelledFolder(tmp_path / "nothing")
