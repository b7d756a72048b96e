"""What `ImageDataset` says that a data set owes, for every one that is registered."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
from annotated_types import Ge
from PIL import Image

from vimtune import catalog
from vimtune.data import (
    SPLITS,
    DatasetError,
    FileDataset,
    ImageDataset,
    MissingSplitError,
    base,
    create_dataset,
    dataset_class,
    dataset_options,
    dataset_summary,
    list_datasets,
    register_dataset,
)

NAMES = sorted(list_datasets())
FILES = [name for name in NAMES if issubclass(dataset_class(name), FileDataset)]
GENERATORS = [name for name in NAMES if name not in FILES]


# --------------------------------------------------------------------------- every data set


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_one_line_summary(name: str) -> None:
    summary = list_datasets()[name]
    assert summary == dataset_summary(name)
    assert summary.strip() and "\n" not in summary


@pytest.mark.parametrize("name", NAMES)
def test_its_options_have_defaults_that_fit_their_annotations(name: str) -> None:
    cls = dataset_class(name)
    parameters = inspect.signature(cls.__init__).parameters
    assert list(parameters)[:3] == ["self", "split", "data_dir"]
    types = get_type_hints(cls.__init__, include_extras=True)
    for option, default in dataset_options(name).items():
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert default is not inspect.Parameter.empty, f"{option} has no default"
        assert option in types, f"{option} has no annotation"
    assert base._check_options(cls, dataset_options(name)) == dataset_options(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value", ["abc", float("nan"), float("inf"), [], {}, 10**30, -(10**30), object(), True]
)
def test_wrong_values_of_its_options_are_one_line(name: str, value: Any, tmp_path) -> None:
    for option, default in dataset_options(name).items():
        if isinstance(value, bool | str) and type(value) is type(default):
            continue
        with pytest.raises(DatasetError, match=option) as error:
            create_dataset(name, "train", tmp_path, download=False, **{option: value})
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_unknown_splits_and_options_name_the_choices(name: str) -> None:
    with pytest.raises(DatasetError, match="train, val, test, train"):
        create_dataset(name, "vall")
    with pytest.raises(DatasetError, match="no option 'colour'; its options: "):
        create_dataset(name, "train", colour=3)


# --------------------------------------------------------------------------- those made of files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("split", SPLITS)
def test_missing_files_give_one_message_with_folder_layout_and_alternative(
    name: str, split: str, tmp_path
) -> None:
    for folder in (tmp_path / "nothing" / "here", tmp_path):
        with pytest.raises(DatasetError) as error:
            create_dataset(name, split, folder, download=False)
        message = str(error.value)
        assert str(tmp_path) in message and "\n" not in message
    assert "<data-dir>" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_data_dir_is_refused(name: str, tmp_path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("hello")
    with pytest.raises(DatasetError, match=r"x\.txt"):
        create_dataset(name, "train", path)


# --------------------------------------------------------------------------- those that generate


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_splits_are_repeatable_disjoint_and_complete(name: str) -> None:
    parts = {split: create_dataset(name, split, img_size=(16, 16)) for split in SPLITS}
    described = {split: [ds.describe(i) for i in range(len(ds))] for split, ds in parts.items()}
    assert described["train+val"] == described["train"] + described["val"]
    whole = [text for split in ("train", "val", "test") for text in described[split]]
    assert len(set(whole)) == len(whole)
    for split, ds in parts.items():
        again = create_dataset(name, split, img_size=(16, 16))
        assert ds.split == split and ds.classes == parts["train"].classes
        assert str(len(ds)) in ds.source and str(len(ds.classes)) in ds.source
        assert again.targets == ds.targets and again.fingerprint() == ds.fingerprint()
        assert again.load(len(ds) - 1).tobytes() == ds.load(len(ds) - 1).tobytes()
        assert ds.load(0).mode == "RGB"
    assert create_dataset(name, "train", seed=1).fingerprint() != parts["train"].fingerprint()


# --------------------------------------------------------------------------- the registry


def test_catalog_lists_the_registered_datasets() -> None:
    assert {"flowers", "caltech", "cars", "folder", "synthetic_flowers"} <= set(NAMES)
    assert list_datasets() == catalog.DATASETS


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(DatasetError, match="Did you mean 'flowers'"):
        create_dataset("flower", "train")
    with pytest.raises(DatasetError, match="Did you mean 'species'"):
        create_dataset("synthetic_flowers", "train", speces=3)


def test_options_are_those_of_the_class() -> None:
    assert dataset_options("synthetic_flowers")["species"] == 16
    assert dataset_options("flowers") == {}


class Dots(ImageDataset):
    """A data set as the contract asks: nothing but its own file knows it."""

    summary = "grey squares"

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        count: Annotated[int, Ge(0)] = 4,
        num_classes: Annotated[int, Ge(0)] = 2,
    ) -> None:
        if split == "test":
            raise MissingSplitError("there are no dots for tests")
        self.split, self.source = split, f"{count} dots of {num_classes} classes"
        self.targets = [i % 2 for i in range(count)]
        self.classes = [str(i) for i in range(num_classes)]

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8))

    def describe(self, index: int) -> str:
        return f"dot {index}"


@pytest.fixture
def dots(monkeypatch) -> str:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    register_dataset("dots")(Dots)
    return "dots"


def test_a_new_data_set_has_its_options_checked(dots: str) -> None:
    assert len(create_dataset(dots, "train", count=6)) == 6
    assert len(create_dataset(dots, "train", count=6).fingerprint()) == 64
    for value in (-1, "3", 2.5, True):
        with pytest.raises(DatasetError, match="data set 'dots': count="):
            create_dataset(dots, "train", count=value)
    with pytest.raises(MissingSplitError):
        create_dataset(dots, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "is empty"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"num_classes": 0}, "2 classes"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(dots: str, options: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        create_dataset(dots, "train", **options)


def test_labels_beyond_the_classes_are_refused(dots: str, monkeypatch) -> None:
    class Wrong(Dots):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.targets[-1] = 2

    monkeypatch.setitem(base._REGISTRY, "dots", Wrong)
    with pytest.raises(DatasetError, match="labels 0 to 2 do not fit 2 classes"):
        create_dataset(dots, "train")
