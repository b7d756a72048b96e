"""Tiny-ImageNet: its two folders, its splits, and packed files that are wrong."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vimtune.data import CorruptImageError, DatasetError, ImageDataset, create_dataset
from vimtune.data.files.images import load_image
from vimtune.data.files.packed import read_packed

WNIDS = ["n01443537", "n01629819", "n01641577"]
NAMES = ["goldfish, Carassius auratus", "European fire salamander", "bullfrog"]
CLASSES = ["goldfish", "European fire salamander", "bullfrog"]
PER_CLASS = 20
"""Training images of each class; there are 5 to test on."""


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (number, 2 * number, 255 - number))


def red(images: ImageDataset, index: int) -> int:
    """The number with which an image was painted."""
    return images.load(index).getpixel((5, 5))[0]


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def pack(path: Path, numbers: list[int], **changes: object) -> Path:
    blobs = [encoded(number) for number in numbers]
    arrays = {
        "blob": np.frombuffer(b"".join(blobs), np.uint8),
        "offset": np.cumsum([0, *map(len, blobs)]),
        "label": np.array([number % 3 for number in numbers], np.int16),
    }
    np.savez(path, **{**arrays, **changes})
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with both layouts, each of which has its own subfolder."""
    data = tmp_path_factory.mktemp("data")
    packed = data / "packed" / "tiny_imagenet"
    packed.mkdir(parents=True)
    (packed / "wnids.json").write_text(json.dumps(WNIDS))
    (packed / "class_names.json").write_text(json.dumps(NAMES))
    pack(packed / "train_0.npz", list(range(30)))
    pack(packed / "train_1.npz", list(range(30, 60)))
    pack(packed / "val.npz", list(range(100, 115)))
    official = data / "official" / "tiny-imagenet-200"
    (official / "val" / "images").mkdir(parents=True)
    (official / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(WNIDS)))
    words = [f"{wnid}\t{name}\n" for wnid, name in zip(WNIDS, NAMES, strict=True)]
    (official / "words.txt").write_text("".join(["n00001740\tentity\n", *words]))
    for number in range(60):
        path = official / "train" / WNIDS[number % 3] / "images" / f"{WNIDS[number % 3]}_{number:03}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, "PNG")  # The content of a file decides, and this one is exact.
    lines = []
    for number in range(100, 115):
        picture(number).save(official / "val" / "images" / f"val_{number}.JPEG", "PNG")
        lines.append(f"val_{number}.JPEG\t{WNIDS[number % 3]}\t0\t32\t44\t62\n")
    (official / "val" / "val_annotations.txt").write_text("".join(lines))
    return data


@pytest.mark.parametrize(("layout", "name"), [("packed", "tiny_imagenet"), ("official", "tiny-imagenet-200")])
def test_both_folders_hold_the_same_classes_and_splits(folders: Path, layout: str, name: str) -> None:
    for data_dir in (folders / layout, folders / layout / name):
        parts = {
            split: create_dataset("tiny_imagenet", split, data_dir, val_fraction=0.2, download=False)
            for split in ("train", "val", "test", "train+val")
        }
        assert {split: len(part) for split, part in parts.items()} == {
            "train": 48,
            "val": 12,
            "test": 15,
            "train+val": 60,
        }
        places = {split: {part.describe(i) for i in range(len(part))} for split, part in parts.items()}
        assert places["train"] | places["val"] == places["train+val"] and not places["train"] & places["val"]
        for split, part in parts.items():
            assert part.classes == CLASSES and f"{split} part" in part.source
        train, test = parts["train+val"], parts["test"]
        assert all(train.label(index) == red(train, index) % 3 for index in range(60))
        assert [red(test, index) for index in range(15)] == list(range(100, 115))
        assert test.targets == [number % 3 for number in range(100, 115)]


def test_the_images_of_packed_files_are_those_that_were_packed(folders: Path) -> None:
    whole = create_dataset("tiny_imagenet", "train+val", folders / "packed")
    assert [red(whole, index) for index in range(60)] == list(range(60))
    assert "train_1.npz (bytes " in whole.describe(59)


def test_the_fingerprint_is_that_of_the_images_wherever_they_lie(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "packed", tmp_path / "moved")
    here, there = (
        create_dataset("tiny_imagenet", "train", folder)
        for folder in (folders / "packed", tmp_path / "moved")
    )
    assert here.fingerprint() == there.fingerprint()
    pack(tmp_path / "moved" / "tiny_imagenet" / "train_1.npz", list(range(31, 61)))
    changed = create_dataset("tiny_imagenet", "train", tmp_path / "moved")
    assert changed.fingerprint() != here.fingerprint()


def test_a_packed_image_that_is_no_image_is_named(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "x.npz",
        [1, 2],
        blob=np.zeros(50, np.uint8),
        offset=np.array([0, 20, 50]),
    )
    span = read_packed(path, 3).spans[1]
    with pytest.raises(CorruptImageError, match=r"x\.npz \(bytes \d+ to \d+\)"):
        load_image(path, span)
    with pytest.raises(CorruptImageError, match="ends before the image does"):
        load_image(path, span._replace(size=10**6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.array([0, 3], np.int16)}, "must be whole numbers from 0 to 2"),
        ({"label": np.array([0], np.int16)}, "2 images and 1 labels"),
        ({"label": np.array([0.0, 1.0])}, "expected whole numbers"),
        ({"label": np.array([None, "x"], object)}, "expected a list of numbers"),
        ({"offset": np.array([0, 10**9, 5])}, "must be whole numbers from 0 to"),
        ({"offset": np.array([0, 0, 5])}, "do not rise"),
        ({"offset": np.array([[0, 1, 2]])}, "expected a list of numbers"),
        ({"offset": np.array([], np.int64)}, "expected a list of numbers"),
        ({"blob": np.zeros(9, np.float32)}, "float32 instead of uint8"),
    ],
)
def test_packed_files_of_another_form_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = pack(tmp_path / "train_0.npz", [0, 1], **changes)
    with pytest.raises(DatasetError, match=message) as error:
        read_packed(path, 3)
    assert "train_0.npz" in str(error.value) and "\n" not in str(error.value)


def test_damaged_packed_files_are_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "train_0.npz", [0, 1])
    content = path.read_bytes()
    np.savez_compressed(tmp_path / "compressed.npz", **np.load(path))
    with pytest.raises(DatasetError, match=r"compressed\.npz .*numpy\.savez"):
        read_packed(tmp_path / "compressed.npz", 3)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("blob.npy", b"not an array")
    with pytest.raises(DatasetError, match=r"damaged, or no \.npz file of packed images"):
        read_packed(path, 3)
    for cut in (0, 10, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(DatasetError, match=r"damaged, or no \.npz file of packed images"):
            read_packed(path, 3)
    with pytest.raises(DatasetError, match="cannot read"):
        read_packed(tmp_path / "absent.npz", 3)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("val/val_annotations.txt", "val_100.JPEG\tn99999999\n", "'n99999999' is no class"),
        ("val/val_annotations.txt", "../wnids.txt\tn01443537\n", "where the name of a file belongs"),
        ("val/val_annotations.txt", "val_1.JPEG\tn01443537\n", "incomplete: 1 of 1 image missing"),
        ("val/val_annotations.txt", "val_100.JPEG\n", "row 1 has 1 columns instead of 2"),
        ("words.txt", "n01443537\tgoldfish\n", "has no name for 'n01629819'"),
        ("wnids.txt", "n01443537\nn01443537\n", "names a class twice"),
    ],
)
def test_tables_that_are_wrong_are_refused(
    folders: Path, tmp_path: Path, file: str, text: str, message: str
) -> None:
    root = tmp_path / "tiny-imagenet-200"
    shutil.copytree(folders / "official" / "tiny-imagenet-200", root)
    (root / file).write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        create_dataset("tiny_imagenet", "test", root)
    assert "\n" not in str(error.value)


def test_class_names_that_do_not_fit_are_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "packed", tmp_path / "packed")
    names = tmp_path / "packed" / "tiny_imagenet" / "class_names.json"
    for text, message in [
        ('["a", "b"]', "3 classes in wnids.json and 2"),
        ('["a", 5]', "form"),
        ("{", "JSON"),
    ]:
        names.write_text(text)
        with pytest.raises(DatasetError, match=message):
            create_dataset("tiny_imagenet", "train", tmp_path / "packed")


def test_the_real_one(shared_dir: Path) -> None:
    data = shared_dir / "data"
    if not (data / "tiny_imagenet").is_dir():
        pytest.skip(f"no real data: {data / 'tiny_imagenet'} does not exist")
    sizes = {
        split: len(create_dataset("tiny_imagenet", split, data, download=False))
        for split in ("train", "val", "test")
    }
    assert sizes == {"train": 95_000, "val": 5000, "test": 10_000}
    test = create_dataset("tiny_imagenet", "test", data, download=False)
    assert test.classes[0] == "goldfish" and len(set(test.classes)) == 200
    assert test.load(0).size == (64, 64)
