"""The data set "hf": what the library `datasets` has saved, made on the spot, and what the hub gives."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vimtune.cli import main
from vimtune.data import DatasetError, MissingSplitError, create_dataset
from vimtune.data.errors import CorruptImageError, ImageReadError
from vimtune.recipe import Recipe, load_recipe
from vimtune.training import train

datasets = pytest.importorskip("datasets")

NAMES = ["cat", "dog", "owl"]


def picture(number: int) -> Image.Image:
    """A small image of one colour, which says its number."""
    return Image.fromarray(np.full((6, 8, 3), number, np.uint8))


def table(count: int, first: int = 0, labels: Any = None, kind: Any = None, **more: Any) -> Any:
    """`count` images whose colours are `first` and the following numbers, with the labels 0, 1, 2, 0, ..."""
    kind = datasets.ClassLabel(names=NAMES) if kind is None else kind
    columns = {
        "picture": [picture(first + number) for number in range(count)],
        "what": [number % 3 for number in range(count)] if labels is None else labels,
        **{name: values for name, (_, values) in more.items()},
    }
    features = {"picture": datasets.Image(), "what": kind, **{name: kind for name, (kind, _) in more.items()}}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def save(folder: Path, **splits: Any) -> Path:
    """Write tables as a data set with these splits, or a table without splits."""
    whole = splits["none"] if list(splits) == ["none"] else datasets.DatasetDict(splits)
    whole.save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with three splits."""
    tables = {"train": table(12), "validation": table(3, 100), "test": table(6, 200)}
    return save(tmp_path_factory.mktemp("hf") / "saved", **tables)


def opened(folder: Path, split: str = "train", **options: Any) -> Any:
    return create_dataset("hf", split, folder, **options)


def colours(dataset: Any) -> list[int]:
    return [dataset.load(index).getpixel((0, 0))[0] for index in range(len(dataset))]


# --------------------------------------------------------------------------- splits


def test_splits_and_names_are_those_of_the_data_set(split) -> None:
    train, val, test = (opened(split, name) for name in ("train", "val", "test"))
    assert train.classes == val.classes == NAMES
    assert (colours(train), colours(val)) == (list(range(12)), [100, 101, 102])
    assert (colours(test), test.targets) == ([200, 201, 202, 203, 204, 205], [0, 1, 2, 0, 1, 2])
    assert colours(opened(split, "train+val")) == [*range(12), 100, 101, 102]
    assert train.load(0).mode == "RGB" and train.load(0).size == (8, 6) and train.tags is None
    assert f"hf {split}, train split (as in train), 12 images of 3 classes" == train.source
    assert val.describe(1) == f"{split}, validation, row 1"


def test_a_table_alone_is_divided_at_random_as_a_folder_is(tmp_path) -> None:
    for name, folder in (("none", tmp_path / "a"), ("train", tmp_path / "b")):
        save(folder, **{name: table(30)})
        parts = {part: opened(folder, part, seed=3) for part in ("train", "val", "test", "train+val")}
        assert [len(part) for part in parts.values()] == [18, 6, 6, 24]
        assert sorted(c for part in ("train", "val", "test") for c in colours(parts[part])) == list(range(30))
        assert "drawn with seed 3" in parts["val"].source
        assert colours(opened(folder, "val", seed=4)) != colours(parts["val"])
        assert len(opened(folder, "val", val_fraction=0.4)) == 12


def test_without_a_split_for_validation_it_is_drawn_and_without_one_for_tests_there_is_none(tmp_path) -> None:
    save(tmp_path / "a", train=table(12), test=table(3, 200))
    assert len(opened(tmp_path / "a", "val")) == 3 and len(opened(tmp_path / "a", "test")) == 3
    save(tmp_path / "b", train=table(12), dev=table(3))
    with pytest.raises(MissingSplitError, match=r"no test split with labels: it has 'train', 'dev'"):
        opened(tmp_path / "b", "test")


def test_a_test_split_without_labels_is_none_and_this_is_said(tmp_path) -> None:
    save(tmp_path / "a", train=table(12), test=table(3, labels=[-1, -1, -1]))
    assert "not used: 'test' without labels" in opened(tmp_path / "a").source
    with pytest.raises(MissingSplitError, match="no test split with labels"):
        opened(tmp_path / "a", "test")


def test_splits_are_named_where_their_names_are_unusual(tmp_path) -> None:
    save(tmp_path / "a", fold_1=table(9), fold_2=table(3, 50), other=table(3, 90))
    with pytest.raises(
        DatasetError, match=r"no split to train on, but 'fold_1', 'fold_2', 'other': give train_from"
    ):
        opened(tmp_path / "a")
    chosen = {"train_from": "fold_1", "val_from": "fold_2"}
    assert colours(opened(tmp_path / "a", "val", **chosen)) == [50, 51, 52]
    assert "not used: 'other'" in opened(tmp_path / "a", **chosen).source
    with pytest.raises(DatasetError, match=r"test_from = 'fold_3': .* has 'fold_1', 'fold_2', 'other'"):
        opened(tmp_path / "a", test_from="fold_3")
    save(tmp_path / "b", train=table(9), val=table(3, 50), validation=table(3, 60))
    with pytest.raises(
        DatasetError, match=r"'val', 'validation' could be the split val: give val_from=\.\.\."
    ):
        opened(tmp_path / "b")
    assert colours(opened(tmp_path / "b", "val", val_from="validation")) == [60, 61, 62]


# --------------------------------------------------------------------------- columns


def test_columns_are_named_where_several_could_be_meant(tmp_path) -> None:
    mask = (datasets.Image(), [picture(0)] * 6)
    fine = (datasets.ClassLabel(names=["tabby", "pug", "barn owl"]), [2, 1, 0, 2, 1, 0])
    save(tmp_path / "a", none=table(6, mask=mask, fine=fine).rename_column("picture", "scan"))
    with pytest.raises(
        DatasetError, match=r"several columns of images: 'scan' .Image., .*image_column="
    ) as e:
        opened(tmp_path / "a")
    assert "\n" not in str(e.value)
    with pytest.raises(DatasetError, match=r"several columns of labels: .*label_column="):
        opened(tmp_path / "a", image_column="scan")
    chosen = {"image_column": "scan", "label_column": "fine"}
    assert opened(tmp_path / "a", "train+val", **chosen).classes == ["tabby", "pug", "barn owl"]
    for option, value in (("image_column", "what"), ("image_column", "x"), ("label_column", "x")):
        with pytest.raises(DatasetError, match=rf"{option} = '{value}': .* has the columns 'scan'"):
            opened(tmp_path / "a", **{**chosen, option: value})
    with pytest.raises(DatasetError, match=r"label_column = 'mask': .* has no labels there"):
        opened(tmp_path / "a", image_column="scan", label_column="mask")


def test_usual_names_decide_between_columns(tmp_path) -> None:
    more = {
        "image": (datasets.Image(), [picture(90 + number) for number in range(6)]),
        "label": (datasets.ClassLabel(names=["a", "b"]), [0, 1] * 3),
    }
    save(tmp_path / "a", train=table(6, **more), test=table(6, **more))
    found = opened(tmp_path / "a", "train+val")
    assert found.classes == ["a", "b"] and colours(found) == list(range(90, 96))


@pytest.mark.parametrize(
    ("kind", "labels", "classes"),
    [
        ("string", ["b", "a", "b", "a", "b", "a"], ["a", "b"]),
        ("int64", [10, 9, 10, 9, 10, 9], ["9", "10"]),
    ],
)
def test_names_and_numbers_without_a_class_label_are_classes(tmp_path, kind, labels, classes) -> None:
    column = (datasets.Value(kind), labels)
    float_column = (datasets.Value("float32"), [0.5] * 6)
    plain = table(6, species=column, target=float_column).remove_columns("what")
    save(tmp_path / "a", train=plain, test=plain)
    found = opened(tmp_path / "a", "test")
    assert found.classes == classes and found.targets == [1, 0, 1, 0, 1, 0]
    other = table(2, species=(datasets.Value(kind), [labels[0], "c" if kind == "string" else 7]))
    save(tmp_path / "b", train=plain, test=other.remove_columns("what"))
    with pytest.raises(DatasetError, match=r"label ('c'|7) in test is none of the classes to be learned"):
        opened(tmp_path / "b")


def test_an_image_may_have_several_labels_or_none(tmp_path) -> None:
    kind = datasets.Sequence(datasets.ClassLabel(names=NAMES))
    labels = [[0, 2], [2], [], [1, 2], [2], [0]]
    save(tmp_path / "a", train=table(6, labels=labels, kind=kind), test=table(6, labels=labels, kind=kind))
    found = opened(tmp_path / "a", "test")
    assert found.tags == [(0, 2), (2,), (), (1, 2), (2,), (0,)]
    assert found.targets == [0, 2, -1, 1, 2, 0]  # the rarest of each


def test_images_without_labels_among_others_are_refused(tmp_path) -> None:
    save(tmp_path / "a", none=table(6, labels=[0, 1, None, 2, -1, 0]))
    with pytest.raises(DatasetError, match="2 of 6 images have no label"):
        opened(tmp_path / "a")
    save(tmp_path / "b", none=table(6, labels=[-1] * 6))
    with pytest.raises(DatasetError, match="its images for training have no labels in column 'what'"):
        opened(tmp_path / "b")


# --------------------------------------------------------------------------- images


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> Any:
    """Images of several kinds: grey, with alpha, damaged, missing, and as files that lie elsewhere."""
    grey, clear = tmp_path / "grey.png", tmp_path / "clear.png"
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(grey)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear)
    entries = [
        {"bytes": grey.read_bytes(), "path": None},
        {"bytes": clear.read_bytes(), "path": "x.png"},
        {"bytes": None, "path": str(grey)},
        {"bytes": b"no image", "path": None},
        None,
        {"bytes": None, "path": str(tmp_path / "gone.png")},
    ]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {"image": entries, "label": [0, 1] * 3}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    tables = {"train": made, "test": made}
    monkeypatch.setattr("vimtune.data.own.hf_tables.open_tables", lambda *place: ("here", tables))
    return opened(tmp_path, "train+val")


def test_images_are_read_as_those_of_files(mixed) -> None:
    found = {mixed.describe(index): index for index in range(len(mixed))}
    assert "here, train, row 0" in found
    colour = {"row 0": (77, 77, 77), "row 1": (255, 255, 255), "row 2": (77, 77, 77)}
    errors = {
        "row 3": (CorruptImageError, "here, train, row 3: no image of a known format"),
        "row 4": (CorruptImageError, "here, train, row 4: the row has no image"),
        "row 5": (ImageReadError, "gone.png: No such file"),
    }
    for name, index in found.items():
        row = name.rpartition(", ")[2]
        if row in colour:
            assert mixed.load(index).getpixel((0, 0)) == colour[row]
        else:
            with pytest.raises(errors[row][0], match=errors[row][1]):
                mixed.load(index)
    with pytest.raises(ImageReadError, match=r"gone\.png: No such file"):
        mixed.fingerprint()


def test_a_fingerprint_says_which_images_with_which_labels_and_depends_on_no_folder(split, tmp_path) -> None:
    shutil.copytree(split, tmp_path / "elsewhere")
    whole = opened(split).fingerprint()
    assert whole == opened(tmp_path / "elsewhere").fingerprint() != opened(split, "val").fingerprint()
    labels = [0, 1, 2] * 3 + [2, 1, 0]
    save(tmp_path / "labels", train=table(12, labels=labels), test=table(3))
    save(tmp_path / "images", train=table(12), test=table(3))
    assert opened(tmp_path / "images", "train+val").fingerprint() == whole
    assert opened(tmp_path / "labels", "train+val").fingerprint() != whole
    large = table(12)
    kept = large.cast_column("picture", datasets.Image(decode=False))
    bigger = kept.map(lambda row: {"picture": {"bytes": row["picture"]["bytes"] + b" ", "path": None}})
    save(tmp_path / "bytes", train=bigger.cast_column("picture", datasets.Image()), test=table(3))
    assert opened(tmp_path / "bytes", "train+val").fingerprint() != whole


def test_a_selection_of_rows_is_read_as_such(tmp_path) -> None:
    """Tables may be views of others, with an index of rows."""
    save(tmp_path / "a", train=table(12).select([7, 3, 5, 4, 2]), test=table(3))
    found = opened(tmp_path / "a", "train+val")
    assert colours(found) == [7, 3, 5, 4, 2] and found.targets == [1, 0, 2, 1, 2]
    assert len(found.fingerprint()) == 64


def test_it_travels_to_processes_that_load_images(split) -> None:
    again = pickle.loads(pickle.dumps(opened(split)))
    assert colours(again) == list(range(12))


# --------------------------------------------------------------------------- places


def test_a_place_that_is_none_is_one_line(tmp_path, split) -> None:
    (tmp_path / "empty").mkdir()
    for folder, options, message in [
        (None, {}, "no place is named: give dataset_kwargs path="),
        (split, {"path": "me/flowers"}, "two places are named"),
        (split, {"config": "plain"}, "config and revision are for a data set of the hub"),
        (tmp_path / "none", {}, r"data_dir '.*none' is no folder"),
        (tmp_path / "empty", {}, "empty' cannot be read: .*save_to_disk"),
        (
            None,
            {"path": "me/flowers", "download": False},
            "nothing is to be downloaded: set HF_HUB_OFFLINE=1",
        ),
        (split, {"val_fraction": 0.6, "test_fraction": 0.6}, "leave no train images"),
    ]:
        with pytest.raises(DatasetError, match=message) as error:
            opened(folder, **options)
        assert "\n" not in str(error.value)


def test_what_to_install_is_said(split, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="needs the package datasets, which is not installed: pip install"):
        opened(split)


def test_a_name_is_looked_up_on_the_hub(split, monkeypatch) -> None:
    asked = []

    def load(*place: Any, **options: Any) -> Any:
        asked.append((place, options))
        return datasets.load_from_disk(str(split))

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = opened(None, "val", path="me/flowers", config="small", revision="v2")
    assert asked == [(("me/flowers", "small"), {"revision": "v2"})]
    assert found.source.startswith("hf me/flowers small v2, val split (as in validation), 3 images")


def test_the_hub_is_not_asked_offline(tmp_path) -> None:
    """A process of its own, because the variable is read when libraries are imported."""
    code = "from vimtune.data import create_dataset; create_dataset('hf', 'train', path='me/flowers')"
    place = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    environment = place | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert "'me/flowers' cannot be taken from the Hugging Face hub (" in last and "flowers" in last
    assert "DatasetError" in last


def test_a_run_trains_on_it_and_goes_on(split, tmp_path) -> None:
    values = {"dataset": "hf", "data_dir": str(split), "model": "test_vim", "model_kwargs": {"depth": 1}}
    values |= {"pretrained": False, "peft": "lora", "rank": 2, "epochs": 1, "batch_size": 4, "device": "cpu"}
    values |= {"num_workers": 1, "pictures": False, "backend": "torch", "threads": 1, "logger": "none"}
    report = train(Recipe(**values, output_dir=str(tmp_path / "run")))
    assert list(report.per_class) == NAMES and report.split == "test" and report.num_images == 6
    again = train(load_recipe(None, {"resume": report.run_dir, "epochs": 2}))
    assert again.epochs == 2
    assert main(["evaluate", "--adapter", report.run_dir, "--device", "cpu", "--backend", "torch"]) == 0
