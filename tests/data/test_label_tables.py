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
        (["path,label,split", "pics/cat0.png,cat,val", "pics/dog0.png,dog,val"], "no images to train on"),
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


def parted(folder: Path, column: str, train: str, test: str) -> None:
    """The photos in a table of train and one of test, whose rows end as they are told."""
    (folder / "labels.csv").unlink()
    for split, numbers, end in (("train", range(8), train), ("test", range(8, 10), test)):
        rows = (f"pics/{kind}{i}.png,{kind}{end}" for kind in ("cat", "dog") for i in numbers)
        write(folder / f"{split}.csv", [f"path,label{column}", *rows])


@pytest.mark.parametrize("place", ["train", "test"])
def test_a_column_of_splits_must_not_contradict_the_table_of_a_split(place: str, photos) -> None:
    parted(photos, ",split", ",Training", ",test")
    assert len(create_dataset("csv", "train+val", photos)) == 16
    table, line = photos / f"{place}.csv", {"train": 17, "test": 4}[place]
    text = table.read_text()
    own, other = ("Training", "test") if place == "train" else ("test", "train")
    row = "7.png,dog," if place == "train" else "8.png,dog,"
    for wrong in (other, "fold one"):
        table.write_text(text.replace(f"{row}{own}", f"{row}{wrong}"))
        told = rf"{place}.csv, line {line}: column 'split': found '{wrong}' .*move the row"
        with pytest.raises(DatasetError, match=told):
            create_dataset("csv", "train", photos)


def test_a_column_of_splits_in_one_of_several_tables_is_enough(photos) -> None:
    parted(photos, ",split", ",train", ",")  # An empty cell contradicts nothing.
    assert len(create_dataset("csv", "test", photos)) == 4
    write(photos / "train.csv", [row.rpartition(",")[0] for row in (photos / "train.csv").open()])
    assert len(create_dataset("csv", "test", photos)) == 4
    text = (photos / "test.csv").read_text()
    (photos / "test.csv").write_text(text.replace("dog,", "dog,train"))
    with pytest.raises(DatasetError, match=r"test.csv, line 4: .*found 'train' in the table of test"):
        create_dataset("csv", "train", photos)


def test_one_table_by_name_goes_by_its_own_column(photos) -> None:
    parted(photos, ",split", ",train", ",test")
    (photos / "train.csv").write_text(
        (photos / "train.csv").read_text().replace("7.png,dog,train", "7.png,dog,test")
    )
    assert len(create_dataset("csv", "test", photos, labels="train.csv")) == 1


def test_marks_may_be_true_and_false(tmp_path) -> None:
    """As pandas writes them by get_dummies."""
    draw(tmp_path, ["a.png", "b.png", "c.png"])
    write(tmp_path / "labels.csv", ["path,x,y", "a.png,True,False", "b.png,FALSE,true", "c.png,1,0"])
    found = create_dataset("csv", "train+val", tmp_path, val_fraction=0.0, test_fraction=0.0)
    assert found.tags == [(0,), (1,), (0,)]
    write(tmp_path / "labels.csv", ["path,x,y", "a.png,True,False", "b.png,yes,no", "c.png,1,0"])
    with pytest.raises(DatasetError, match=r"line 3: column 'x': expected 0 or 1, .*found 'yes'"):
        create_dataset("csv", "train", tmp_path)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_table_without_labels_beside_that_of_train_is_named_and_not_used(split: str, photos) -> None:
    """Competitions publish such a table of test images."""
    parted(photos, "", "", "")
    (photos / "test.csv").unlink()
    write(
        photos / f"{split}.csv", ["id", *(f"pics/{kind}{i}" for kind in ("cat", "dog") for i in (8, 9, 10))]
    )
    write(photos / "train.csv", [row.replace("path", "id").strip() for row in (photos / "train.csv").open()])
    found = create_dataset("csv", "train", photos)
    assert found.source.endswith(f"; not used: '{split}.csv', which has no column of labels")
    assert len(found) + len(create_dataset("csv", "val", photos)) == 16
    with pytest.raises(MissingSplitError, match=r"no test images; not used: .*which has no column of labels"):
        create_dataset("csv", "test", photos)
    write(photos / f"{split}.csv", ["id,class", "pics/cat8,cat"])  # Labels, but by another name.
    with pytest.raises(DatasetError, match=r"no column 'label': found 'id', 'class'. All tables"):
        create_dataset("csv", "train", photos)


def test_a_table_without_the_columns_of_classes_is_not_used_either(tmp_path) -> None:
    draw(tmp_path, [f"{i}.png" for i in range(5)])
    write(tmp_path / "train.csv", ["id,x,y", *(f"{i},{i % 2},1" for i in range(4))])
    write(tmp_path / "test.csv", ["id,size", "4,12"])
    found = create_dataset("csv", "train+val", tmp_path)
    assert found.classes == ["x", "y"] and len(found) == 4
    assert found.source.endswith("; not used: 'test.csv', which has no column of labels")


@pytest.mark.parametrize("cell", ["nan", "NaN", "<NA>"])
def test_what_pandas_writes_for_an_empty_cell_is_no_label(cell: str, photos) -> None:
    rows = (photos / "labels.csv").read_text().splitlines()
    write(photos / "labels.csv", [*rows[:3], f"pics/cat2.png,{cell}", *rows[4:]])
    with pytest.raises(DatasetError, match=r"line 4: no label in column 'label' \(.* an empty cell\)"):
        create_dataset("csv", "train", photos)
    found = create_dataset("csv", "train+val", photos, separator="|", test_fraction=0.0)
    assert found.classes == ["cat", "dog"] and found.tags.count(()) == 1


def test_images_without_labels_are_told_of_the_separator(photos) -> None:
    """The table does not know that its images may have several labels, or none."""
    rows = ["path,label", "pics/cat0.png,cat;dog", "pics/dog0.png,dog", "pics/cat1.png,"]
    write(photos / "labels.csv", rows)
    with pytest.raises(DatasetError, match=r"line 4: no label .*several labels or none, give separator=; "):
        create_dataset("csv", "train", photos)
    found = create_dataset("csv", "train+val", photos, separator=";", val_fraction=0, test_fraction=0)
    assert found.tags is not None and found.tags.count(()) == 1


@pytest.mark.parametrize("cell", ["NA", "None", "n/a", "null"])
def test_a_class_that_may_be_an_empty_cell_is_mentioned(cell: str, photos) -> None:
    table = photos / "labels.csv"
    assert "taken for a class" not in create_dataset("csv", "train", photos).source
    table.write_text(table.read_text().replace(",dog", f",{cell}"))
    found = create_dataset("csv", "train", photos)
    assert f"'{cell}' is taken for a class (10 images), not for an empty cell" in found.source
    assert cell in found.classes


@pytest.mark.parametrize("sign", [";", "|", ","])
def test_labels_that_are_made_of_others_are_mentioned(sign: str, photos) -> None:
    rows = ["path\tlabel", *(f"pics/{kind}{i}.png\t{kind}" for kind in ("cat", "dog") for i in range(6))]
    joined = [f"pics/{kind}{i}.png\tcat{sign} dog" for kind in ("cat", "dog") for i in (6, 7)]
    (photos / "labels.csv").unlink()
    write(photos / "labels.tsv", [*rows, *joined])
    told = f"classes that are made of others: 'cat{sign} dog'; if these are several labels of an image, give"
    assert f"{told} separator={sign} and train" in create_dataset("csv", "train", photos).source
    assert "made of others" not in create_dataset("csv", "train", photos, separator=sign).source
    one = [row if row.endswith("cat") else f"{row}{sign} small" for row in rows[1:]]
    write(photos / "labels.tsv", [rows[0], *one])  # A name with such a sign in it is no sum of others.
    assert "made of others" not in create_dataset("csv", "train", photos).source
    pairs = [(0, f"cat{sign}dog"), (1, f"dog{sign}owl"), (2, f"owl{sign}cat"), (3, "ape")]
    write(photos / "labels.tsv", [rows[0], *(f"pics/cat{i}.png\t{name}" for i, name in pairs)])
    found = create_dataset("csv", "train", photos, val_fraction=0, test_fraction=0)
    assert f"made of others: 'cat{sign}dog', 'dog{sign}owl', 'owl{sign}cat';" in found.source


@pytest.mark.parametrize("column", [False, True])
def test_a_table_of_test_images_alone_can_be_scored_and_not_trained_on(column: bool, photos) -> None:
    rows = (photos / "labels.csv").read_text().splitlines()
    (photos / "labels.csv").unlink()
    if column:
        write(photos / "labels.csv", [f"{rows[0]},split", *(f"{row},test" for row in rows[1:])])
    else:
        write(photos / "test.csv", rows)
    found = create_dataset("csv", "test", photos)
    assert len(found) == 20 and found.classes == ["cat", "dog"]
    for split in ("train", "val", "train+val"):
        with pytest.raises(MissingSplitError, match=r"no images to train on.*of 'test', which vimtune eval"):
            create_dataset("csv", split, photos)


@pytest.mark.parametrize("option", ["labels", "images"])
def test_options_lead_nowhere_else(option: str, photos) -> None:
    for value in ("../x.csv", "/etc/passwd", "missing"):
        with pytest.raises(DatasetError, match=option):
            create_dataset("csv", "train", photos, **{option: value})
