"""Image files: which there are below a folder, and how one is opened.

Files are somebody's input. Only regular files are opened, only by the decoders of the formats listed here,
and only up to a size, whatever the file claims to be. All parts of the project that look for images or open
them do so here, so they agree on what an image is.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import stat
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import ExifTags, Image, UnidentifiedImageError, features

from vimtune.data.errors import CorruptImageError, ImageReadError
from vimtune.data.files.span import Span
from vimtune.run_folder import RunFolder
from vimtune.text import printable

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, in pixels: 512 MiB as RGB. Larger ones are refused unread."""
MAX_SIDE = 1_000_000
"""Longest side of an image that is decoded, in pixels: resizing takes memory for it, too."""

_FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
"""The usual extensions of each format, by Pillow's name of it."""
_OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
"""Pillow's names of the parts that these formats need and that a build of Pillow may lack."""
_PLUGINS = {
    "AVIF": ("pillow_avif", "pillow-avif-plugin"),
    "HEIF": ("pillow_heif.HeifImagePlugin", "pillow-heif"),
}
"""Plug-ins that read what a build of Pillow does not: the module that tells Pillow of itself when it is
imported, and the distribution that has it."""
_BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIF": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"},
}
"""Formats that are kept in one kind of container (ISO 14496-12), and the four bytes after a length and the
letters "ftyp" by which a file of each is known."""


def _is_readable(name: str) -> bool:
    """Whether a format can be read here, by Pillow itself or by a plug-in, which is then loaded."""
    if name not in (*_OPTIONAL, *_PLUGINS):
        return True
    part = _OPTIONAL.get(name)
    if part in (*features.modules, *features.codecs) and features.check(part):
        return True
    if name not in _PLUGINS:
        return False
    try:
        importlib.import_module(_PLUGINS[name][0])
    except ImportError:  # `cure` names what is missing where such an image is met.
        return False
    return True


FORMATS = tuple(name for name in _FORMATS if _is_readable(name))
"""Formats that are opened here, by Pillow's names. The content of a file decides, not its extension."""

EXTENSIONS = tuple(extension for name in FORMATS for extension in _FORMATS[name])
"""Endings of file names that mark an image, in lower case."""

_UNREADABLE = {extension: name for name in _FORMATS if name not in FORMATS for extension in _FORMATS[name]}
"""Formats that cannot be read here, by the endings of their files."""


def cure(name: str) -> str:
    """What to do to read a format that cannot be read here, by Pillow's name of it."""
    if name in _PLUGINS:
        return f"{name} images need a plug-in: pip install {_PLUGINS[name][1]}"
    return f"this build of Pillow reads no {name} images: pip install --force-reinstall pillow"


# Systems and tools write these folders beside the data. The names are in lower case.
_SYSTEM_FOLDERS = {
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"),
    "__pycache__",
}
# Nobody expects these companions of images to be read as images. Other files that are left out are reported.
_COMPANIONS = {
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".mat", ".md5", ".sha256"),
    *(".md", ".html", ".htm", ".log", ".py", ".ipynb", ".sh", ".xmp", ".aae"),
    *(".ini", ".db", ".url", ".lnk"),
}
_COMPANION_NAMES = {"readme", "license", "licence", "copying", "makefile", "md5sums", "sha256sums"}
"""Names of further companions, in lower case and without an extension."""

# Pillow's decoders raise all of these on damaged files.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# An OSError with one of these comes from a decoder that follows a nonsensical offset in the file.
_DECODER_ERRNOS = (None, errno.EINVAL, errno.EOVERFLOW)

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by the value of its EXIF tag; 1 says that it is upright."""


# --------------------------------------------------------------------------- one image


def load_image(path: str | os.PathLike[str], span: Span | None = None) -> Image.Image:
    """Decode an image file to RGB (see `vimtune.data.files.pixels`), turned upright as its EXIF data say.

    Of several frames the first is taken.

    Args:
        path: the file.
        span: the part of it that is the image, where it holds several.

    Raises:
        CorruptImageError: damaged, of no format in `FORMATS`, too large, or no regular file.
        ImageReadError: missing, or the system cannot read it.
    """
    name = os.fspath(path) if span is None else span.within(os.fspath(path))
    with _naming_trouble(name), open(path, "rb", opener=open_regular) as file:
        return _decode(file if span is None else _part(file, span))


def read_picture(picture: bytes | Image.Image | np.ndarray, name: str) -> Image.Image:
    """The same for an image that is in memory already.

    Args:
        picture: the content of a file; an image of Pillow; or an array, uint8 (H, W), (H, W, 3) or (H, W, 4),
            or uint16 (H, W).
        name: what messages call it.

    Raises:
        CorruptImageError: it cannot be decoded.
        ImageReadError: there is not enough memory.
        ValueError: an array of another kind.
    """
    if not isinstance(picture, bytes | Image.Image):
        _check_array(picture, name)
    with _naming_trouble(name):
        if isinstance(picture, bytes):
            return _decode(io.BytesIO(picture))
        return _upright(picture if isinstance(picture, Image.Image) else _from_array(picture))


def _check_array(array: np.ndarray, name: str) -> None:
    """Raise ValueError for an array that holds no image in a known way."""
    channels = array.shape[2] if array.ndim == 3 else 1
    kinds = {"uint8": (1, 3, 4), "uint16": (1,)}
    if array.ndim not in (2, 3) or channels not in kinds.get(str(array.dtype), ()) or not array.size:
        raise ValueError(
            f"{printable(name)} is an array of {array.dtype} {array.shape}: expected uint8 (height, width), "
            "(height, width, 3) or (height, width, 4), or uint16 (height, width). Convert it, such as values "
            'from 0 to 1 by (255 * array).round().astype("uint8")'
        )


def _from_array(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


@contextmanager
def _naming_trouble(name: str) -> Iterator[None]:
    """Errors of decoders within the block become those of the image `name`."""
    try:
        yield
    except MemoryError as error:
        raise ImageReadError(name, "not enough memory to decode it") from error
    except _DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in _DECODER_ERRNOS:
            raise ImageReadError(name, error.strerror or str(error)) from error
        raise CorruptImageError(name, _reason(error)) from error


def _decode(file: IO[bytes]) -> Image.Image:
    """The image in a file, as RGB and upright."""
    _require_readable(file)
    with Image.open(file, formats=FORMATS) as image:
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """An image as RGB, turned as its EXIF data say."""
    # This comes late, because data sets are listed without numpy.
    from vimtune.data.files.pixels import to_rgb

    _check_size(*image.size)
    image.load()
    orientation = _orientation(image)
    pixels = to_rgb(image)
    return pixels.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else pixels


def _require_readable(file: IO[bytes]) -> None:
    """Make sure that an image is not of a format for which a plug-in is missing, whatever its file is called.

    Phones and messengers give images of HEIF the ending of a JPEG.

    Raises:
        ValueError: it is; the message names the plug-in.
    """
    begin = file.read(12)
    file.seek(0)
    for name, brands in _BRANDS.items():
        if name not in FORMATS and begin[4:8] == b"ftyp" and begin[8:12] in brands:
            raise ValueError(cure(name))


def _part(file: IO[bytes], span: Span) -> IO[bytes]:
    """The bytes of a part of a file as a file of their own."""
    file.seek(span.start)
    content = file.read(span.size)
    if len(content) < span.size:
        raise ValueError("the file ends before the image does")
    return io.BytesIO(content)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels: a side is longer than {MAX_SIDE:,}")


def open_regular(path: str, flags: int) -> int:
    """Open a regular file, without waiting for the other end of a pipe or waking a device."""
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:  # This is a socket, or a device that is not there.
            raise ValueError("not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation
    except _DECODE_ERRORS:
        return 1  # Damaged EXIF data say nothing, and the pixels are there.


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"no image of a known format ({', '.join(FORMATS)})"
    return printable(str(error)).rstrip(".") or type(error).__name__


# --------------------------------------------------------------------------- many images


@dataclass(frozen=True)
class FoundImages:
    """What `find_images` found.

    Attributes:
        paths: image files, sorted.
        folders: folders that were read, sorted, without the one that was searched; empty ones, too.
        left_out: other files and links, sorted, by the reason why they are not among `paths`. Hidden and
            system files and folders and the usual companions of images (.txt, .json, ...) are not counted.
        links: of what is left out because it was found already: where it was found.
        unreadable: those reasons for leaving out that are formats of images which cannot be read here.
    """

    paths: list[str]
    folders: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()


CIRCLE = "link to a folder around it"
"""Reason for leaving out a link that leads in a circle."""
SECOND_WAY = "link to what was found already"
"""Reason for leaving out a link to a folder or an image that was found elsewhere."""
OF_RUNS = "folder of a training run"
"""Reason for leaving out a folder in which a run has its results, among them pictures."""


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden or the system's, and so never part of the data."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def find_images(folder: str | os.PathLike[str]) -> FoundImages:
    """Image files in `folder` and all its sub-folders.

    Links are followed, and every folder and every image is found once, where it really is if that is below
    `folder`: links that lead in circles or to the same place twice end in `left_out`.

    Raises:
        ImageReadError: a folder cannot be read.
    """
    root = os.fspath(folder)
    walk = _Walk(root)
    walk.read(root, os.path.realpath(root))
    walk.follow_links()
    left_out = {reason: sorted(paths) for reason, paths in sorted(walk.left_out.items())}
    folders = sorted(walk.folders.values())[1:]
    unreadable = frozenset(walk.unreadable)
    return FoundImages(sorted(walk.images.values()), folders, left_out, walk.links, unreadable)


def describe_left_out(left_out: dict[str, list[str]], folder: str | os.PathLike[str]) -> str:
    """One line: how many files were left out for which reason, each with an example; "" for none."""
    return ", ".join(
        f"{len(paths)} {reason} (such as {printable(os.path.relpath(paths[0], folder))})"
        for reason, paths in left_out.items()
    )


class _Walk:
    """A search; what is real is read before any link is followed."""

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)
        self.images: dict[str, str] = {}  # This has the path as it was found, by the real path.
        self.folders: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)
        self.unreadable: set[str] = set()  # Reasons in `left_out`.
        # A link waits here with the real path of the folder that holds it.
        self._to_follow: list[tuple[str, str]] = []

    def read(self, folder: str, real: str) -> None:
        """Read a folder that was not read yet, and what really lies below it."""
        waiting = [(folder, real)]
        while waiting:
            folder, real = waiting.pop()
            entries = list(_entries(folder))
            if self.folders and _holds_a_run(entries):
                self.left_out[OF_RUNS].append(folder)
                continue
            self.folders[real] = folder
            for entry in entries:
                if is_ignored(entry.name):
                    continue
                if entry.is_symlink():
                    self._to_follow.append((entry.path, real))
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, os.path.join(real, entry.name)))
                else:
                    self._take(
                        entry.path, os.path.join(real, entry.name), entry.is_file(follow_symlinks=False)
                    )

    def follow_links(self) -> None:
        """Follow the links met so far, and those that are met on the way."""
        while self._to_follow:
            links, self._to_follow = sorted(self._to_follow), []
            for link, holder in links:
                real = os.path.realpath(link)
                known = self.folders.get(real) or self.images.get(real)
                if _is_around(real, holder) or _is_around(real, self._root):
                    self.left_out[CIRCLE].append(link)
                elif known is not None:
                    self.links[link] = known
                    self.left_out[SECOND_WAY].append(link)
                elif os.path.isdir(real):
                    self.read(link, real)
                else:
                    self._take(link, real, os.path.isfile(real))

    def _take(self, path: str, real: str, is_file: bool) -> None:
        stem, extension = os.path.splitext(os.path.basename(path).lower())
        if extension in EXTENSIONS and is_file:
            self.images[real] = path
        elif extension in EXTENSIONS:
            self.left_out["not a file"].append(path)
        elif extension in _UNREADABLE:
            reason = f"{extension}, as {cure(_UNREADABLE[extension])}"
            self.unreadable.add(reason)
            self.left_out[reason].append(path)
        elif extension not in _COMPANIONS and stem not in _COMPANION_NAMES:
            self.left_out[printable(extension) or "without an extension"].append(path)


def _is_around(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)


def _holds_a_run(entries: Iterable[os.DirEntry[str]]) -> bool:
    """Whether a folder is that of a training run, whose pictures are none of the user's images."""
    run = RunFolder(Path())
    return {entry.name for entry in entries} >= {run.recipe.name, run.metrics.name}


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise ImageReadError(folder, error.strerror or str(error)) from error
