"""What `ImageDataset` says that a data set owes, for every one that is registered."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import pytest
from annotated_types import Ge
from PIL import Image

from vimtune.data import (
    DATASETS,
    SPLITS,
    DatasetError,
    FileDataset,
    ImageDataset,
    MissingSplitError,
    build_transform,
    create_dataset,
    create_loader,
    dataset_class,
    dataset_option_problems,
    dataset_options,
    dataset_summary,
    list_datasets,
    register_dataset,
)

NAMES = sorted(list_datasets())
FILES = [name for name in NAMES if issubclass(dataset_class(name), FileDataset)]
GENERATORS = [name for name in NAMES if name not in FILES and name != "hf"]  # which tests of its own know


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
    assert dataset_option_problems(name, dataset_options(name)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value", ["abc", float("nan"), float("inf"), [], {}, 10**30, -(10**30), object(), True]
)
def test_wrong_values_of_its_options_are_one_line(name: str, value: Any, tmp_path) -> None:
    for option in dataset_options(name):
        if not dataset_option_problems(name, {option: value}):
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
def test_generated_images_are_not_taken_for_those_of_a_folder(name: str, tmp_path) -> None:
    with pytest.raises(DatasetError, match=rf"data_dir = '{tmp_path}' would not be read: .* folder \(a fold"):
        create_dataset(name, "train", tmp_path)


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
        assert f"{len(ds):,} " in ds.source and str(len(ds.classes)) in ds.source
        assert again.targets == ds.targets and again.fingerprint() == ds.fingerprint()
        assert again.load(len(ds) - 1).tobytes() == ds.load(len(ds) - 1).tobytes()
        assert ds.load(0).mode == "RGB"
    assert create_dataset(name, "train", seed=1).fingerprint() != parts["train"].fingerprint()


# --------------------------------------------------------------------------- the registry


def test_the_data_sets_of_vimtune_are_listed() -> None:
    assert {"flowers", "caltech", "cars", "folder", "synthetic_flowers", "tiny_imagenet", "vtab"} <= set(
        NAMES
    )
    assert set(list_datasets()) == set(DATASETS)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(DatasetError, match="Did you mean 'flowers'"):
        create_dataset("flower", "train")
    with pytest.raises(DatasetError, match="Did you mean 'species'"):
        create_dataset("synthetic_flowers", "train", speces=3)


def test_importing_and_listing_the_data_sets_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom vimtune.data import list_datasets, dataset_options\n"
        "[dataset_options(name) for name in list_datasets()]\n"
        "assert not {'torch', 'timm', 'numpy', 'PIL', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_need_torch_are_found_when_asked_for() -> None:
    import vimtune.data as room

    assert set(room.__all__) <= set(dir(room))
    assert all(getattr(room, name) is not None for name in room.__all__)
    with pytest.raises(AttributeError, match="no attribute 'create_loder'"):
        room.create_loder  # noqa: B018


def test_all_problems_with_options_are_told_together() -> None:
    problems = dataset_option_problems(
        "synthetic_flowers", {"speces": 3, "species": "x", "species_offset": 4}
    )
    assert [problem.count("\n") for problem in problems] == [0, 0]
    assert "no option 'speces'" in problems[0] and "species='x'" in problems[1]
    with pytest.raises(DatasetError, match=r"no option 'speces'.*; .*species='x'"):
        create_dataset("synthetic_flowers", "train", speces=3, species="x")
    with pytest.raises(DatasetError, match="unknown data set 'flower'"):
        dataset_option_problems("flower", {})


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
    monkeypatch.setattr(DATASETS, "_things", dict(DATASETS._things))
    register_dataset("dots")(Dots)
    return "dots"


def without_default(self, split, data_dir, *, seed, img_size, download, count: int): ...
def without_type(self, split, data_dir, *, seed, img_size, download, count=3): ...
def positional(self, split, data_dir, count: int = 3, *, seed, img_size, download): ...
def collecting(self, split, data_dir, *, seed, img_size, download, **options: Any): ...


@pytest.mark.parametrize("init", [without_default, without_type, positional, collecting])
def test_options_that_cannot_be_checked_are_refused_at_registration(init: Any) -> None:
    body = {"summary": "grey squares", "__init__": init, "__module__": __name__}
    with pytest.raises(ValueError, match=r"'new': option (count|options) must be keyword-only"):
        register_dataset("new")(type("New", (Dots,), body))
    assert "new" not in DATASETS


def test_a_class_that_cannot_be_called_like_the_others_is_refused_at_registration() -> None:
    def init(self, split, data_dir, *, seed): ...

    body = {"summary": "grey squares", "__init__": init, "__module__": __name__}
    with pytest.raises(
        ValueError, match="'new': __init__ of class New has to take img_size, download: expected"
    ):
        register_dataset("new")(type("New", (Dots,), body))
    assert "new" not in DATASETS


def test_the_name_of_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is a data set 'flowers' already .*choose another name"):
        register_dataset("flowers")(Dots)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_new_data_set_is_listed_and_loaded(dots: str, num_workers: int) -> None:
    assert list_datasets()[dots] == dataset_summary(dots) == "grey squares"
    loader = create_loader(
        create_dataset(dots, "train"),
        build_transform("none", (8, 8)),
        batch_size=4,
        shuffle=False,
        drop_last=False,
        num_workers=num_workers,
        seed=0,
    )
    assert [labels.tolist() for _, labels in loader] == [[0, 1, 0, 1]]
    loader.close()


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


@pytest.mark.parametrize("name", ["split", "classes", "targets", "source"])
def test_an_attribute_that_a_class_forgets_is_named(dots: str, monkeypatch, name: str) -> None:
    class Wrong(Dots):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            delattr(self, name)

    monkeypatch.setitem(DATASETS._things, dots, Wrong)
    expected = (
        rf"data set 'dots': class Wrong does not set {name}: expected .*\. Set self\.{name} in its __init__"
    )
    with pytest.raises(DatasetError, match=expected):
        create_dataset(dots, "train")


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("classes", 2, "2"),
        ("targets", ["a", "b"], "['a', 'b']"),
        ("targets", np.arange(2), "an ndarray of shape (2,)"),
        ("source", None, "None"),
    ],
)
def test_an_attribute_of_another_kind_is_shown(
    dots: str, monkeypatch, name: str, value: Any, shown: str
) -> None:
    class Wrong(Dots):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            setattr(self, name, value)

    monkeypatch.setitem(DATASETS._things, dots, Wrong)
    with pytest.raises(DatasetError, match=re.escape(f"class Wrong has {name} = {shown}: expected")):
        create_dataset(dots, "train")


def test_labels_beyond_the_classes_are_refused(dots: str, monkeypatch) -> None:
    class Wrong(Dots):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.targets[-1] = 2

    monkeypatch.setitem(DATASETS._things, "dots", Wrong)
    with pytest.raises(DatasetError, match="labels 0 to 2 do not fit 2 classes"):
        create_dataset(dots, "train")
