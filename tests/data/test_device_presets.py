"""The presets on the device: the same for any batch, and in distribution those of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from photos import photo
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vimtune.data import build_transform
from vimtune.data.device import crops, operations
from vimtune.data.device.augmentation import Augmentation
from vimtune.data.device.crops import Boxes, draw_boxes, resize_boxes
from vimtune.data.device.draws import Draws, uniforms
from vimtune.data.loading.resident.store import stored_pixels
from vimtune.data.transforms import CHANGES

SIZE = (16, 16)


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
    augmentation = Augmentation(transform.preprocessing)
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
    augmentation = Augmentation(transform.preprocessing)
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
