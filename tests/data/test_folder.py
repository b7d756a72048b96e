from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vimtune.data import DatasetError, MissingSplitError, create_dataset
from vimtune.data.base import stratified_split


def fill(folder: Path, count: int, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (12, 10), (i * 5 % 255, 80, 40)).save(folder / f"{i:03d}{suffix}")


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
    fill(tmp_path / "train" / "a", 4)
    with pytest.raises(MissingSplitError, match="no test folder"):
        create_dataset("folder", "test", tmp_path)
    fill(tmp_path / "flat" / "a", 4)
    with pytest.raises(MissingSplitError, match="test_fraction"):
        create_dataset("folder", "test", tmp_path / "flat", test_fraction=0.0)


def test_a_class_may_be_called_train(tmp_path) -> None:
    fill(tmp_path / "train", 10)
    fill(tmp_path / "plane", 10)
    assert create_dataset("folder", "train", tmp_path).classes == ["plane", "train"]


def test_empty_class_is_named(tmp_path) -> None:
    fill(tmp_path / "full", 3)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DatasetError, match=r"without images: .*hollow"):
        create_dataset("folder", "train", tmp_path)


def test_classes_of_the_splits_must_match(tmp_path) -> None:
    fill(tmp_path / "train" / "a", 3)
    fill(tmp_path / "train" / "b", 3)
    fill(tmp_path / "val" / "a", 3)
    fill(tmp_path / "val" / "c", 3)
    with pytest.raises(DatasetError, match=r"missing \['b'\], extra \['c'\]"):
        create_dataset("folder", "val", tmp_path)


def test_wrong_layouts_and_values_are_explained(tmp_path) -> None:
    fill(tmp_path / "val" / "a", 3)
    with pytest.raises(DatasetError, match="no train folder"):
        create_dataset("folder", "train", tmp_path)
    with pytest.raises(DatasetError, match="needs data_dir"):
        create_dataset("folder", "train")
    fill(tmp_path / "images", 3)
    with pytest.raises(DatasetError, match="no class folders"):
        create_dataset("folder", "train", tmp_path / "images")
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
