"""Image files: which are found below a folder, and how each is opened."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import shutil
import socket
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from vimtune.data import CorruptImageError, ImageReadError, find_images, load_image
from vimtune.data.files import images
from vimtune.data.files import pixels as pixels_of

EXIF_ORIENTATION = 0x0112


def photo(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 10, y * 15, (x + y) * 6], -1).astype(np.uint8))


def saved(folder: Path, image: Image.Image, name: str, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def grey(path: Path) -> np.ndarray:
    pixels = np.asarray(load_image(path))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# --------------------------------------------------------------------------- modes


RAMP = np.linspace(0, 1, 24 * 16).reshape(16, 24)


@pytest.mark.parametrize("extension", sorted(images.EXTENSIONS))
def test_every_extension_opens_what_pillow_writes_under_it(extension: str, tmp_path) -> None:
    if extension == ".pfm":
        image = Image.fromarray(RAMP.astype(np.float32))
    elif extension == ".pbm":
        image = photo().convert("1")
    else:
        image = photo().convert("L" if extension in (".pgm", ".gif") else "RGB")
    suffix = {".jpc": ".j2k"}.get(extension, extension)
    path = saved(tmp_path, image, f"x{suffix}").rename(tmp_path / f"y{extension}")
    loaded = load_image(path)
    assert loaded.mode == "RGB" and loaded.size == (24, 16)
    expected = np.asarray(image.convert("RGB"), np.float64)
    if extension != ".pfm":
        assert abs(np.asarray(loaded, np.float64) - expected).mean() < 12


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "x.avif", "x.heic"])
def test_exif_orientation_is_followed(value: int, name: str, tmp_path) -> None:
    """The stored pixels are those of a camera that was turned; the image is upright again."""
    if os.path.splitext(name)[1] not in images.EXTENSIONS:
        pytest.skip("not in this build of Pillow")
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("red", (0, 0, 24, 16))
    upright.paste("blue", (24, 0, 48, 16))
    turned = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[value]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = value
    path = saved(tmp_path, turned, name, exif=exif.tobytes())
    loaded = load_image(path)
    assert loaded.size == (48, 32)
    corners = [loaded.getpixel(at) for at in ((6, 4), (42, 4), (6, 28))]
    red, blue, black = (np.array(c, int) for c in corners)
    assert red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0] and black.max() < 40


def test_damaged_exif_data_do_not_cost_the_image(tmp_path) -> None:
    path = saved(tmp_path, photo(), "x.webp", exif=b"Exif\0\0not a header at all", lossless=True)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(photo()))


def test_plain_modes_are_pillows_conversion(tmp_path) -> None:
    for mode, name in (("L", "a.png"), ("1", "b.png"), ("P", "c.png"), ("P", "d.gif"), ("CMYK", "e.tif")):
        image = photo().convert(mode)
        path = saved(tmp_path, image, name)
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(image.convert("RGB"))), name
    for mode in ("HSV", "RGBX", "YCbCr"):
        image = photo().convert(mode)
        assert np.array_equal(np.asarray(pixels_of.to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_alpha_is_laid_over_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 2))
    image.putpixel((2, 0), (0, 0, 0, 128))
    if mode == "PA":
        alpha, image = image.getchannel("A"), image.convert("P")
        image.putalpha(alpha)
    elif mode == "La":
        image = image.convert("LA")
    pixels = np.asarray(pixels_of.to_rgb(image.convert(mode)))
    assert (pixels[:, :2] == 255).all() and (pixels[:, 3] == 0).all()
    assert (abs(pixels[0, 2].astype(int) - 127) <= 1).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_transparent_colour_is_white(mode: str, tmp_path) -> None:
    """PNG files may name one colour, or palette entry, that is not to be seen."""
    if mode == "I;16":
        image, transparent = Image.fromarray(np.full((4, 4), 300, np.uint16)), 300
        image.putpixel((3, 3), 5)
    elif mode == "P":
        image, transparent = Image.new("P", (4, 4), 0), 0
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.putpixel((3, 3), 1)
    else:
        image = Image.new(mode, (4, 4), {"1": 1, "L": 90, "RGB": (90, 80, 70)}[mode])
        image.putpixel((3, 3), 0)
        transparent = {"1": 1, "L": 90, "RGB": (90, 80, 70)}[mode]
    path = saved(tmp_path, image, "x.png", transparency=transparent)
    loaded = load_image(path)
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((3, 3)) == (0, 0, 0)


def test_a_palette_with_alpha_is_laid_over_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, 0, 0, 0, 0, 255], "RGBA")
    image.putpixel((1, 0), 1)
    assert list(np.asarray(pixels_of.to_rgb(image))[0, :, 0]) == [255, 0]


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_sixteen_bit_grey_keeps_its_upper_byte(byteorder: str, tmp_path) -> None:
    values = np.rint(RAMP * 65535).astype(f"{byteorder}u2")
    image = Image.frombytes("I;16" if byteorder == "<" else "I;16B", (24, 16), values.tobytes())
    path = saved(tmp_path, image, "x.tif")
    assert np.array_equal(grey(path), values >> 8)


def test_sixteen_bit_grey_of_every_format_looks_alike(tmp_path) -> None:
    values = np.rint(RAMP * 65535).astype(np.uint16)
    for name in ("x.png", "x.tif", "x.jp2"):
        assert np.array_equal(grey(saved(tmp_path, Image.fromarray(values), name)), values >> 8), name
    dark = (values >> 8).astype(np.uint16)  # nearly black, and to stay so
    (tmp_path / "x.pgm").write_bytes(b"P5 24 16 65535 " + dark.astype(">u2").tobytes())
    assert grey(tmp_path / "x.pgm").max() == 0


@pytest.mark.parametrize(
    ("low", "high", "black", "white"),
    [
        (0, 1, 0, 255),
        (0, 200, 0, 255),
        (0, 255, 0, 255),
        (0, 256, 0, 65535),
        (0, 65535, 0, 65535),
        (7, 2**31 - 1, 7, 2**31 - 1),
        (-1, 200, -1, 200),
        (-(2**31), -(2**30), -(2**31), -(2**30)),
    ],
)
def test_whole_numbers_are_scaled_by_the_smallest_range(low, high, black, white, tmp_path) -> None:
    values = np.rint(low + RAMP * (high - low)).astype(np.int32)
    path = saved(tmp_path, Image.fromarray(values), "x.tif")
    expected = (values.astype(np.float64) - black) / (white - black) * 255
    assert abs(grey(path) - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("low", "high", "black", "white"),
    [
        (0, 1, 0, 1),
        (0.2, 0.4, 0, 1),
        (0, 1.5, 0, 255),
        (0, 255, 0, 255),
        (3, 40000, 0, 65535),
        (-1, 1, -1, 1),
        (0, 1e30, 0, 1e30),
        (-5, 70000, -5, 70000),
    ],
)
def test_floating_point_is_scaled_by_the_smallest_range(low, high, black, white, tmp_path) -> None:
    values = (low + RAMP * (high - low)).astype(np.float32)
    path = saved(tmp_path, Image.fromarray(values), "x.tif")
    expected = (values.astype(np.float64) - black) / (white - black) * 255
    assert abs(grey(path) - expected).max() <= 0.51


def test_numbers_that_are_not_finite_have_a_place(tmp_path) -> None:
    values = np.array([[0.5, np.nan, np.inf, -np.inf]], np.float32)
    assert grey(saved(tmp_path, Image.fromarray(values), "x.tif")).tolist() == [[128, 0, 255, 0]]
    path = saved(tmp_path, Image.fromarray(np.full((2, 2), np.nan, np.float32)), "y.tif")
    with pytest.raises(CorruptImageError, match="finite"):
        load_image(path)
    flat = saved(tmp_path, Image.fromarray(np.full((2, 2), -3.0, np.float32)), "z.tif")
    assert grey(flat).max() == 0


def test_lab_becomes_srgb(tmp_path) -> None:
    lab = ImageCms.profileToProfile(
        photo(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    path = saved(tmp_path, lab, "x.tif")
    assert abs(np.asarray(load_image(path), int) - np.asarray(photo(), int)).mean() < 2


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif", "x.avif", "x.mpo"])
def test_the_first_frame_is_taken(name: str, tmp_path) -> None:
    if os.path.splitext(name)[1] not in images.EXTENSIONS:
        pytest.skip("not in this build of Pillow")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    red, _, blue = load_image(path).getpixel((8, 8))
    assert red > 200 and blue < 60


# --------------------------------------------------------------------------- files that are no images


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.jpg", b""), ("text.png", b"hello"), ("half.jpg", None), ("zeros.tif", b"II*\0" + bytes(40))],
)
def test_damage_is_reported_with_the_path(name: str, content: bytes | None, tmp_path) -> None:
    if content is None:
        whole = io.BytesIO()
        Image.effect_noise((64, 64), 90).save(whole, "JPEG")
        content = whole.getvalue()[: len(whole.getvalue()) // 2]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptImageError, match=name) as error:
        load_image(tmp_path / name)
    assert error.value.path == str(tmp_path / name)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)
    copy = pickle.loads(pickle.dumps(error.value))
    assert (copy.path, copy.reason, str(copy)) == (error.value.path, error.value.reason, str(error.value))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_of_all_formats_are_corrupt_and_nothing_else(tmp_path) -> None:
    """Random damage: an image or a CorruptImageError, whatever the decoder raised."""
    chance = random.Random(0)
    wholes = []
    for name in ("x.jpg", "x.png", "x.webp", "x.tif", "x.bmp", "x.ppm", "x.gif", "x.jp2", "x.avif"):
        if os.path.splitext(name)[1] in images.EXTENSIONS:
            wholes.append(saved(tmp_path, photo(), name).read_bytes())
    outcomes = {"image": 0, "corrupt": 0}
    path = tmp_path / "damaged.jpg"
    for turn in range(900):
        data = bytearray(wholes[turn % len(wholes)])
        for _ in range(chance.choice((1, 2, 8))):
            data[chance.randrange(min(len(data), chance.choice((60, 10**6))))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
        try:
            load_image(path)
            outcomes["image"] += 1
        except CorruptImageError:
            outcomes["corrupt"] += 1
    assert min(outcomes.values()) > 100


def test_postscript_named_jpg_starts_no_interpreter(tmp_path, monkeypatch) -> None:
    path = saved(tmp_path, photo(), "x.eps").rename(tmp_path / "x.jpg")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("started Ghostscript"))
    with pytest.raises(CorruptImageError, match="no image of a known format"):
        load_image(path)


HEIF_HEADER = b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(60)
"""How a photo of a phone begins; the rest is not one."""


def lacking(monkeypatch, name: str) -> None:
    """Pillow as it is where neither it nor a plug-in reads the format `name`."""
    monkeypatch.setattr(images, "FORMATS", tuple(each for each in images.FORMATS if each != name))
    own = images._FORMATS[name]
    monkeypatch.setattr(images, "EXTENSIONS", tuple(each for each in images.EXTENSIONS if each not in own))
    monkeypatch.setattr(images, "_UNREADABLE", dict.fromkeys(own, name))


@pytest.mark.parametrize("name", ["x.heic", "x.jpg"])
def test_a_missing_plug_in_is_named_whatever_the_image_is_called(name: str, tmp_path, monkeypatch) -> None:
    lacking(monkeypatch, "HEIF")
    (tmp_path / name).write_bytes(HEIF_HEADER)
    with pytest.raises(CorruptImageError, match="pip install pillow-heif"):
        load_image(tmp_path / name)


def test_a_missing_plug_in_is_named_where_images_are_left_out_for_it(tmp_path, monkeypatch) -> None:
    for name in ("HEIF", "AVIF"):
        lacking(monkeypatch, name)
        (extension,) = images._FORMATS[name][:1]
        touch(tmp_path / f"x{extension.upper()}")
        text = images.describe_left_out(find_images(tmp_path).left_out, tmp_path)
        assert f"pip install {images._PLUGINS[name][1]}" in text and f"x{extension.upper()}" in text


@pytest.mark.parametrize(("name", "named"), [("HEIF", "pillow-heif"), ("WEBP", "pillow")])
def test_a_format_is_readable_where_a_part_or_a_plug_in_is_there(name: str, named: str, monkeypatch) -> None:
    loaded = []
    monkeypatch.setattr(images.importlib, "import_module", loaded.append)
    assert images._is_readable("JPEG") and not loaded
    monkeypatch.setattr(images.features, "check", lambda part: False)
    assert images._is_readable(name) == (name == "HEIF") and named in images.cure(name)
    assert len(loaded) == (name == "HEIF")


@pytest.mark.parametrize("extension", [".tga", ".ico", ".psd", ".pdf"])
def test_only_listed_formats_are_opened(extension: str, tmp_path) -> None:
    content = io.BytesIO()
    if extension == ".psd":
        content.write(b"8BPS\0\1" + bytes(60))
    else:
        photo().save(content, {".tga": "TGA", ".ico": "ICO", ".pdf": "PDF"}[extension])
    (tmp_path / "x.png").write_bytes(content.getvalue())
    with pytest.raises(CorruptImageError, match="no image of a known format"):
        load_image(tmp_path / "x.png")


@pytest.mark.parametrize("pillow_limit", [None, 89_478_485])
def test_decompression_bombs_are_refused_whatever_pillows_setting(
    pillow_limit, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "bomb.ppm"
    for size in (b"20000 20000", b"1000001 1", b"1 1000001"):
        path.write_bytes(b"P6 " + size + b" 255 ")
        with pytest.raises(CorruptImageError, match="pixels") as caught:
            load_image(path)
        assert ".." not in str(caught.value).replace(str(path), "")


def test_images_up_to_the_limit_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 16)
    assert load_image(saved(tmp_path, photo(), "x.png")).size == (24, 16)
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 16 - 1)
    with pytest.raises(CorruptImageError, match=r"24 x 16 pixels are more than 383"):
        load_image(tmp_path / "x.png")


def test_what_is_no_regular_file_does_not_hang(tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)  # names of sockets must be short
        try:
            listening.bind("socket.png")
        finally:
            os.chdir(here)
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "device.png").symlink_to("/dev/zero")
        started = time.monotonic()
        for name in ("fifo.png", "socket.png", "folder.png", "device.png"):
            with pytest.raises(CorruptImageError, match="not a regular file"):
                load_image(tmp_path / name)
        assert find_images(tmp_path).paths == []
        assert sum(map(len, find_images(tmp_path).left_out.values())) == 3
        assert time.monotonic() - started < 5


def test_missing_files_are_errors_of_the_system(tmp_path) -> None:
    for name in ("gone.jpg", "no/folder.jpg"):
        with pytest.raises(ImageReadError, match="No such file") as error:
            load_image(tmp_path / name)
        assert not isinstance(error.value, CorruptImageError)
        assert pickle.loads(pickle.dumps(error.value)).path == str(tmp_path / name)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("where", ["open", "read"])
def test_errors_of_the_system_are_not_damage(number: int, where: str, tmp_path, monkeypatch) -> None:
    path = saved(tmp_path, photo(), "x.png")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    if where == "open":
        monkeypatch.setattr(os, "open", fail)
    else:
        monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageReadError, match=os.strerror(number)):
        load_image(path)


def test_lack_of_memory_is_not_damage(tmp_path, monkeypatch) -> None:
    path = saved(tmp_path, photo(), "x.png")

    def fail(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(pixels_of, "to_rgb", fail)
    with pytest.raises(ImageReadError, match="memory"):
        load_image(path)


def test_no_file_stays_open(tmp_path) -> None:
    paths = [saved(tmp_path, photo(), name) for name in ("x.png", "x.tif", "x.gif")]
    (tmp_path / "bad.png").write_bytes(b"hello")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
        for path in paths:
            load_image(path)
        with pytest.raises(CorruptImageError):
            load_image(tmp_path / "bad.png")
        after = set(os.listdir("/proc/self/fd")) if before else set()
    assert len(after) <= len(before)


# --------------------------------------------------------------------------- finding


def names(paths: list[str], root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in paths]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_images_are_found_in_sorted_order_and_the_rest_is_told(tmp_path) -> None:
    touch(*(tmp_path / n for n in ("b/2.JPG", "b/1.png", "a/deep/er/x.jfif", "top.gif", "a/y.jp2")))
    touch(*(tmp_path / n for n in ("a/1.orf", "a/2.ORF", "b/raw.cr2", "b/noname", "notes.txt", "README")))
    (tmp_path / "empty").mkdir()
    found = find_images(tmp_path)
    expected = ["a/deep/er/x.jfif", "a/y.jp2", "b/1.png", "b/2.JPG", "top.gif"]
    assert names(found.paths, tmp_path) == expected
    assert names(found.folders, tmp_path) == ["a", "a/deep", "a/deep/er", "b", "empty"]
    told = {reason: names(paths, tmp_path) for reason, paths in found.left_out.items()}
    assert told == {
        ".cr2": ["b/raw.cr2"],
        ".orf": ["a/1.orf", "a/2.ORF"],
        "without an extension": ["b/noname"],
    }
    text = images.describe_left_out(found.left_out, tmp_path)
    assert "2 .orf (such as a/1.orf)" in text and "1 .cr2" in text


@pytest.mark.parametrize(
    "folder",
    [
        ".ipynb_checkpoints",
        ".git",
        "__MACOSX",
        "@eaDir",
        "$RECYCLE.BIN",
        "System Volume Information",
        ".Trash-1000",
    ],
)
def test_hidden_and_system_folders_are_not_there(folder: str, tmp_path) -> None:
    touch(tmp_path / "a/1.png", tmp_path / "a" / folder / "2.png", tmp_path / folder / "a/3.png")
    touch(
        tmp_path / "a/.hidden.png", tmp_path / "a/._1.png", tmp_path / "a/Thumbs.db", tmp_path / ".DS_Store"
    )
    found = find_images(tmp_path)
    assert names(found.paths, tmp_path) == ["a/1.png"]
    assert found.left_out == {}


def test_pictures_of_a_run_are_none_of_the_images(tmp_path) -> None:
    touch(
        tmp_path / "cat/1.png",
        tmp_path / "dog/2.png",
        tmp_path / "my run/curve.png",
        tmp_path / "dog/recipe.yaml",
    )
    touch(
        tmp_path / "my run/recipe.yaml", tmp_path / "my run/metrics.jsonl", tmp_path / "my run/deeper/3.png"
    )
    found = find_images(tmp_path)
    assert names(found.paths, tmp_path) == ["cat/1.png", "dog/2.png"]
    assert names(found.folders, tmp_path) == ["cat", "dog"]
    assert names(found.left_out[images.OF_RUNS], tmp_path) == ["my run"]
    # A folder that was named is looked at, whatever it is.
    assert names(find_images(tmp_path / "my run").paths, tmp_path) == [
        "my run/curve.png",
        "my run/deeper/3.png",
    ]


def test_links_in_circles_end(tmp_path) -> None:
    root = tmp_path / "outer" / "root"
    touch(root / "a/1.png", root / "b/2.png", tmp_path / "outer/secret/3.png")
    (root / "a/up").symlink_to("..")
    (root / "a/self").symlink_to(".")
    (root / "b/outside").symlink_to("../../..")
    (root / "b/loop").symlink_to("loop")
    found = find_images(root)
    assert names(found.paths, root) == ["a/1.png", "b/2.png"]
    assert names(found.left_out[images.CIRCLE], root) == ["a/self", "a/up", "b/outside"]


def test_links_out_are_followed_once_and_not_around_themselves(tmp_path) -> None:
    root, pool = tmp_path / "root", tmp_path / "pool"
    touch(pool / "cats/1.png", pool / "dogs/2.png", pool / "single.png")
    (pool / "cats/all").symlink_to(pool)
    root.mkdir()
    (root / "cat").symlink_to(pool / "cats")
    (root / "same").symlink_to(pool / "cats")
    (root / "x.png").symlink_to(pool / "single.png")
    (root / "y.png").symlink_to(pool / "single.png")
    (root / "broken.png").symlink_to(pool / "nothing.png")
    found = find_images(root)
    assert names(found.paths, root) == ["cat/1.png", "x.png"]
    assert {os.path.basename(link): os.path.basename(first) for link, first in found.links.items()} == {
        "same": "cat",
        "y.png": "x.png",
    }
    assert names(found.left_out[images.SECOND_WAY], root) == ["same", "y.png"]
    assert names(found.left_out[images.CIRCLE], root) == ["cat/all"]
    assert names(found.left_out["not a file"], root) == ["broken.png"]


def test_what_is_real_comes_before_links_to_it(tmp_path) -> None:
    touch(tmp_path / "z/1.png")
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "0.png").symlink_to("z/1.png")
    assert names(find_images(tmp_path).paths, tmp_path) == ["z/1.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch) -> None:
    touch(tmp_path / "a/1.png", tmp_path / "b/2.png")
    scandir = os.scandir

    def refuse(path: str):
        if os.path.basename(path) == "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ImageReadError, match=r"/b: Permission denied"):
        find_images(tmp_path)
    monkeypatch.undo()
    shutil.rmtree(tmp_path)
    with pytest.raises(ImageReadError, match="No such file"):
        find_images(tmp_path)
