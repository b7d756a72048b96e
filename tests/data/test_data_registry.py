from __future__ import annotations

import pytest

from vimtune import catalog
from vimtune.data import (
    SPLITS,
    DatasetError,
    create_dataset,
    dataset_options,
    dataset_summary,
    list_datasets,
)


def test_every_dataset_has_a_one_line_summary() -> None:
    assert {"flowers", "caltech", "cars", "folder", "synthetic_flowers"} <= set(list_datasets())
    for name, summary in list_datasets().items():
        assert summary == dataset_summary(name)
        assert summary.strip() and "\n" not in summary


def test_catalog_lists_the_registered_datasets() -> None:
    assert list_datasets() == catalog.DATASETS


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(DatasetError, match="Did you mean 'flowers'"):
        create_dataset("flower", "train")


def test_unknown_split_and_option_name_the_choices() -> None:
    with pytest.raises(DatasetError, match="train, val, test, train"):
        create_dataset("synthetic_flowers", "vall")
    with pytest.raises(DatasetError, match="Did you mean 'species'"):
        create_dataset("synthetic_flowers", "train", speces=3)


def test_options_are_those_of_the_class() -> None:
    assert dataset_options("synthetic_flowers")["species"] == 16
    assert dataset_options("flowers") == {}


@pytest.mark.parametrize("name", sorted(set(list_datasets()) - {"synthetic_flowers"}))
@pytest.mark.parametrize("split", SPLITS)
def test_missing_data_gives_one_message_with_layout_and_alternative(name: str, split: str, tmp_path) -> None:
    with pytest.raises(DatasetError) as error:
        create_dataset(name, split, tmp_path / "nothing" / "here", download=False)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(DatasetError) as error:
        create_dataset(name, split, tmp_path, download=False)
    message = str(error.value)
    assert "Expected <data-dir>" in message or "as <data-dir>" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["flowers", "caltech", "cars", "folder"])
def test_a_file_as_data_dir_is_refused(name: str, tmp_path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("hello")
    with pytest.raises(DatasetError, match=r"x\.txt"):
        create_dataset(name, "train", path)
