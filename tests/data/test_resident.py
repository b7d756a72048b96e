"""Images that are kept on a device, and the batches that are made of them there."""

from __future__ import annotations

import logging

import pytest
import torch
from photos import Photos, epoch, photo
from PIL import Image

from vimtune.data import CorruptImageError, ImageDataset, build_transform, create_dataset, create_loader
from vimtune.data.loading.loader import WorkerLoader
from vimtune.data.loading.resident import store
from vimtune.data.loading.resident.loader import ResidentLoader
from vimtune.data.loading.resident.store import DoesNotFitError, stored_pixels
from vimtune.data.transforms import CHANGES

CPU = torch.device("cpu")
SIZE = (16, 16)
SPLITS = ("train", "val", "test")


def make(preset: str = "strong", dataset: ImageDataset | None = None, train: bool = True, **changes):
    options = {"batch_size": 4, "shuffle": True, "drop_last": False, "num_workers": 0, "seed": 3} | changes
    transform = build_transform(preset, SIZE, train=train, crop_pct=0.9)
    return create_loader(dataset or Photos(), transform, **{"cache": "device", "device": CPU, **options})


def assert_same(one, two) -> None:
    assert len(one) == len(two)
    for (images, labels), (others, other_labels) in zip(one, two, strict=True):
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(images, others, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", CHANGES)
def test_a_gpu_makes_the_same_images_and_the_host_never_waits(preset: str) -> None:
    loader = make(preset, device=torch.device("cuda", 0))
    list(loader)  # libraries start with the first batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (others, other_labels) in zip(batches, make(preset), strict=True):
        assert images.is_cuda and torch.equal(labels.cpu(), other_labels)
        # Sums in another order may round to the next whole number.
        assert ((images.cpu() - others).abs() > 1e-4).float().mean() < 0.02


def test_large_images_are_stored_no_larger_than_the_smallest_crop_needs() -> None:
    strong = build_transform("strong", (16, 16), train=True).preprocessing
    shape = stored_pixels(photo(300, 400), strong).shape
    assert shape == (57, 76, 3) and shape[0] * CHANGES["strong"].crop_scale[0] ** 0.5 >= 16
    assert stored_pixels(photo(20, 30), strong).shape == (20, 30, 3)
    assert stored_pixels(photo(60, 400), strong).shape == (17, 114, 3)
    assert stored_pixels(photo(300, 400), build_transform("none", (16, 18)).preprocessing).shape == (
        16,
        18,
        3,
    )


@pytest.mark.parametrize(("preset", "train"), [("strong", False), ("none", True)])
def test_what_is_not_random_is_the_same_to_the_bit(preset: str, train: bool) -> None:
    for (ours, labels), (host, host_labels) in zip(
        epoch(make(preset, train=train)), epoch(make(preset, train=train, cache="none")), strict=True
    ):
        assert torch.equal(ours, host) and torch.equal(labels, host_labels)


@pytest.mark.parametrize("preset", CHANGES)
def test_the_batch_does_not_matter(preset: str, monkeypatch) -> None:
    """Neither resuming, nor ranks, nor workers, nor how many batches are made together change an image."""
    whole = epoch(make(preset), 1)
    assert [len(labels) for _, labels in whole] == [4, 4, 1]
    for start in (1, 2, 3):
        assert_same(epoch(make(preset), 1, start), whole[start:])
    assert_same(epoch(make(preset, num_workers=1), 1), whole)
    ranks = [epoch(make(preset, rank=rank, world_size=2), 1) for rank in range(2)]
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert_same(joined, whole)
    monkeypatch.setattr("vimtune.data.loading.resident.loader._BYTES_AT_ONCE", 1)
    assert_same(epoch(make(preset), 1), whole)
    assert not torch.equal(epoch(make(preset), 0)[0][0], whole[0][0])
    assert not torch.equal(epoch(make(preset, seed=4), 1)[0][0], whole[0][0])


def test_resuming_is_exact_to_the_bit() -> None:
    loader = make()
    loader._together = 2
    whole = epoch(loader, 2)
    for start in (1, 2):
        for (one, _), (other, _) in zip(epoch(loader, 2, start), whole[start:], strict=True):
            assert torch.equal(one, other)


def test_batches_that_are_made_ahead_are_those_of_their_position() -> None:
    loader = make()
    loader._together = 1
    loader.set_position(1, 1)
    loader.read_ahead()
    assert_same(epoch(loader, 2), epoch(make(), 2))
    loader.set_position(3, 2)
    loader.read_ahead()
    assert_same(epoch(loader, 3, 2), epoch(make(), 3)[2:])
    assert epoch(loader, 3, 3) == []


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    list(make())
    assert torch.equal(torch.get_rng_state(), state)


def test_damaged_images_are_left_out_or_stop_the_epoch() -> None:
    loader = make(dataset=Photos(damaged=(1, 4)), shuffle=False, on_corrupt="skip")
    assert [labels.tolist() for _, labels in loader] == [[0, 2, 0], [2, 0, 1], [2]]
    assert loader.num_skipped == 2 and loader.skipped_paths == {"1.jpg", "4.jpg"}
    assert [places.tolist() for _, _, places in loader.unfinished()] == [[0, 2, 3], [5, 6, 7], [8]]
    with pytest.raises(CorruptImageError, match=r"1\.jpg"):
        list(make(dataset=Photos(damaged=(1,)), shuffle=False))
    only = make(dataset=Photos(damaged=(8,)), shuffle=False, batch_size=8, on_corrupt="skip")
    assert [images.shape for images, _ in only] == [(8, 3, *SIZE), (0, 3, *SIZE)]


def test_what_does_not_fit_is_refused_or_read_again(monkeypatch, caplog) -> None:
    monkeypatch.setattr("vimtune.data.loading.resident.store.room_on", lambda device: 100_000)
    with pytest.raises(DoesNotFitError, match=r"9 images of 'train' .*--cache host"):
        make()
    monkeypatch.setattr("vimtune.data.loading.resident.store.room_on", lambda device: 10**9)
    with caplog.at_level(logging.INFO):
        make()
    assert "train: 9 images on cpu as uint8" in caplog.text
    assert "1.0 GB free" in caplog.text


def test_auto_keeps_on_a_gpu_what_fits_in_every_rank(monkeypatch, caplog) -> None:
    assert isinstance(make(cache="auto"), WorkerLoader)
    monkeypatch.setattr("vimtune.data.loading.loader._is_gpu", lambda device: True)
    assert isinstance(make(cache="auto"), ResidentLoader)
    asked: list[bool] = []
    assert isinstance(make(cache="auto", agree=lambda fits: asked.append(fits)), WorkerLoader)
    monkeypatch.setattr("vimtune.data.loading.resident.store.SHARE", 0)
    with caplog.at_level(logging.INFO):
        assert isinstance(make(cache="auto", agree=lambda fits: asked.append(fits)), WorkerLoader)
    assert asked == [True, False]
    assert "decoded images are not kept: the 9 images of 'train'" in caplog.text


def test_a_data_set_of_the_registry_is_kept_on_the_device() -> None:
    flowers = create_dataset("synthetic_flowers", "train", img_size=SIZE, species=3, train_per_species=2)
    images, labels = epoch(make(dataset=flowers, batch_size=6))[0]
    assert images.shape == (6, 3, *SIZE) and sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert torch.isfinite(images).all()


def test_what_this_process_has_decoded_is_kept_where_it_is_told_to(monkeypatch) -> None:
    loads = []

    class Counted(Photos):
        def load(self, index: int) -> Image.Image:
            loads.append(index)
            return super().load(index)

    def decoded(damaged: tuple[int, ...] = (), **changes) -> int:
        """How many images are decoded for an epoch, which is the same whatever is kept."""
        options = {**changes, "on_corrupt": "skip"}
        monkeypatch.setattr(store, "_KEPT", forgetful)
        expected = epoch(make(dataset=Photos(damaged), **options), 2)
        monkeypatch.setattr(store, "_KEPT", kept)
        loads.clear()
        assert_same(epoch(make(dataset=Counted(damaged), **options), 2), expected)
        return len(loads)

    kept, forgetful = store._Kept(), store._Kept()
    all_of_them = decoded()
    assert decoded() == all_of_them > 0
    store.keep_decoded(2**20)
    assert decoded() == all_of_them and decoded() == 0
    assert decoded(preset="light") > 0 == decoded(preset="light")  # Other settings store other pixels.
    assert decoded(train=False) > 0 == decoded(train=False)
    kept = store._Kept()
    monkeypatch.setattr(store, "_KEPT", kept)
    store.keep_decoded(2**20)
    assert decoded(damaged=(4,)) == decoded(damaged=(4,)) > 0  # What could not be read may be mended.
    store.keep_decoded(100)  # no room for all of them
    assert decoded() == decoded() == all_of_them


def test_what_was_used_last_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(store, "_KEPT", store._Kept())
    train, val, test = (
        create_dataset(
            "synthetic_flowers",
            split,
            img_size=SIZE,
            species=2,
            **{f"{name}_per_species": 2 for name in SPLITS},
        )
        for split in SPLITS
    )

    def decoded(dataset: ImageDataset) -> int:
        """How many images a new store decodes; four, or none if they are kept."""
        with monkeypatch.context() as patch:
            loads = []
            patch.setattr(
                dataset, "load", lambda index: loads.append(index) or type(dataset).load(dataset, index)
            )
            make(preset="none", dataset=dataset)
            return len(set(loads))

    store.keep_decoded(2 * 4 * SIZE[0] * SIZE[1] * 3)  # room for two of the three
    assert [decoded(split) for split in (train, val, train)] == [4, 4, 0]
    assert decoded(test) == 4  # The images of "val" go, which were not used for longest.
    assert [decoded(split) for split in (train, test, val)] == [0, 0, 4]
