"""The data set `csv`: which tables it understands, and that no image and no row is left out unsaid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from vimtune.data import DatasetError, MissingSplitError, create_dataset
from vimtune.data.loading.samples import targets_of


def draw(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5)).save(folder / name)


def write(path: Path, rows: Iterable[str]) -> None:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def shown(dataset) -> dict[str, str]:
    """Class by name of the file."""
    return {Path(p).name: dataset.classes[t] for p, t in zip(dataset.paths, dataset.targets, strict=True)}


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten cats and ten dogs, in a table without splits."""
    names = [f"pics/{kind}{i}.png" for kind in ("cat", "dog") for i in range(10)]
    draw(tmp_path, names)
    write(tmp_path / "labels.csv", ["path,label", *(f"{name},{name[5:8]}" for name in names)])
    return tmp_path


def test_a_table_is_split_as_class_folders_are(photos) -> None:
    parts = {split: create_dataset("csv", split, photos) for split in ("train", "val", "test")}
    assert [Counter(part.targets) for part in parts.values()] == [{0: 6, 1: 6}, {0: 2, 1: 2}, {0: 2, 1: 2}]
    assert len({path for part in parts.values() for path in part.paths}) == 20
    assert all(name.startswith(label) for part in parts.values() for name, label in shown(part).items())
    assert create_dataset("csv", "val", photos, seed=1).paths != parts["val"].paths
    assert "left out" not in parts["train"].source and "not used" not in parts["train"].source


@pytest.mark.parametrize(
    ("file", "header", "options"),
    [
        ("labels.csv", "\ufefffile_name;Category", {}),
        ("metadata.csv", "IMAGE\tclass", {}),
        ("labels.tsv", "image\tclass", {}),
        ("METADATA.TSV", "path\tspecies", {"labels": "METADATA.TSV"}),
        ("mine.tsv", "a, b, c\tpath", {"labels": "mine.tsv", "label_column": "a, b, c"}),
        ("mine.csv", "what,where", {"labels": "mine.csv", "path_column": "where", "label_column": "what"}),
    ],
)
def test_columns_are_found_by_usual_names_or_told(file, header, options, photos) -> None:
    sign = next(sign for sign in ";\t," if sign in header)
    rows = [line.split(",") for line in (photos / "labels.csv").read_text().splitlines()[1:]]
    (photos / "labels.csv").unlink()
    order = -1 if header.startswith(("what", "a, b")) else 1
    write(photos / file, [header, *(sign.join(row[::order]) for row in rows)])
    found = create_dataset("csv", "train", photos, **options)
    assert found.classes == ["cat", "dog"] and len(found) == 12


def test_files_of_splits_may_have_tabs(photos) -> None:
    (photos / "labels.csv").unlink()
    for split, file in (("train", "train.tsv"), ("val", "validation.tsv"), ("test", "test.tsv")):
        numbers = {"train": range(6), "val": range(6, 8), "test": range(8, 10)}[split]
        rows = (f"pics/{kind}{i}.png\t{kind}" for kind in ("cat", "dog") for i in numbers)
        write(photos / file, ["path\tlabel", *rows])
    found = {split: len(create_dataset("csv", split, photos)) for split in ("train", "val", "test")}
    assert found == {"train": 12, "val": 4, "test": 4}


def test_of_several_files_for_the_same_images_the_others_are_named(photos) -> None:
    write(photos / "labels.tsv", ["path\tlabel", *(f"pics/cat{i}.png\tdog" for i in range(4))])
    write(photos / "train.csv", ["path,label", "pics/cat0.png,dog", "pics/dog0.png,cat"])
    found = create_dataset("csv", "train", photos)
    assert "not used: 'labels.tsv', 'train.csv' beside 'labels.csv'" in found.source
    assert "not used" not in create_dataset("csv", "train", photos, labels="labels.csv").source
    (photos / "labels.csv").unlink()
    (photos / "labels.tsv").unlink()
    write(photos / "train.tsv", ["path\tlabel", "pics/cat1.png\tdog", "pics/dog1.png\tcat"])
    found = create_dataset("csv", "train+val", photos)
    assert shown(found) == {"cat0.png": "dog", "dog0.png": "cat"}
    assert "not used: 'train.tsv' beside 'train.csv'" in found.source


def test_tables_of_other_kinds_are_told_which_are_read(photos) -> None:
    (photos / "labels.csv").rename(photos / "labels.xlsx")
    with pytest.raises(DatasetError, match=r"has no file of labels. Expected .*labels.csv .*\.tsv"):
        create_dataset("csv", "train", photos)
    with pytest.raises(DatasetError, match=r"labels.xlsx: expected .* ends in .jsonl, .json, .csv, .tsv"):
        create_dataset("csv", "train", photos, labels="labels.xlsx")


def test_paths_may_lack_endings_and_start_at_a_folder_below(photos) -> None:
    write(photos / "labels.csv", ["id,label", *(f"{k}{i},{k}" for k in ("cat", "dog") for i in range(9))])
    found = create_dataset("csv", "train+val", photos, images="pics")
    assert all(name.startswith(label) for name, label in shown(found).items())
    assert "not used: 2 images that no row names (such as pics/cat9.png)" in found.source


def test_absolute_paths_below_the_folder_and_windows_paths_are_understood(photos) -> None:
    write(photos / "labels.csv", ["path,label", f"{photos}/pics/cat0.png,cat", "pics\\dog0.png,dog"])
    assert shown(create_dataset("csv", "train", photos)) == {"cat0.png": "cat", "dog0.png": "dog"}


def test_own_splits_are_used_from_a_column_or_from_files(photos) -> None:
    rows = (photos / "labels.csv").read_text().splitlines()[1:]
    part = lambda row: "valid" if row[8] == "8" else "Test" if row[8] == "9" else "training"  # noqa: E731
    write(photos / "labels.csv", ["path,label,split", *(f"{row},{part(row)}" for row in rows)])
    column = {split: create_dataset("csv", split, photos) for split in ("train", "val", "test", "train+val")}
    assert [len(each) for each in column.values()] == [16, 2, 2, 18]
    (photos / "labels.csv").unlink()
    for split, file in (("training", "train.csv"), ("valid", "val.csv"), ("Test", "test.csv")):
        write(photos / file, ["path,label", *(row for row in rows if part(row) == split)])
    files = {split: create_dataset("csv", split, photos) for split in column}
    assert [each.paths for each in files.values()] == [each.paths for each in column.values()]
    (photos / "test.csv").unlink()
    with pytest.raises(MissingSplitError, match="no test images"):
        create_dataset("csv", "test", photos)


TAGS = {"a.png": "sky;sea", "b.png": "sea", "c.png": "", "d.png": "sand; sea ;", "e.png": "sky"}


@pytest.mark.parametrize("columns", [False, True])
def test_an_image_may_have_several_labels_or_none(columns: bool, tmp_path) -> None:
    draw(tmp_path, TAGS)
    if columns:
        names = ["sand", "sea", "sky"]
        marks = [",".join([name, *("01"[each in own] for each in names)]) for name, own in TAGS.items()]
        write(tmp_path / "labels.csv", [",".join(["path", *names]), *marks])
        options = {}
    else:
        write(tmp_path / "labels.csv", ["path,tags", *(f"{name},{own}" for name, own in TAGS.items())])
        options = {"separator": ";"}
    found = create_dataset("csv", "train+val", tmp_path, val_fraction=0.0, test_fraction=0.0, **options)
    assert found.classes == ["sand", "sea", "sky"]
    assert found.tags == [(1, 2), (1,), (), (0, 1), (2,)]
    assert found.targets == [2, 1, -1, 0, 2]  # the rarest of each
    assert targets_of(found, [2, 0]).tolist() == [[0, 0, 0], [0, 1, 1]]
    other = create_dataset("csv", "train+val", tmp_path, val_fraction=0.0, test_fraction=0.0, **options)
    other.tags[1] = (1, 2)
    assert other.targets == found.targets and other.fingerprint() != found.fingerprint()


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["path,label", "pics/cat0.png,cat", "pics/none.png,dog"], "1 of 2 images are not in .*line 3"),
        (["path,label", "pics/cat0.png,cat", "pics/dog0.png,"], "line 3: no label"),
        (["path,label", "pics/cat0.png,cat", "pics/cat0.png,dog"], "line 3: .*line 2 already"),
        (["path,label", "../cat0.png,cat"], "line 2: .* is no path of an image below"),
        (["path,label", "/etc/passwd,cat"], "line 2: .* is no path of an image below"),
        (["path,label", "pics/cat0.png,cat"], "has 1 classes"),
        (["pics/cat0.png,cat"], "is empty|no column of paths"),
        (["a,b", "pics/cat0.png,cat"], "no column of paths.*path_column"),
        (["path,kind", "pics/cat0.png,cat"], "no column of labels.*label_column"),
        (
            ["path,label,split", "pics/cat0.png,cat,tset"],
            "column 'split': expected train, val or test, found",
        ),
        (["path,label,split", "pics/cat0.png,cat,val", "pics/dog0.png,dog,val"], "no row is one of train"),
        (["path,label,split", "pics/cat0.png,cat,train", "pics/dog0.png,dog,val"], "no images of 'dog'"),
        (["path,a,b", "pics/cat0.png,1,0", "pics/dog0.png,2,0"], "line 3: column 'a': expected 0 or 1"),
        (["path,label", "pics/cat0.png,cat,1"], "line 2 has 3 cells"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(rows, told: str, photos) -> None:
    write(photos / "labels.csv", rows)
    with pytest.raises(DatasetError, match=told) as error:
        create_dataset("csv", "train", photos)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["labels", "images"])
def test_options_lead_nowhere_else(option: str, photos) -> None:
    for value in ("../x.csv", "/etc/passwd", "missing"):
        with pytest.raises(DatasetError, match=option):
            create_dataset("csv", "train", photos, **{option: value})
