"""The data set `folder`: which folders it understands and how it splits them."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from vimtune.data import DatasetError, ImageReadError, MissingSplitError, create_dataset
from vimtune.data.own.layout import split_of
from vimtune.data.splitting import stratified_split


def fill(folder: Path, count: int, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (12, 10), (i * 5 % 255, 80, 40)).save(folder / f"{i:03d}{suffix}")


def fill_classes(folder: Path, count: int, names: Sequence[str] = ("a", "b")) -> None:
    for name in names:
        fill(folder / name, count)


def test_drawn_splits_are_disjoint_stratified_and_seeded(tmp_path) -> None:
    fill(tmp_path / "big cat", 40)
    fill(tmp_path / "dog" / "deeper", 20, ".JPG")
    (tmp_path / "dog" / "._001.jpg").write_bytes(b"resource fork")
    (tmp_path / "notes.txt").write_text("not an image")
    parts = {s: create_dataset("folder", s, tmp_path) for s in ("train", "val", "test")}
    assert parts["train"].classes == ["big cat", "dog"]
    assert [Counter(parts[s].targets) for s in ("train", "val", "test")] == [
        {0: 28, 1: 14},
        {0: 6, 1: 3},
        {0: 6, 1: 3},
    ]
    paths = [p for ds in parts.values() for p in ds.paths]
    assert len(set(paths)) == 60
    both = create_dataset("folder", "train+val", tmp_path)
    assert sorted(both.paths) == sorted(parts["train"].paths + parts["val"].paths)
    assert create_dataset("folder", "val", tmp_path).paths == parts["val"].paths
    assert create_dataset("folder", "val", tmp_path, seed=3).paths != parts["val"].paths
    assert len(create_dataset("folder", "val", tmp_path, val_fraction=0.5)) == 30


def test_own_splits_are_used(tmp_path) -> None:
    for split, count in (("train", 8), ("valid", 3), ("test", 2)):
        fill(tmp_path / split / "a", count)
        fill(tmp_path / split / "b", count)
    sizes = {s: len(create_dataset("folder", s, tmp_path)) for s in ("train", "val", "test", "train+val")}
    assert sizes == {"train": 16, "val": 6, "test": 4, "train+val": 22}


def test_val_is_drawn_from_train_where_it_lacks(tmp_path) -> None:
    for split, count in (("train", 20), ("test", 2)):
        fill(tmp_path / split / "a", count)
        fill(tmp_path / split / "b", count)
    train, val = (create_dataset("folder", s, tmp_path) for s in ("train", "val"))
    assert (len(train), len(val)) == (34, 6)
    assert not set(train.paths) & set(val.paths)
    assert len(create_dataset("folder", "train+val", tmp_path)) == 40


def test_missing_test_split_has_its_own_error(tmp_path) -> None:
    fill_classes(tmp_path / "parted" / "train", 4)
    with pytest.raises(MissingSplitError, match="no test folder"):
        create_dataset("folder", "test", tmp_path / "parted")
    fill_classes(tmp_path / "flat", 4)
    with pytest.raises(MissingSplitError, match="test_fraction"):
        create_dataset("folder", "test", tmp_path / "flat", test_fraction=0.0)


def test_a_class_may_be_called_train(tmp_path) -> None:
    fill(tmp_path / "train", 10)
    fill(tmp_path / "plane", 10)
    assert create_dataset("folder", "train", tmp_path).classes == ["plane", "train"]


def test_empty_class_is_named(tmp_path) -> None:
    fill_classes(tmp_path, 3)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DatasetError, match=r"without images: .*hollow"):
        create_dataset("folder", "train", tmp_path)


def test_classes_of_the_splits_must_match(tmp_path) -> None:
    fill(tmp_path / "train" / "a", 3)
    fill(tmp_path / "train" / "b", 3)
    fill(tmp_path / "val" / "a", 3)
    fill(tmp_path / "val" / "c", 3)
    with pytest.raises(DatasetError, match=r"missing 'b', extra 'c'"):
        create_dataset("folder", "val", tmp_path)


def test_wrong_layouts_and_values_are_explained(tmp_path) -> None:
    fill(tmp_path / "val" / "a", 3)
    with pytest.raises(DatasetError, match="no train folder"):
        create_dataset("folder", "train", tmp_path)
    with pytest.raises(DatasetError, match="needs data_dir"):
        create_dataset("folder", "train")
    fill(tmp_path / "loose", 3)
    with pytest.raises(DatasetError, match="no class folders"):
        create_dataset("folder", "train", tmp_path / "loose")
    with pytest.raises(DatasetError, match="leave no train images"):
        create_dataset("folder", "train", tmp_path, val_fraction=0.6, test_fraction=0.4)
    with pytest.raises(DatasetError, match=r"val_fraction=1\.5"):
        create_dataset("folder", "train", tmp_path, val_fraction=1.5)


@pytest.mark.parametrize("fractions", [[0.2], [0.15, 0.15], [0.0, 0.3]])
def test_stratified_split_is_a_partition(fractions: list[float]) -> None:
    targets = [0] * 50 + [1] * 7 + [2] * 3 + [3]
    parts = stratified_split(targets, fractions, seed=0)
    assert sorted(i for part in parts for i in part) == list(range(len(targets)))
    assert {targets[i] for i in parts[-1]} == {0, 1, 2, 3}
    for part, fraction in zip(parts, fractions, strict=False):
        counts = Counter(targets[i] for i in part)
        assert counts[0] == round(50 * fraction)
        assert bool(counts[2]) == (fraction > 0)


def test_drawn_parts_stay_when_the_folder_grows(tmp_path) -> None:
    fill_classes(tmp_path / "before", 40, ("ant", "cat"))
    before = splits_of(tmp_path / "before")
    fill_classes(
        tmp_path / "grown", 40, ("ant", "bee", "cat")
    )  # in the middle: the numbers of classes change
    more = splits_of(tmp_path / "grown")
    assert all(before[split] == {path for path in more[split] if "bee" not in path} for split in before)
    fill(tmp_path / "grown" / "cat", 44)
    most = splits_of(tmp_path / "grown")
    assert {path for path in most["train"] if "ant" in path} == {
        path for path in before["train"] if "ant" in path
    }
    # Of the images that were trained on, those at the borders at most come to the test.
    assert len(before["train"] & most["test"]) <= 2


# --------------------------------------------------------------------------- layouts


def splits_of(folder: Path, **options) -> dict[str, set[str]]:
    """Relative paths of the images of each split that there is."""
    found = {}
    for split in ("train", "val", "test"):
        try:
            dataset = create_dataset("folder", split, folder, **options)
        except MissingSplitError:
            continue
        found[split] = {os.path.relpath(path, folder) for path in dataset.paths}
    return found


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("TRAINING", "VALIDATION", "TESTING"),
        ("Training", None, "Testing"),
        ("train", "dev", "test"),
        ("train", "valid", "test"),
        ("train", "eval", "test"),
        ("training_set", None, "test_set"),
        ("seg_train", None, "seg_test"),
        ("train2017", "val2017", None),
        ("Train Images", "Validation Images", "Test Images"),
        ("trainset", "devset", "testset"),
        ("training-data", "evaluation-data", "holdout"),
    ],
)
def test_split_folders_by_their_usual_names(train: str, val: str | None, test: str | None, tmp_path) -> None:
    """Images of a test folder are never trained on, and its name is no class."""
    for name, count in ((train, 8), (val, 3), (test, 2)):
        if name is not None:
            fill_classes(tmp_path / name, count)
    dataset = create_dataset("folder", "train", tmp_path)
    assert dataset.classes == ["a", "b"]
    assert f"{train}/" in dataset.source
    found = splits_of(tmp_path)
    assert {path.split("/")[0] for path in found["train"]} == {train}
    assert {path.split("/")[0] for path in found["val"]} == {val or train}
    assert ("test" in found) == (test is not None)
    if test is not None:
        assert {path.split("/")[0] for path in found["test"]} == {test}
        assert f"{test}/" in create_dataset("folder", "test", tmp_path).source
    both = create_dataset("folder", "train+val", tmp_path)
    assert {os.path.relpath(path, tmp_path) for path in both.paths} == found["train"] | found["val"]


@pytest.mark.parametrize(
    "name", ["cat", "trainer", "retrain", "testament", "valley", "device", "evaluate me", "set", "7"]
)
def test_other_names_are_no_splits(name: str) -> None:
    assert split_of(name) is None


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("inner", ["classes", "splits"])
def test_a_folder_around_the_data_is_refused_with_the_right_one(depth: int, inner: str, tmp_path) -> None:
    folder = tmp_path.joinpath(*["PetImages", "deep er", "yet deeper"][:depth])
    fill_classes(folder if inner == "classes" else folder / "train", 3)
    fill_classes(folder / "test", 2) if inner == "splits" else None
    (tmp_path / "__MACOSX" / "PetImages").mkdir(parents=True)
    (tmp_path / "readme.txt").write_text("data")
    quoted = f"'{folder}'" if " " in str(folder) else str(folder)
    with pytest.raises(DatasetError, match=re.escape(f"Did you mean --data-dir {quoted}?")):
        create_dataset("folder", "train", tmp_path)
    assert len(create_dataset("folder", "train", folder).classes) == 2


def test_two_data_sets_side_by_side_are_no_classes(tmp_path) -> None:
    for name in ("first", "second"):
        fill_classes(tmp_path / name / "train", 2)
        fill_classes(tmp_path / name / "test", 2)
    with pytest.raises(DatasetError, match=r"holds folders of splits.*--data-dir \S+/first\?"):
        create_dataset("folder", "train", tmp_path)


def test_splits_inside_the_classes_are_refused(tmp_path) -> None:
    for name in ("cat", "dog"):
        fill_classes(tmp_path / name, 2, ("train", "test"))
    with pytest.raises(DatasetError, match=r"cat holds folders of splits \('test', 'train'\)"):
        create_dataset("folder", "train", tmp_path)


def test_one_class_is_refused(tmp_path) -> None:
    fill(tmp_path / "flat" / "cat", 5)
    fill(tmp_path / "parted" / "train" / "cat", 5)
    fill(tmp_path / "hollow" / "cat", 5)
    (tmp_path / "hollow" / "dog").mkdir()
    for name in ("flat", "parted", "hollow"):
        with pytest.raises(DatasetError, match=r"only one folder with images, 'cat'.*at least 2 classes"):
            create_dataset("folder", "train", tmp_path / name)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "train/b", "val/a", "valid/a"], r"two folders for the val split: 'val', 'valid'"),
        (["train/a", "train/b", "Train2/a", "Train2/b"], r"two folders for the train split"),
        (
            ["train/a", "train/b", "test/a", "extra"],
            r"\('test', 'train'\) beside other folders.*'extra'",
        ),
        (["train/a", "cat", "dog"], r"\('train'\) beside other folders.*'cat', 'dog'"),
        (["cat", "dog", "test"], r"'test' beside 'cat', 'dog'"),
        (["train", "test"], r"'test', 'train' with images but no class folders"),
        (["train", "val/a", "val/b"], r"train has no class folders"),
        (["val/a", "test/a"], r"has 'test', 'val' but no train folder"),
    ],
)
def test_ambiguous_layouts_are_refused_with_what_was_found(folders, message: str, tmp_path) -> None:
    for folder in folders:
        fill(tmp_path / folder, 3)
    for split in ("train", "val", "test", "train+val"):
        with pytest.raises(DatasetError, match=message) as error:
            create_dataset("folder", split, tmp_path)
        assert not isinstance(error.value, MissingSplitError)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_test_images_without_labels_are_left_out_and_told(tmp_path) -> None:
    fill_classes(tmp_path / "train", 8)
    fill(tmp_path / "test1", 5)
    train = create_dataset("folder", "train", tmp_path)
    assert "not used: 5 images in test1/" in train.source
    assert "test1" not in "".join(os.path.relpath(path, tmp_path) for path in train.paths)
    with pytest.raises(MissingSplitError, match="test1/"):
        create_dataset("folder", "test", tmp_path)


def test_a_class_called_train_beside_splits(tmp_path) -> None:
    for split in ("train", "test"):
        fill_classes(tmp_path / split, 4, ("plane", "train"))
    assert create_dataset("folder", "test", tmp_path).classes == ["plane", "train"]


def test_hidden_and_system_folders_are_neither_classes_nor_splits(tmp_path) -> None:
    fill_classes(tmp_path, 10)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".cache"):
        fill_classes(tmp_path / name, 2)
        fill(tmp_path / "a" / name, 2)
    datasets = [create_dataset("folder", split, tmp_path) for split in ("train", "val", "test")]
    assert datasets[0].classes == ["a", "b"]
    assert sum(map(len, datasets)) == 20
    assert "left out" not in datasets[0].source


@pytest.mark.parametrize("target", ["..", ".", "../..", "/"])
def test_links_that_lead_back_add_nothing(target: str, tmp_path) -> None:
    root = tmp_path / "root"
    fill_classes(root, 10)
    fill_classes(tmp_path / "other", 3)
    plain = splits_of(root)
    (root / "a" / "back").symlink_to(target)
    if target != "..":
        (root / "loop").symlink_to(target if target != ".." else ".")
    assert splits_of(root) == plain
    assert "link to a folder around it (such as a/back)" in create_dataset("folder", "val", root).source


@pytest.mark.parametrize(
    ("link", "target"),
    [("b/link", "../a"), ("kitten", "a"), ("b/same.png", "../a/000.png"), ("kitten", "b")],
)
def test_links_into_another_class_are_refused(link: str, target: str, tmp_path) -> None:
    fill_classes(tmp_path, 10)
    (tmp_path / link).symlink_to(target)
    with pytest.raises(DatasetError, match=f"{link} links to .*two classes or splits"):
        create_dataset("folder", "train", tmp_path)


@pytest.mark.parametrize(
    ("link", "target"),
    [("val", "train"), ("val/a", "../train/a"), ("val/a/same.png", "../../train/a/000.png")],
)
def test_links_into_another_split_are_refused(link: str, target: str, tmp_path) -> None:
    fill_classes(tmp_path / "train", 5)
    if link != "val":
        fill_classes(tmp_path / "val", 5, ("b",) if link == "val/a" else ("a", "b"))
    (tmp_path / link).symlink_to(target)
    with pytest.raises(DatasetError, match=f"{link} links to .*two classes or splits"):
        create_dataset("folder", "train", tmp_path)


def test_links_within_a_class_count_once(tmp_path) -> None:
    fill_classes(tmp_path, 10)
    plain = splits_of(tmp_path)
    (tmp_path / "a" / "again.png").symlink_to("000.png")
    (tmp_path / "cover.png").symlink_to("a/000.png")
    assert splits_of(tmp_path) == plain
    assert "2 link to what was found already" in create_dataset("folder", "train", tmp_path).source


def test_classes_that_are_links_to_elsewhere_are_followed(tmp_path) -> None:
    fill_classes(tmp_path / "pool", 10)
    (tmp_path / "root").mkdir()
    for name in ("a", "b"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "pool" / name)
    assert splits_of(tmp_path / "root") == splits_of(tmp_path / "pool")


def test_a_class_of_one_image_is_trained_on_and_told(tmp_path) -> None:
    fill_classes(tmp_path, 20)
    fill(tmp_path / "rare", 1)
    train, val = (create_dataset("folder", split, tmp_path) for split in ("train", "val"))
    assert Counter(train.targets)[2] == 1 and 2 not in val.targets
    assert val.classes == ["a", "b", "rare"]
    assert "no images of 'rare'" in val.source and "no images" not in train.source


def test_a_class_without_images_in_its_own_split_is_told(tmp_path) -> None:
    fill_classes(tmp_path / "train", 4)
    fill(tmp_path / "val" / "b", 3)
    (tmp_path / "val" / "a").mkdir()
    val = create_dataset("folder", "val", tmp_path)
    assert val.classes == ["a", "b"] and val.targets == [1, 1, 1]
    assert "no images of 'a'" in val.source


def test_what_is_left_out_is_counted_and_named(tmp_path) -> None:
    for split in ("train", "test"):
        fill_classes(tmp_path / split, 4)
    for name in ("train/a/1.orf", "train/a/2.ORF", "test/b/3.orf", "train/b/x.cr2", "train/loose.png"):
        (tmp_path / name).touch()
    (tmp_path / "top.png").touch()
    train, test = (create_dataset("folder", split, tmp_path).source for split in ("train", "test"))
    assert "2 .orf (such as train/a/1.orf)" in train and "1 .cr2" in train
    assert "2 beside the class folders (such as top.png)" in train
    assert "1 .orf (such as test/b/3.orf)" in test and ".cr2" not in test
    for name in ("only/1.orf", "only/2.orf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=r"no images; left out: 2 \.orf"):
        create_dataset("folder", "train", tmp_path / "only")


def test_names_of_folders_cannot_write_to_the_terminal(tmp_path) -> None:
    root = tmp_path / "x\x1b[2Jy"
    fill_classes(root, 4)
    (root / "a" / "\x1b[31m.heic").touch()
    assert "\x1b" not in create_dataset("folder", "train", root).source
    fill(root / "evil\x1b]0;\n" / "test", 2)
    with pytest.raises(DatasetError) as error:
        create_dataset("folder", "train", root)
    assert str(error.value).isprintable()


def test_class_names_are_text_that_files_can_hold(tmp_path) -> None:
    fill_classes(tmp_path, 4)
    fill(tmp_path / "caf\udce9", 4)
    dataset = create_dataset("folder", "train", tmp_path)
    assert dataset.classes == ["a", "b", r"caf\udce9"] and set(dataset.targets) == {0, 1, 2}


def test_deep_folders_are_read_without_recursion(tmp_path) -> None:
    fill_classes(tmp_path, 2)
    deep = f"{tmp_path}/a" + "/d" * 300
    os.makedirs(deep)
    shutil.copy(tmp_path / "a" / "000.png", deep)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        whole = create_dataset("folder", "train", tmp_path, val_fraction=0.0, test_fraction=0.0)
    finally:
        sys.setrecursionlimit(limit)
    assert len(whole) == 5


def test_a_fingerprint_notices_every_change_but_not_a_move(tmp_path) -> None:
    root = tmp_path / "one"
    fill_classes(root, 10)

    def fingerprints(folder: Path = root) -> list[str]:
        return [create_dataset("folder", split, folder).fingerprint() for split in ("train", "val", "test")]

    before = fingerprints()
    assert len(set(before)) == 3 and fingerprints() == before
    shutil.copytree(root, tmp_path / "two")
    assert fingerprints(tmp_path / "two") == before
    last = create_dataset("folder", "train", root).paths[-1]
    content = Path(last).read_bytes()
    Path(last).write_bytes(content + b"!")
    assert fingerprints()[0] != before[0] and fingerprints()[1:] == before[1:]
    Path(last).write_bytes(content)
    assert fingerprints() == before
    renamed = Path(last).rename(Path(last).with_name("zzz.png"))
    assert fingerprints() != before
    renamed.rename(root / "a" / os.path.basename(last).replace(".png", "-moved.png"))
    assert fingerprints() != before


def test_a_fingerprint_of_vanished_images_is_an_error_of_the_system(tmp_path) -> None:
    fill_classes(tmp_path, 4)
    dataset = create_dataset("folder", "train", tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(ImageReadError, match="No such file"):
        dataset.fingerprint()
