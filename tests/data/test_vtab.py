"""VTAB-1k's folders: what the lists say, and lists that are wrong or lead elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vimtune.data import DatasetError, MissingSplitError, create_dataset

LISTS = {"train800.txt": "train", "val200.txt": "val", "train800val200.txt": "both", "test.txt": "test"}
COUNTS = {"train": 8, "val": 2, "test": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a made-up task with 4 classes, as `<data-dir>/vtab-1k/kitti`."""
    root = tmp_path / "vtab-1k" / "kitti"
    (root / "images").mkdir(parents=True)
    lines: dict[str, list[str]] = {"both": []}
    for split, count in COUNTS.items():
        lines[split] = []
        for number in range(count):
            name = f"images/{split} {number}.png"  # blanks in the name are a part of it
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name)
            lines[split].append(f"{name} {number % 4}")
    lines["both"] = lines["train"] + lines["val"]
    for name, split in LISTS.items():
        (root / name).write_text("\n".join(lines[split]) + "\n")
    return root


def vtab(split: str, root: Path, task: str = "kitti"):
    return create_dataset("vtab", split, root, task=task)


def test_the_splits_are_those_of_the_lists_wherever_the_folder_is_named(folder: Path) -> None:
    for data_dir in (folder, folder.parent, folder.parent.parent):
        sizes = {split: len(vtab(split, data_dir)) for split in ("train", "val", "train+val", "test")}
        assert sizes == {"train": 8, "val": 2, "train+val": 10, "test": 5}
    train = vtab("train", folder)
    assert train.targets == [0, 1, 2, 3, 0, 1, 2, 3]
    assert train.classes == ["class 0", "class 1", "class 2", "class 3"]
    assert train.load(3).getpixel((0, 0)) == (3, 0, 0)
    assert "VTAB-1k kitti, train split of train800.txt in" in train.source
    assert {train.describe(i) for i in range(8)} < {vtab("train+val", folder).describe(i) for i in range(10)}


def test_without_a_list_of_all_training_images_it_is_the_two_together(folder: Path) -> None:
    whole = [vtab("train+val", folder).describe(i) for i in range(10)]
    (folder / "train800val200.txt").unlink()
    joined = vtab("train+val", folder)
    assert [joined.describe(i) for i in range(10)] == whole
    assert "train800.txt and val200.txt" in joined.source


def test_a_list_that_is_not_there_is_a_missing_split(folder: Path) -> None:
    (folder / "test.txt").unlink()
    with pytest.raises(MissingSplitError, match=r"has no test\.txt for the split 'test'; it has train800"):
        vtab("test", folder)
    assert len(vtab("train", folder)) == 8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/a.png", "expected `path label`, found 'images/a.png'"),
        ("images/a.png zero", "expected a label from 0 to 99999, found 'zero'"),
        ("images/a.png -1", "expected a label from 0 to 99999"),
        ("images/a.png " + "9" * 5000, "expected a label from 0 to 99999"),
        ("images/a.png 4", "from 0 to 3, because this task has 4 classes; found 4"),
        ("../secret.png 0", "'../secret.png' is no path of a file below the folder"),
        ("images/../../secret.png 0", "is no path of a file below"),
        ("/etc/passwd 0", "'/etc/passwd' is no path of a file below"),
        ("..\\secret.png 0", "is no path of a file below"),
        ("images/\0.png 0", "is no path of a file below"),
        ("a" * 2000 + " 0", "is no path of a file below"),
        ("images/train 0.png 0", "'images/train 0.png' stands in line 1 already"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_line(folder: Path, line: str, message: str) -> None:
    with open(folder / "train800.txt", "a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(DatasetError) as error:
        vtab("train", folder)
    text = str(error.value)
    assert message in text and f"{folder}/train800.txt, line 10: " in text
    assert "\n" not in text and len(text) < 700


def test_lists_that_do_not_fit_together_are_refused(folder: Path) -> None:
    lists = {name: (folder / name).read_text() for name in LISTS}
    (folder / "test.txt").write_text(lists["test.txt"] + "images/val 0.png 0\n")
    with pytest.raises(DatasetError, match=r"1 image both in val200\.txt and in test\.txt, such as 'images/"):
        vtab("train", folder)
    (folder / "test.txt").write_text(lists["test.txt"])
    (folder / "train800val200.txt").write_text(lists["train800.txt"])
    with pytest.raises(DatasetError, match=r"does not have the labels of train800\.txt and val200\.txt"):
        vtab("train+val", folder)


def test_what_is_no_list_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "val200.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match=r"val200\.txt has no lines"):
        vtab("val", folder)
    (folder / "val200.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match="is not a text file"):
        vtab("val", folder)
    (folder / "val200.txt").write_text("images/gone.png 0\n")
    (folder / "train800val200.txt").unlink()
    with pytest.raises(DatasetError, match=r"1 of 1 image missing, e\.g\. .*gone\.png"):
        vtab("val", folder)
    with pytest.raises(DatasetError, match=r"task 'cifr' of VTAB-1k is not in .*Did you mean 'cifar'"):
        vtab("train", tmp_path, task="cifr")
    with pytest.raises(DatasetError, match="no name of a folder"):
        vtab("train", tmp_path, task="../kitti")
