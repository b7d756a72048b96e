"""MATLAB files are read like scipy does, and damaged or hostile ones are refused."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from vimtune.data import DatasetError, create_dataset
from vimtune.data.files.mat import read_mat

VALUES = {
    "few": np.arange(3, dtype=np.uint8),
    "large": np.arange(5000.0),
    "signed": np.array([[1, -2], [3, 4], [5, 6]], np.int16),
    "word": "00001.jpg",
    "umlaut": "Größe",
    "cell": np.array(["one", "seventeen", ""], object),
}


@pytest.mark.parametrize("compressed", [False, True])
def test_values_are_those_of_scipy(compressed: bool, tmp_path) -> None:
    path = tmp_path / "x.mat"
    savemat(path, VALUES, do_compression=compressed)
    found = read_mat(path, list(VALUES))
    for name in ("few", "large", "signed"):
        assert np.array_equal(found[name], VALUES[name].ravel("F"))
        assert found[name].dtype == VALUES[name].dtype
    assert (found["word"], found["umlaut"]) == ("00001.jpg", "Größe")
    assert [part if isinstance(part, str) else "" for part in found["cell"]] == ["one", "seventeen", ""]
    with pytest.raises(DatasetError, match=r"x\.mat is damaged \(it has no more\)"):
        read_mat(path, ["few", "more"])


def test_structures_are_lists_of_fields(tmp_path) -> None:
    rows = np.zeros((1, 3), [("fname", object), ("class", object)])
    for i in range(3):
        rows[0, i] = (f"{i}.jpg", np.uint8(i + 1))
    savemat(tmp_path / "x.mat", {"rows": rows})
    found = read_mat(tmp_path / "x.mat", ["rows"])["rows"]
    assert [(row["fname"], row["class"].tolist()) for row in found] == [
        (f"{i}.jpg", [i + 1]) for i in range(3)
    ]


def test_the_real_tables_are_those_of_scipy(shared_dir) -> None:
    for name, keys in (("flowers/flowers-102/setid.mat", ["trnid", "valid", "tstid"]),):
        path = shared_dir / "data" / name
        if not path.exists():
            pytest.skip(f"no real data: {path} does not exist")
        theirs = loadmat(path, squeeze_me=True)
        assert all(np.array_equal(theirs[key], values) for key, values in read_mat(path, keys).items())
    path = shared_dir / "data" / "stanford_cars" / "devkit" / "cars_train_annos.mat"
    if not path.exists():
        pytest.skip(f"no real data: {path} does not exist")
    theirs = loadmat(path, squeeze_me=True)["annotations"]
    ours = read_mat(path, ["annotations"])["annotations"]
    assert [(r["fname"], r["class"][0]) for r in ours] == [(str(r["fname"]), r["class"]) for r in theirs]


def test_damaged_files_are_refused_and_nothing_else(tmp_path) -> None:
    """Files like these crash scipy's reader and the interpreter with it."""
    chance = random.Random(0)
    rows = np.zeros((1, 3), [("fname", object), ("class", object)])
    rows[0, :] = [("a.jpg", 1), ("b.jpg", 2), ("c.jpg", 3)]
    wholes = []
    for compressed in (False, True):
        file = io.BytesIO()
        savemat(file, {**VALUES, "rows": rows}, do_compression=compressed)
        wholes.append(file.getvalue())
    refused = 0
    for turn in range(600):
        data = bytearray(wholes[turn % 3 == 0])
        for _ in range(chance.choice((1, 2, 4))):
            at = chance.randrange(100, min(len(data), chance.choice((700, 10**6))))
            data[at] = chance.choice((0, 1, 255, chance.randrange(256)))
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        (tmp_path / "x.mat").write_bytes(data)
        try:
            read_mat(tmp_path / "x.mat", [*VALUES, "rows"])
        except DatasetError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(kind: int, shape: tuple[int, ...], *parts: bytes, name: bytes = b"x") -> bytes:
    flags, sides = struct.pack("<II", kind, 0), struct.pack(f"<{len(shape)}i", *shape)
    return element(14, element(6, flags) + element(5, sides) + element(1, name) + b"".join(parts))


def nested(depth: int) -> bytes:
    inner = matrix(9, (1, 1), element(2, b"\1"))
    for _ in range(depth):
        inner = matrix(1, (1, 1), inner)
    return inner


HOSTILE = {
    "no level": b"",
    "bomb": struct.pack("<II", 15, 65240) + zlib.compress(bytes(64 * 2**20)),
    "deep": nested(2000),
    "huge cell": matrix(1, (2**31 - 1, 2**31 - 1)),
    "huge structure without fields": matrix(
        2, (2**31 - 1, 2**31 - 1), element(5, b"\4\0\0\0"), element(1, b"")
    ),
    "fields of no length": matrix(2, (1, 1), element(5, bytes(4)), element(1, b"abc")),
    "fields of infinite length": matrix(
        2, (1, 1), element(9, struct.pack("<d", float("inf"))), element(1, b"abc")
    ),
    "fields without a length": matrix(2, (1, 1), element(5, b""), element(1, b"abc")),
    "numbers that are not there": matrix(6, (1000, 1000), element(9, bytes(8))),
    "negative shape": matrix(6, (-1, 4), element(9, bytes(8))),
    "object": matrix(3, (1, 1), element(9, bytes(8))),
    "cut number": matrix(6, (1, 1), element(9, bytes(7))),
    "bad text": matrix(4, (1, 2), element(16, b"\xff\xfe")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path) -> None:
    header = b"MATLAB".ljust(124) + b"\x00\x01IM" if name != "no level" else b"MATLAB"
    (tmp_path / "x.mat").write_bytes(header + HOSTILE[name])
    with pytest.raises(DatasetError, match=r"x\.mat is damaged"):
        read_mat(tmp_path / "x.mat", ["x"])


def test_files_that_are_none_are_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo.mat")
    (tmp_path / "large.mat").write_bytes(bytes(5 * 2**20))
    for name, message in (
        ("gone", "No such file"),
        ("fifo", "not a regular file"),
        ("large", "more than 4,194,304"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_mat(tmp_path / f"{name}.mat", ["x"])


# --------------------------------------------------------------------------- what the tables say


def flowers(folder: Path, **changes: Any) -> Path:
    root = folder / "flowers-102"
    (root / "jpg").mkdir(parents=True)
    for i in range(1, 7):
        Image.new("RGB", (8, 8)).save(root / "jpg" / f"image_{i:05d}.jpg")
    Image.new("RGB", (8, 8)).save(folder / "secret.jpg")
    tables = {"labels": [1, 2, 1, 2, 1, 2], "trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]} | changes
    savemat(root / "imagelabels.mat", {"labels": tables.pop("labels")})
    savemat(root / "setid.mat", tables)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [0, 2, 1, 2, 1, 2]},
        {"labels": [1, 2, 103, 2, 1, 2]},
        {"labels": [1.5, 2, 1, 2, 1, 2]},
        {"labels": [np.nan, 2, 1, 2, 1, 2]},
        {"labels": "words"},
        {"trnid": [0, 1]},
        {"trnid": [-1, 1]},
        {"tstid": [5, 7]},
        {"tstid": [5, 2]},
        {"valid": []},
        {"valid": np.array(["a", "b"], object)},
    ],
)
def test_numbers_out_of_range_in_flowers_are_refused(changes: dict, tmp_path) -> None:
    assert len(create_dataset("flowers", "test", flowers(tmp_path / "good"))) == 2
    for split in ("train", "test"):
        with pytest.raises(
            DatasetError, match=r"setid\.mat and imagelabels\.mat in .* to download them again"
        ):
            folder = tmp_path / "bad" / split
            create_dataset("flowers", split, flowers(folder, **changes), download=False)


def cars(folder: Path, rows: list[tuple[Any, Any]], names: list[Any]) -> Path:
    root = folder / "stanford_cars"
    for part in ("cars_train", "cars_test", "devkit"):
        (root / part).mkdir(parents=True)
    for i in range(1, 5):
        Image.new("RGB", (8, 8)).save(root / "cars_train" / f"{i}.jpg")
    Image.new("RGB", (8, 8)).save(root / "secret.jpg")
    table = np.zeros((1, len(rows)), [("fname", object), ("class", object)])
    table[0, :] = rows
    savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": table})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(names, object)})
    return folder


GOOD_ROWS = [("1.jpg", 1), ("2.jpg", 2), ("3.jpg", 1), ("4.jpg", 2)]


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        (("../secret.jpg", 1), ["a", "b"], r"'\.\./secret\.jpg' where the name of a file belongs"),
        (("/etc/passwd", 1), ["a", "b"], "where the name of a file belongs"),
        (("..", 1), ["a", "b"], "where the name of a file belongs"),
        (("x\\y.jpg", 1), ["a", "b"], "where the name of a file belongs"),
        ((7, 1), ["a", "b"], "where the name of a file belongs"),
        (("2.jpg", 2), ["a", "b"], "names an image twice"),
        (("1.jpg", 0), ["a", "b"], "whole numbers from 1 to 2"),
        (("1.jpg", 3), ["a", "b"], "whole numbers from 1 to 2"),
        (("1.jpg", "one"), ["a", "b"], "no list of numbers"),
        (("1.jpg", [1, 2]), ["a", "b"], "no class, or several"),
        (("1.jpg", 1), ["a", 5], "class names"),
    ],
)
def test_tables_of_cars_are_not_believed(row: tuple, names: list, message: str, tmp_path) -> None:
    good = cars(tmp_path / "good", GOOD_ROWS, ["a", "b"])
    assert create_dataset("cars", "train+val", good).targets == [0, 1, 0, 1]
    bad = cars(tmp_path / "bad", [row, *GOOD_ROWS[1:]], names)
    with pytest.raises(DatasetError, match=message) as error:
        create_dataset("cars", "train+val", bad)
    assert "\n" not in str(error.value)
