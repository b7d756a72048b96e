"""The presets on the device: the same for any batch, and in distribution those of the host."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vimtune.data import CorruptImageError, ImageDataset, build_transform, create_dataset, create_loader
from vimtune.data.loading.loader import WorkerLoader
from vimtune.data.loading.resident import crops, operations, store
from vimtune.data.loading.resident.augmentation import Augmentation, stored_pixels
from vimtune.data.loading.resident.crops import Boxes, draw_boxes, resize_boxes
from vimtune.data.loading.resident.draws import Draws, uniforms
from vimtune.data.loading.resident.loader import ResidentLoader
from vimtune.data.loading.resident.store import DoesNotFitError
from vimtune.data.transforms import CHANGES

CPU = torch.device("cpu")
SIZE = (16, 16)


def photo(height: int = 90, width: int = 120, shift: float = 0.0) -> Image.Image:
    """Waves of several colours and lengths."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + shift
    waves = np.stack([np.sin(x / 9) + np.cos(y / 7), np.cos(x / 11 + y / 13), np.sin(y / 5)], -1)
    return Image.fromarray((127 + 60 * waves).clip(0, 255).astype(np.uint8))


class Photos(ImageDataset):
    """Nine images of different sizes; those whose numbers are in `damaged` cannot be decoded."""

    name = "photos"

    def __init__(self, damaged: tuple[int, ...] = ()) -> None:
        self.classes, self.split, self.source = ["a", "b", "c"], "train", "test"
        self.targets = [index % 3 for index in range(9)]
        self.damaged = damaged

    def load(self, index: int) -> Image.Image:
        """Make image `index`."""
        if index in self.damaged:
            raise CorruptImageError(f"{index}.jpg", "damaged")
        return photo(14 + 5 * index, 60 - 4 * index, shift=index)

    def describe(self, index: int) -> str:
        """Name image `index`."""
        return f"photo {index}"


SPLITS = ("train", "val", "test")


def make(preset: str = "strong", dataset: ImageDataset | None = None, train: bool = True, **changes):
    options = {"batch_size": 4, "shuffle": True, "drop_last": False, "num_workers": 0, "seed": 3} | changes
    transform = build_transform(preset, SIZE, train=train, crop_pct=0.9)
    return create_loader(dataset or Photos(), transform, **{"cache": "device", "device": CPU, **options})


def epoch(loader, number: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader.set_position(number, start)
    return list(loader)


def assert_same(one, two) -> None:
    assert len(one) == len(two)
    for (images, labels), (others, other_labels) in zip(one, two, strict=True):
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(images, others, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------- random numbers


def reference(seed: int, epoch: int, image: int, draw: int) -> float:
    """The number with unsigned integers of any length."""

    def mix(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        return bits ^ (bits >> 31)

    key = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    step = 0x9E3779B97F4A7C15
    of_image = mix((image * step + key) % 2**64)
    return (mix((of_image + (draw + 1) * step) % 2**64) >> 40) / 2**24


def test_numbers_are_those_of_splitmix64() -> None:
    images = torch.tensor([0, 1, 7, 123_456])
    table = uniforms(5, 2, images, 3)
    expected = [[reference(5, 2, image, draw) for draw in range(3)] for image in images.tolist()]
    assert torch.equal(table.double(), torch.tensor(expected, dtype=torch.float64))


def test_numbers_are_uniform_and_independent() -> None:
    table = torch.cat([uniforms(0, epoch, torch.arange(5000), 4) for epoch in (0, 1)], 1).double()
    assert table.min() >= 0 and table.max() < 1
    for column in table.T:
        counts = torch.histc(column, 20, 0, 1)
        assert ((counts - 250) ** 2 / 250).sum() < 45  # chi-squared of 19 degrees: 0.1 % lie beyond 43.8
    away = torch.corrcoef(table.T) - torch.eye(8)
    assert away.abs().max() < 0.06  # four standard errors
    assert torch.corrcoef(torch.stack([table[:-1, 0], table[1:, 0]]))[0, 1].abs() < 0.06


# --------------------------------------------------------------------------- crops


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_boxes_are_resized_as_pillow_does(interpolation: str) -> None:
    image = photo(40, 60)
    boxes = [(0, 0, 40, 60), (3, 5, 12, 50), (10, 20, 8, 9), (0, 31, 40, 29)]
    pixels = torch.from_numpy(np.array(image)).expand(len(boxes), -1, -1, -1)
    columns = Boxes(*torch.tensor(boxes, dtype=torch.float32).unbind(1))
    mirrored = torch.tensor([False, True, False, True])
    found = resize_boxes(pixels, columns, (18, 14), interpolation, mirrored)
    resample = Image.Resampling[interpolation.upper()]
    for result, (top, left, height, width), flip in zip(found, boxes, mirrored, strict=True):
        part = image.crop((left, top, left + width, top + height)).resize((14, 18), resample)
        part = ImageOps.mirror(part) if flip else part
        away = (result.permute(1, 2, 0) - torch.from_numpy(np.array(part)).float()).abs()
        # Pillow rounds between the two directions as well, and its weights have 22 bits. For "nearest" it
        # adds distances up, so that a place on the border of two pixels may get the other one.
        assert (away > 1).float().mean() <= (0.2 if interpolation == "nearest" else 0)


def test_boxes_have_the_shares_and_shapes_that_were_asked_for() -> None:
    heights, widths = torch.full((20_000,), 300), torch.full((20_000,), 400)
    draws = Draws(uniforms(1, 0, torch.arange(20_000), crops.DRAWS_OF_A_BOX))
    boxes, fitting = draw_boxes(draws, heights, widths, (0.1, 0.5), (3 / 4, 4 / 3))
    shares = boxes.height * boxes.width / (300 * 400)
    assert fitting.all()
    assert abs(shares.mean() - 0.3) < 0.005 and abs(shares.std() - 0.4 / 12**0.5) < 0.003
    logs = (boxes.width / boxes.height).log()
    assert abs(logs.mean()) < 0.005 and logs.abs().max() < 0.31
    assert (boxes.top + boxes.height <= 300).all() and (boxes.left + boxes.width <= 400).all()
    assert (boxes.top >= 0).all() and (boxes.left >= 0).all()
    middle = (boxes.top + boxes.height / 2).mean(), (boxes.left + boxes.width / 2).mean()
    assert abs(middle[0] - 150) < 2 and abs(middle[1] - 200) < 2


@pytest.mark.parametrize("scale", [changes.crop_scale for changes in CHANGES.values()])
def test_boxes_are_distributed_as_those_of_torchvision(scale: tuple[float, float]) -> None:
    """Large boxes often do not fit, and are drawn again."""
    from torchvision.transforms import v2

    transform, image = v2.RandomResizedCrop(24, scale=scale), torch.empty(3, 300, 400)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [transform.make_params([image]) for _ in range(600)]
    host = Boxes(*(torch.tensor([float(m[key]) for m in made]) for key in ("top", "left", "height", "width")))
    draws = Draws(uniforms(3, 0, torch.arange(4000), crops.DRAWS_OF_A_BOX))
    ours, fitting = draw_boxes(
        draws, torch.full((4000,), 300), torch.full((4000,), 400), scale, (3 / 4, 4 / 3)
    )
    for moment in (torch.mean, torch.std):
        areas = [moment(boxes.height * boxes.width / 120_000) for boxes in (ours, host)]
        aspects = [moment((boxes.width / boxes.height).log()) for boxes in (ours, host)]
        lefts = [moment(boxes.left / 400) for boxes in (ours, host)]
        for pair in (areas, aspects, lefts):
            assert abs(pair[0] - pair[1]) < 0.03
    assert fitting.float().mean() > 0.99


def test_images_that_no_box_fits_are_cut_in_the_middle() -> None:
    draws = Draws(uniforms(1, 0, torch.arange(50), crops.DRAWS_OF_A_BOX))
    _, fitting = draw_boxes(draws, torch.full((50,), 10), torch.full((50,), 200), (0.9, 1.0), (0.75, 4 / 3))
    assert not fitting.any()
    box = crops.middle_boxes(torch.tensor([10, 90]), torch.tensor([200, 30]), (0.75, 4 / 3))
    assert torch.stack(box, 1).tolist() == [[0, 93, 10, 13], [25, 0, 40, 30]]


# --------------------------------------------------------------------------- operations


def batch(count: int = 3) -> tuple[list[Image.Image], Tensor]:
    images = [photo(24, 32, shift=5.0 * index) for index in range(count)]
    return images, torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]).float()


def away(found: Tensor, expected: Image.Image) -> float:
    """Largest difference from an image of Pillow."""
    return (found.permute(1, 2, 0) - torch.from_numpy(np.array(expected)).float()).abs().max().item()


@pytest.mark.parametrize(
    ("name", "pillows", "tolerance"),
    [
        ("posterize", lambda image: ImageOps.posterize(image, 7), 0),
        ("solarize", lambda image: ImageOps.solarize(image, 255 * 0.7), 0),
        ("autocontrast", ImageOps.autocontrast, 1),
        ("equalize", ImageOps.equalize, 0),
    ],
)
def test_tables_are_those_of_pillow(name: str, pillows, tolerance: int) -> None:
    images, tensors = batch(4)
    tensors[2] = 77.0  # an image of one colour
    images[2] = Image.new("RGB", (32, 24), (77, 77, 77))
    found = operations.look_up(tensors, {name: torch.tensor([True, True, True, False])})
    for result, image in zip(found[:3], images, strict=False):
        assert away(result, pillows(image)) <= tolerance
    assert torch.equal(found[3], tensors[3])


def test_blends_are_those_of_pillow_each_with_its_own_factor() -> None:
    images, tensors = batch(5)
    kinds = torch.tensor(
        [operations.BRIGHTNESS, operations.CONTRAST, operations.SATURATION, operations.SHARPNESS, 0]
    )
    factors = torch.tensor([0.73, 1.27, 0.6, 1.3, 1.0])
    found = operations.blend(tensors, kinds, factors, sharpness=True)
    enhance = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, ImageEnhance.Sharpness]
    for index, enhancer in enumerate(enhance):
        assert away(found[index], enhancer(images[index]).enhance(factors[index].item())) <= 2
    assert torch.equal(found[4], tensors[4])


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"shear": (0.2, 0.0)}, {"shear": [float(np.degrees(np.arctan(0.2))), 0.0], "center": [0, 0]}),
        ({"shear": (0.0, -0.2)}, {"shear": [0.0, -float(np.degrees(np.arctan(0.2)))], "center": [0, 0]}),
        ({"shift": (3.0, 0.0)}, {"translate": [3, 0]}),
        ({"shift": (0.0, -5.0)}, {"translate": [0, -5]}),
        ({"angle": float(np.radians(20))}, {"angle": -20.0}),
    ],
)
def test_movements_are_those_of_torchvision(settings: dict, options: dict) -> None:
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    images, tensors = batch(1)
    given = {"shear": (0.0, 0.0), "shift": (0.0, 0.0), "angle": 0.0} | settings
    columns = {
        name: tuple(torch.tensor([v]) for v in value) if isinstance(value, tuple) else torch.tensor([value])
        for name, value in given.items()
    }
    found = operations.move(tensors, **columns, fill=torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1))
    asked = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | options
    expected = functional.affine(
        images[0], **asked, interpolation=v2.InterpolationMode.BILINEAR, fill=[10, 20, 30]
    )
    differences = (found[0].permute(1, 2, 0) - torch.from_numpy(np.array(expected)).float()).abs()
    # At the border Pillow takes either the fill or the image, and we a mixture.
    assert differences.median() <= 1 and (differences > 2).float().mean() < 0.12


def test_neutral_settings_change_nothing() -> None:
    _, tensors = batch()
    zero, fill = torch.zeros(3), torch.full((3, 1, 1), 124.0)
    assert torch.equal(operations.move(tensors, (zero, zero), (zero, zero), zero, fill), tensors)
    assert torch.equal(operations.turn_hue(tensors, zero), tensors)
    assert torch.equal(operations.erase(tensors, zero, zero, zero, zero + 9, fill), tensors)
    draws = Draws(uniforms(0, 0, torch.arange(3), operations.DRAWS_OF_JITTER))
    assert torch.equal(operations.jitter(tensors, draws, 0.4, 0.4, 0.4, 0.1, chance=0.0), tensors)


def test_the_hue_turns_as_in_hsv() -> None:
    import colorsys

    _, tensors = batch(2)
    found = operations.turn_hue(tensors, torch.tensor([0.05, -0.3]))
    for image, turned, turn in zip(tensors, found, (0.05, -0.3), strict=True):
        for y, x in ((0, 0), (11, 7), (23, 31), (4, 19)):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
            expected = [255 * c for c in colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)]
            assert (turned[:, y, x] - torch.tensor(expected)).abs().max() <= 0.51


# --------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", CHANGES)
@pytest.mark.parametrize("library", ["torchvision", "albumentations"])
def test_presets_agree_in_distribution_with_those_of_the_host(preset: str, library: str) -> None:
    """Mean image, spread of the images, mean and spread of brightness, and contrast.

    Our "strong" follows torchvision, where operations have one magnitude; with albumentations it is drawn.
    """
    count, image = 200, photo(45, 60)
    transform = build_transform(preset, (24, 24), train=True, crop_pct=1.0, library=library)
    host = torch.stack([transform(image, seed) for seed in range(count)])
    augmentation = Augmentation(transform.preprocessing, CPU)
    stored = torch.from_numpy(stored_pixels(image, transform.preprocessing))
    sizes = torch.full((count,), stored.shape[0]), torch.full((count,), stored.shape[1])
    draws = Draws(uniforms(0, 0, torch.arange(count), augmentation.num_draws))
    ours = augmentation(stored.expand(count, -1, -1, -1), *sizes, draws)
    assert ours.shape == host.shape and ours.dtype == host.dtype
    # Colours of "medium" vary twice as far as those of "light", so the means of two samples do, too.
    tolerance = {"medium": 0.14, "strong": 0.2 if library == "albumentations" else 0.07}.get(preset, 0.07)
    spread = host.std(0)
    # The mean over the pixels of what are standard normal numbers but for the other kernels is 0.8.
    errors = (ours.mean(0) - host.mean(0)).abs() / (spread * (2 / count) ** 0.5)
    assert errors.mean() < 3
    for moment in (
        lambda images: images.std(0).mean(),
        lambda images: images.mean((0, 2, 3)),
        lambda images: images.mean((2, 3)).std(0),
        lambda images: images.std((2, 3)).mean(0),
    ):
        torch.testing.assert_close(moment(ours), moment(host), atol=tolerance, rtol=0)


def augmented(image: np.ndarray, preset: str, count: int) -> Tensor:
    """`count` draws of an image (H, W, 3) at 24 px, without normalisation."""
    transform = build_transform(preset, (24, 24), (0, 0, 0), (1, 1, 1), train=True)
    augmentation = Augmentation(transform.preprocessing, CPU)
    stored = torch.from_numpy(image).expand(count, -1, -1, -1)
    sizes = (torch.full((count,), side) for side in image.shape[:2])
    numbers = uniforms(0, 0, torch.arange(count), augmentation.num_draws)
    return augmentation(stored, *sizes, Draws(numbers))


@pytest.mark.parametrize("preset", CHANGES)
def test_half_of_the_images_are_mirrored(preset: str) -> None:
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (40, 1, 3))
    grey = augmented(ramp, preset, 1000).mean(1)
    rising = (grey[:, :, -6:].mean((1, 2)) > grey[:, :, :6].mean((1, 2))).float().mean()
    assert abs(rising - 0.5) < 0.06


def test_as_much_is_erased_as_on_the_host() -> None:
    """Of white images, with black as the mean colour, erasing, moving and solarizing make parts black."""
    white = np.full((40, 40, 3), 255, np.uint8)
    ours = augmented(white, "strong", 2000)
    options = {"train": True, "library": "torchvision"}
    transform = build_transform("strong", (24, 24), (0, 0, 0), (1, 1, 1), **options)
    host = torch.stack([transform(Image.fromarray(white), seed) for seed in range(300)])
    shares = [(images == 0).all(1).float().mean((1, 2)) for images in (ours, host)]
    assert abs(shares[0].mean() - shares[1].mean()) < 0.03
    for low, high in ((0.015, 0.1), (0.1, 0.2), (0.2, 0.34), (0.99, 1.0)):
        found = [((share >= low) & (share <= high)).float().mean() for share in shares]
        assert abs(found[0] - found[1]) < 0.07, (low, high)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


# --------------------------------------------------------------------------- loader


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
