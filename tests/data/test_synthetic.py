"""Generated flowers are the same everywhere, and named and split as promised."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
import torch

from vimtune.data import DatasetError, create_dataset
from vimtune.data.synthetic.scene import render_flower
from vimtune.data.synthetic.species import CENTRES, GENUS_SIZE, make_species, species_name


def pixels(*key, size=(32, 32)) -> np.ndarray:
    return np.asarray(render_flower(*key, size))


def test_images_are_a_pure_function_of_their_key() -> None:
    key = (0, 3, "train", 5)
    image = pixels(*key)
    np.random.seed(1)
    make_species.cache_clear()
    assert np.array_equal(pixels(*key), image)
    for other in ((1, 3, "train", 5), (0, 4, "train", 5), (0, 3, "val", 5), (0, 3, "train", 6)):
        assert np.abs(pixels(*other).astype(int) - image).mean() > 5


@pytest.mark.parametrize("size", [(8, 8), (33, 65), (65, 33), (224, 224)])
def test_any_size(size: tuple[int, int]) -> None:
    image = pixels(0, 1, "test", 0, size=size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert image.std() > 10


def test_sizes_show_the_same_scene() -> None:
    for index in range(4):
        large = render_flower(0, 2, "train", index, (128, 128)).reduce(4)
        small = render_flower(0, 2, "train", index, (32, 32))
        assert np.abs(np.asarray(large, int) - np.asarray(small, int)).mean() < 9


def test_splits_counts_and_labels() -> None:
    options = {"species": 5, "train_per_species": 3, "val_per_species": 2, "test_per_species": 4}
    sets = {
        s: create_dataset("synthetic_flowers", s, **options) for s in ("train", "val", "test", "train+val")
    }
    assert {s: len(ds) for s, ds in sets.items()} == {"train": 15, "val": 10, "test": 20, "train+val": 25}
    for ds in sets.values():
        assert set(ds.targets) == set(range(5)) and len(ds.classes) == 5
    seen = {ds.load(i).tobytes() for s, ds in sets.items() if "+" not in s for i in range(len(ds))}
    assert len(seen) == 45
    assert sets["val"].describe(3) == "synthetic val 1/1"


def test_offset_shifts_species() -> None:
    options = {"img_size": (16, 16), "train_per_species": 1}
    whole = create_dataset("synthetic_flowers", "train", species=6, **options)
    rest = create_dataset("synthetic_flowers", "train", species=2, species_offset=4, **options)
    assert rest.classes == whole.classes[4:]
    assert rest.targets == [0, 1]
    assert rest.load(1).tobytes() == whole.load(5).tobytes()


def test_names_are_readable_and_unique_for_thousands() -> None:
    names = [species_name(0, number) for number in range(9000)]
    assert len(set(names)) == 9000
    assert all(2 <= len(name.split()) <= 4 and name.islower() for name in names)


@pytest.mark.parametrize("seed", [0, 1])
def test_species_of_a_genus_share_colours_and_differ_in_two_traits(seed: int) -> None:
    for genus in range(30):
        members = [make_species(seed, genus * GENUS_SIZE + i) for i in range(GENUS_SIZE)]
        assert len({m.centre for m in members}) == len({m.contrast for m in members}) == 1
        colors = np.array([m.color for m in members])
        assert np.abs(colors - colors[0]).max() < 0.15
        for i, one in enumerate(members):
            for two in members[:i]:
                traits = (one.petals != two.petals, one.outline != two.outline, one.pattern != two.pattern)
                assert sum(traits) == 2
    assert {make_species(seed, number).centre for number in range(40)} == set(CENTRES)


def test_colour_alone_does_not_tell_species() -> None:
    """A linear probe on colour histograms stays far below what shapes allow (chance: 6 %)."""

    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = {"train_per_species": 24, "test_per_species": 16}
        ds = create_dataset("synthetic_flowers", split, img_size=(32, 32), **sizes)
        bins = [np.asarray(ds.load(i)).reshape(-1, 3) // 64 @ np.array([16, 4, 1]) for i in range(len(ds))]
        rows = torch.tensor(np.stack([np.bincount(b, minlength=64) for b in bins])).float()
        return rows, torch.tensor(ds.targets)

    (x, y), (p, q) = features("train"), features("test")
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, p = (x - mean) / std, (p - mean) / std
    torch.manual_seed(0)
    probe = torch.nn.Linear(64, 16)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(probe(x), y).backward()
        optimizer.step()
    accuracy = (probe(p).argmax(1) == q).float().mean().item()
    assert 0.12 < accuracy < 0.5


def test_generation_is_fast() -> None:
    render_flower(0, 0, "train", 0, (64, 64))
    start = time.process_time()
    for i in range(60):
        render_flower(0, i % 16, "train", i, (64, 64))
    assert 60 / (time.process_time() - start) > 100  # about 350 on one free core


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"species": 0}, "species=0"),
        ({"species": 2.5}, r"species=2\.5"),
        ({"train_per_species": -1}, "train_per_species=-1"),
        ({"species_offset": -4}, "species_offset=-4"),
        ({"species": 1}, "species=1"),
        ({"species": "abc"}, "species='abc'"),
        ({"species": "3"}, "species='3'"),
        ({"species": True}, "species=True"),
        ({"species": None}, "species=None"),
        ({"species": float("nan")}, "species=nan"),
        ({"species": [2]}, r"species=\[2\]"),
        ({"species": 10**30}, r"species=10{30}"),
        ({"species": 10**6000}, "species=a whole number of"),
        ({"species_offset": 10**9}, "species_offset=1000000000"),
        ({"train_per_species": 10**12}, "train_per_species=1000000000000"),
        ({"species": 100_000, "train_per_species": 10**6}, "100,000,000,000 images.*more than 10,000,000"),
        ({"img_size": (4, 64)}, "img_size"),
    ],
)
def test_bad_options_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as error:
        create_dataset("synthetic_flowers", "train", **wrong)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_every_image_has_its_place() -> None:
    options = {"species": 3, "train_per_species": 2, "val_per_species": 3, "species_offset": 5}
    ds = create_dataset("synthetic_flowers", "train+val", **options)
    expected = [("train", n, i) for n in (5, 6, 7) for i in (0, 1)]
    expected += [("val", n, i) for n in (5, 6, 7) for i in (0, 1, 2)]
    assert [ds.describe(k) for k in range(len(ds))] == [f"synthetic {p} {n}/{i}" for p, n, i in expected]
    assert ds.targets == [n - 5 for _, n, _ in expected]
    with pytest.raises(IndexError):
        ds.describe(len(ds))


def test_the_fingerprint_knows_all_that_images_depend_on() -> None:
    def fingerprint(split: str = "train", **changes: object) -> str:
        options = {"species": 3, "img_size": (16, 16), "seed": 0} | changes
        return create_dataset("synthetic_flowers", split, **options).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    others = [fingerprint(**c) for c in ({"seed": 1}, {"img_size": (16, 24)}, {"species_offset": 4})]
    others += [fingerprint("val"), fingerprint(species=4), fingerprint(train_per_species=3)]
    assert len({first, *others}) == 7


def test_images_are_those_of_earlier_versions() -> None:
    """Scores and pretrained weights belong to these very pixels."""
    digest = hashlib.sha256()
    for key in ((0, 3, "train", 5), (0, 40, "val", 1), (7, 11, "test", 2), (2, 4_001, "train", 0)):
        digest.update(render_flower(*key, (24, 40)).tobytes())
        digest.update(species_name(*key[:2]).encode())
    assert digest.hexdigest() == "9ee5fcfe583c7127236f7ac62f47a4a681932398380994e81808e36c7bee838e"
