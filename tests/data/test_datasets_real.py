"""The real data sets, where they are at hand, and their fixed splits."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files

import pytest

from vimtune.data import DatasetError, create_dataset
from vimtune.data.caltech_split import SPLIT_SEED, draw_split, format_split, load_split, select_numbers

FOLDERS = {"flowers": "flowers", "caltech": "caltech101", "cars": "stanford_cars"}
SIZES = {
    "flowers": {"train": 1020, "val": 1020, "test": 6149, "train+val": 2040},
    "caltech": {"train": 2550, "val": 510, "test": 6084, "train+val": 3060},
    "cars": {"test": 8041, "train+val": 8144},
}
CLASSES = {"flowers": 102, "caltech": 102, "cars": 196}


@pytest.fixture(params=sorted(FOLDERS))
def real(request, shared_dir):
    folder = shared_dir / "data" / FOLDERS[request.param]
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return request.param, folder


def test_counts_classes_and_disjoint_splits(real) -> None:
    name, folder = real
    splits = {
        s: create_dataset(name, s, folder, download=False) for s in ("train", "val", "test", "train+val")
    }
    for split, size in SIZES[name].items():
        assert len(splits[split]) == size
    for ds in splits.values():
        assert len(set(ds.classes)) == CLASSES[name]
        assert all(len(c) > 2 and "_" not in c for c in ds.classes)
        assert set(ds.targets) == set(range(CLASSES[name])) or ds.split == "val"
        assert f"{len(ds):,} images" in ds.source and str(folder) in ds.source
    train, val, test = (set(splits[s].paths) for s in ("train", "val", "test"))
    assert not (train & val or train & test or val & test)
    assert train | val == set(splits["train+val"].paths)
    image = splits["test"].load(5)
    assert image.mode == "RGB" and min(image.size) >= 64
    assert splits["test"].describe(5) == splits["test"].paths[5]


def test_parent_folder_works_too(real) -> None:
    name, folder = real
    direct = create_dataset(name, "test", folder, download=False)
    assert create_dataset(name, "test", folder.parent, download=False).paths == direct.paths


def test_labels_equal_torchvision(shared_dir) -> None:
    from torchvision.datasets import Flowers102, StanfordCars

    data = shared_dir / "data"
    if not (data / "flowers").is_dir() or not (data / "stanford_cars").is_dir():
        pytest.skip("no real data")
    for split in ("train", "val", "test"):
        ours = create_dataset("flowers", split, data / "flowers", download=False)
        theirs = Flowers102(data / "flowers", split)
        assert ours.targets == theirs._labels
        assert ours.paths == [str(p) for p in theirs._image_files]
    ours = create_dataset("cars", "test", data, download=False)
    theirs = StanfordCars(data, "test")
    assert list(zip(ours.paths, ours.targets, strict=True)) == theirs._samples
    assert ours.classes == theirs.classes


def test_cars_val_is_a_stratified_tenth_fixed_by_the_seed(shared_dir) -> None:
    folder = shared_dir / "data" / "stanford_cars"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    val = create_dataset("cars", "val", folder)
    whole = Counter(create_dataset("cars", "train+val", folder).targets)
    for label, count in Counter(val.targets).items():
        assert abs(count - whole[label] / 10) <= 0.5
    assert set(val.targets) == set(range(196))
    assert val.paths == create_dataset("cars", "val", folder).paths
    assert val.paths != create_dataset("cars", "val", folder, seed=1).paths


def test_caltech_split_file_is_what_the_seed_draws() -> None:
    split = load_split()
    counts = {name: entry.count for name, entry in split.categories.items()}
    assert split == draw_split(counts, SPLIT_SEED)
    assert split != draw_split(counts, SPLIT_SEED + 1)
    assert len(counts) == 102 and sum(counts.values()) == 9144
    for entry in split.categories.values():
        parts = {part: select_numbers(entry, part) for part in ("train", "val", "test", "train+val")}
        assert [len(parts[p]) for p in ("train", "val", "train+val")] == [25, 5, 30]
        assert sorted(parts["train+val"] + parts["test"]) == list(range(1, entry.count + 1))
    shipped = files("vimtune.data").joinpath("caltech101_split.json").read_text(encoding="utf-8")
    assert format_split(split) == shipped


def test_incomplete_caltech_names_a_missing_image(tmp_path) -> None:
    (tmp_path / "101_ObjectCategories" / "ant").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"2550 of 2,550 images missing, e\.g\. .*image_"):
        create_dataset("caltech", "train", tmp_path, download=False)
