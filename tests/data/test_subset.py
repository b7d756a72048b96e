"""Few images: so many of each class, or so many in all; drawn by a seed, and refused where there are not."""

from __future__ import annotations

from collections import Counter

import pytest

from vimtune.data import DatasetError, create_dataset
from vimtune.data.splitting import stratified_folds
from vimtune.data.subset import draw_protocol, draw_shots
from vimtune.recipe import Recipe, RecipeError
from vimtune.tasks.images.job import open_dataset
from vimtune.tasks.images.settings import DataSettings


def flowers(split: str):
    return create_dataset(
        "synthetic_flowers", split, species=3, train_per_species=10, val_per_species=4, test_per_species=2
    )


def names(dataset) -> set[str]:
    return {dataset.describe(index) for index in range(len(dataset))}


@pytest.mark.parametrize("shots", [1, 4, 10])
def test_shots_are_so_many_of_each_class_of_the_split(shots: int) -> None:
    few, whole = draw_shots(flowers("train"), shots, seed=3), flowers("train")
    assert Counter(few.targets) == {0: shots, 1: shots, 2: shots}
    assert names(few) <= names(whole) and few.classes == whole.classes and few.split == "train"
    assert f"{3 * shots} images, {shots} of each class drawn with seed 3, of: generated" in few.source
    for index in range(len(few)):
        assert few.load(index).tobytes() == whole.load(_index_of(whole, few.describe(index))).tobytes()


def _index_of(dataset, name: str) -> int:
    return next(index for index in range(len(dataset)) if dataset.describe(index) == name)


def test_a_draw_is_a_function_of_its_seed_and_grows() -> None:
    draws = [draw_shots(flowers("train"), 4, seed) for seed in (0, 0, 1)]
    prints = [draw.fingerprint() for draw in draws]
    assert prints[0] == prints[1] != prints[2]
    assert names(draw_shots(flowers("train"), 2, 0)) < names(draws[0])
    sizes = [names(draw_protocol(flowers, "train", size, 0)) for size in (5, 10, 20)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_the_protocol_takes_four_fifths_of_train_and_one_of_val() -> None:
    train, val, both = (draw_protocol(flowers, split, 20, 0) for split in ("train", "val", "train+val"))
    assert [len(train), len(val), len(both)] == [16, 4, 20]
    assert names(train) <= names(flowers("train")) and names(val) <= names(flowers("val"))
    assert names(both) == names(train) | names(val)
    assert "for train_size 20 drawn with seed 0" in both.source and "val split" in both.source


def test_fewer_than_asked_are_refused_with_the_numbers() -> None:
    with pytest.raises(DatasetError, match=r"shots = 11 needs 11 .* 3 of 3 classes have fewer, .* with 10"):
        draw_shots(flowers("train"), 11, 0)
    with pytest.raises(DatasetError, match=r"needs 80 train and 20 val images, and 'train' has 30"):
        draw_protocol(flowers, "train", 100, 0)

    def short_of_val(split: str):
        return create_dataset("synthetic_flowers", split, species=3, train_per_species=10, val_per_species=1)

    with pytest.raises(DatasetError, match=r"needs 16 train and 4 val images, and 'val' has 3: lower"):
        draw_protocol(short_of_val, "train+val", 20, 0)


def test_a_recipe_draws_the_splits_that_it_learns_from_and_no_others() -> None:
    kwargs = {"species": 3, "train_per_species": 10, "val_per_species": 4, "test_per_species": 2}
    sizes = {}
    for name, changes in {
        "all": {},
        "shots": {"shots": 2},
        "shots of both": {"shots": 2, "train_split": "train+val"},
        "size": {"train_size": 20},
    }.items():
        data = DataSettings(dataset_kwargs=kwargs, **changes)
        sizes[name] = [
            len(open_dataset(data, split, (16, 16))) for split in ("train", "val", "train+val", "test")
        ]
    assert sizes == {
        "all": [30, 12, 42, 6],
        "shots": [6, 12, 42, 6],
        "shots of both": [30, 12, 6, 6],
        "size": [16, 4, 20, 6],
    }


# --------------------------------------------------------------------------- folds


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_all_images_once_with_the_same_share_of_every_class(folds: int) -> None:
    targets = [0] * 11 + [1] * 4 + [2] * 7 + [-1] * 3
    parts = stratified_folds(targets, folds, seed=4)
    assert sorted(index for part in parts for index in part) == list(range(25))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for label in (-1, 0, 1, 2):
        counts = [sum(targets[index] == label for index in part) for part in parts]
        assert max(counts) - min(counts) <= 1
    assert parts == stratified_folds(targets, folds, seed=4) != stratified_folds(targets, folds, seed=5)


def test_data_seeds_go_through_the_folds_and_then_draw_others() -> None:
    def opened(split: str, seed: int):
        options = {"species": 3, "train_per_species": 4, "val_per_species": 2, "test_per_species": 1}
        recipe = Recipe(dataset_kwargs=options, folds=3, data_seed=seed)
        return open_dataset(recipe.data, split, (16, 16))

    held_out = [names(opened("val", seed)) for seed in range(3)]
    assert [len(part) for part in held_out] == [6, 6, 6] and len(set().union(*held_out)) == 18
    for seed, part in enumerate(held_out):
        train = names(opened("train", seed))
        assert not train & part and train | part == set().union(*held_out)
        assert not names(opened("test", seed)) & (train | part)
    assert len({frozenset(names(opened("test", seed))) for seed in range(3)}) == 1
    assert "fold 2 of 3" in opened("val", 1).source
    assert opened("val", 3).fingerprint() not in [opened("val", seed).fingerprint() for seed in range(3)]


def test_folds_take_all_images_and_hold_out_val() -> None:
    for changes in ({"shots": 2}, {"train_size": 10}, {"train_split": "train+val"}, {"eval_split": "test"}):
        with pytest.raises(RecipeError, match="folds = 3"):
            Recipe(folds=3, **changes)
    with pytest.raises(DatasetError, match="lower folds"):
        options = {"species": 2, "train_per_species": 1, "val_per_species": 1, "test_per_species": 1}
        open_dataset(Recipe(dataset_kwargs=options, folds=9).data, "val", (16, 16))
