"""Images that are cropped on the host and changed on the device, as on the way to a GPU."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from photos import Photos, epoch, photo
from PIL import Image

from vimtune.data import CorruptImageError, build_transform, create_loader
from vimtune.data.device.augmentation import Augmentation
from vimtune.data.loading import loader as loaders
from vimtune.data.loading.cropped import CroppedSamples
from vimtune.data.loading.samples import Key
from vimtune.data.transforms import CHANGES

CPU = torch.device("cpu")
SIZE = (48, 40)
"""So large that no image of `Photos` is reduced where it is stored."""


@pytest.fixture
def make(monkeypatch):
    """`make(preset, ...)`: a loader for what is taken for a GPU."""
    monkeypatch.setattr(loaders, "_is_gpu", lambda device: True)

    def made(preset: str = "strong", dataset=None, train: bool = True, **changes):
        options = {"batch_size": 4, "shuffle": True, "drop_last": False, "num_workers": 0, "seed": 3}
        transform = build_transform(preset, SIZE, train=train)
        return create_loader(
            dataset or Photos(), transform, **{"cache": "none", "device": CPU, **options, **changes}
        )

    return made


def assert_same(one, two) -> None:
    assert len(one) == len(two)
    for (images, labels), (others, other_labels) in zip(one, two, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


def difference(ours, theirs) -> float:
    """The share of values that lie more than 3 of 255 levels apart."""
    images, others = (torch.cat([images for images, _ in batches]) for batches in (ours, theirs))
    return ((images - others).abs() > 3 / 255 / 0.225).float().mean().item()


@pytest.mark.parametrize(("preset", "share"), [("light", 0.001), ("medium", 0.002), ("strong", 0.03)])
def test_images_are_those_of_the_cache_on_the_device(make, preset: str, share: float) -> None:
    """But for what two ways of resizing round; equalizing and solarizing make more of a difference of 1."""
    ours, theirs = (
        [batch for number in range(4) for batch in epoch(make(preset, cache=cache), number)]
        for cache in ("none", "device")
    )
    assert difference(ours, theirs) < share
    assert difference(ours[:2], theirs[3:5]) > 0.5  # of the next epoch
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one[1], other[1]) and one[0].shape[2:] == SIZE


def test_crops_travel_as_bytes_with_the_numbers_that_are_left(make) -> None:
    for workers in (0, 1):
        loader = make("medium", num_workers=workers)
        for parts, labels, places in loader.unfinished():
            assert parts["images"].dtype == torch.uint8
            assert parts["images"].shape == (len(places), *SIZE, 3) and len(labels) == len(places)
            assert parts["draws"].shape == (len(places), 8 + 23)
            assert all(part.is_shared() == (workers > 0) for part in parts.values())
        loader.close()


def test_neither_workers_nor_batches_nor_the_start_change_an_image(make) -> None:
    whole = epoch(make(), 2)
    shared = make(num_workers=2)
    for number in (1, 2):  # The second epoch runs in the surviving workers.
        assert_same(epoch(shared, number), epoch(make(), number))
    shared.close()
    assert_same(epoch(make(), 2, 1), whole[1:])
    large = epoch(make(batch_size=9), 2)
    torch.testing.assert_close(torch.cat([images for images, _ in whole]), large[0][0], atol=1e-5, rtol=0)


def test_epochs_and_seeds_differ(make) -> None:
    first = epoch(make("light", shuffle=False), 0)
    for other in (
        epoch(make("light", shuffle=False), 1),
        epoch(make("light", shuffle=False, seed=4), 0),
    ):
        assert not torch.equal(first[0][0], other[0][0])


def test_an_image_that_comes_again_is_changed_in_another_way(make) -> None:
    class Uneven(Photos):
        def __init__(self) -> None:
            super().__init__()
            self.targets = [0] * 8 + [1]

    loader = make("light", Uneven(), balanced=True, batch_size=9)
    ((parts, _, places),) = loader.unfinished()
    again = loader.finish(parts)[torch.from_numpy(places) == 8]
    assert len(again) in (4, 5)
    assert len({image.numpy().tobytes() for image in again}) == len(again)


def test_damaged_images_are_left_out_or_stop_the_epoch(make) -> None:
    loader = make(dataset=Photos(damaged=(1, 8)), shuffle=False, on_corrupt="skip")
    assert [labels.tolist() for _, labels in loader] == [[0, 2, 0], [1, 2, 0, 1], []]
    assert [len(images) for images, _ in loader] == [3, 4, 0]
    assert [places.tolist() for _, _, places in loader.unfinished()] == [[0, 2, 3], [4, 5, 6, 7], []]
    with pytest.raises(CorruptImageError, match=r"1\.jpg"):
        list(make(dataset=Photos(damaged=(1,)), shuffle=False))


@pytest.mark.parametrize(("preset", "train"), [("strong", False), ("none", True)])
def test_what_is_not_random_is_what_the_host_makes(make, preset: str, train: bool, monkeypatch) -> None:
    ours = epoch(make(preset, train=train, shuffle=False))
    monkeypatch.setattr(loaders, "_is_gpu", lambda device: False)
    assert_same(ours, epoch(make(preset, train=train, shuffle=False)))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_images_of_any_shape_are_cut(interpolation: str, mode: str) -> None:
    transform = build_transform("medium", SIZE, train=True, interpolation=interpolation)
    samples = CroppedSamples(Photos(), Augmentation(transform.preprocessing), 0)
    images = [photo(40, 30), Image.new("RGB", (1, 1)), photo(3, 200), photo(300, 2)]
    made = samples.prepare([image.convert(mode) for image in images], [Key(0, n) for n in range(4)])
    assert [part["images"].shape for part in made] == [(*SIZE, 3)] * 4


@pytest.mark.parametrize("cache", ["none", "device"])
@pytest.mark.parametrize("size", [(32, 128), (128, 32), (16, 400), (8, 1)])
def test_narrow_images_for_models_of_another_shape(make, monkeypatch, size, cache: str) -> None:
    """A box in the middle had no pixel at all, and what has one column could not be mirrored."""

    class Narrow(Photos):
        def load(self, index: int) -> Image.Image:
            return photo(*[(1, 1), (1, 99), (99, 1), (2, 99), (99, 2), (3, 500), (500, 3)][index % 7])

    monkeypatch.setitem(globals(), "SIZE", size)
    for preset in CHANGES:
        for images, _ in make(preset, Narrow(), cache=cache):
            assert images.shape[2:] == size and images.isfinite().all()


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(("room", "sizes"), [(10**9, [8, 1]), (1, [1] * 9), (5000, [2, 2, 2, 2, 1])])
def test_few_images_are_decoded_at_a_time_and_fewer_large_ones(make, monkeypatch, gpu, room, sizes) -> None:
    monkeypatch.setattr(loaders, "_is_gpu", lambda device: gpu)
    settings = {"batch_size": 9, "shuffle": False}
    whole, loader = epoch(make("light", **settings)), make("light", **settings)
    prepare, seen = loader._samples.prepare, []
    monkeypatch.setattr("vimtune.data.loading.samples._BYTES_AT_A_TIME", room)

    def counted(images, keys):
        seen.append(len(keys))
        return prepare(images, keys)

    monkeypatch.setattr(loader._samples, "prepare", counted)
    assert_same(epoch(loader), whole)
    assert seen == sizes


@pytest.mark.parametrize("gpu", [True, False])
def test_a_damaged_image_keeps_no_other_in_memory(make, monkeypatch, gpu: bool) -> None:
    loaded = []

    class Watched(Photos):
        def load(self, index: int) -> Image.Image:
            image = super().load(index)
            loaded.append(weakref.ref(image))
            return image

    monkeypatch.setattr(loaders, "_is_gpu", lambda device: gpu)
    loader = make(dataset=Watched(damaged=(1,)), on_corrupt="skip", once=True)
    gc.collect()
    gc.disable()  # What waits for it would wait for long: there are few objects, though large ones.
    try:
        for _ in loader:
            assert not any(image() is not None for image in loaded)
    finally:
        gc.enable()


def test_another_process_can_be_given_them() -> None:
    samples = CroppedSamples(
        Photos(), Augmentation(build_transform("light", SIZE, train=True).preprocessing), 0
    )
    samples.finish(samples[[Key(0, 0)]].parts)
    one, other = samples[[Key(0, 1)]], pickle.loads(pickle.dumps(samples))[[Key(0, 1)]]
    assert all(torch.equal(one.parts[name], other.parts[name]) for name in ("images", "draws"))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", CHANGES)
def test_a_gpu_makes_the_same_images_and_the_host_never_waits(preset: str) -> None:
    device, transform = torch.device("cuda", 0), build_transform(preset, SIZE, train=True)
    samples = CroppedSamples(Photos(), Augmentation(transform.preprocessing), 0)
    parts = samples[[Key(0, image) for image in range(9)]].parts
    moved = {name: part.to(device) for name, part in parts.items()}
    samples.finish(moved)  # Libraries start with the first batch.
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = samples.finish(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Sums in another order may round to the next whole number.
    assert ((images.cpu() - samples.finish(parts)).abs() > 1e-4).float().mean() < 0.02
