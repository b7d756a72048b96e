"""Files that hold many images: .npz archives of numpy with the encoded images one after the other.

| array | type | what |
|---|---|---|
| blob | uint8 (bytes,) | the encoded images, such as WebP, without gaps |
| offset | whole numbers (images + 1,) | image i is blob[offset[i]:offset[i + 1]] |
| label | whole numbers (images,) | index of each image's class |

The arrays lie in the archive uncompressed, as `numpy.savez` writes them, so that one image is read without
the others. A file may come from anybody: no array of objects is read, because those can run code, and every
number is compared with what it may be.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from vimtune.data.errors import DatasetError
from vimtune.data.files.checks import whole_numbers
from vimtune.data.files.images import open_regular
from vimtune.data.files.span import Span
from vimtune.text import printable

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""What stands before an entry of a zip archive: its mark, and the lengths of name and extra field."""
_MARK = b"PK\x03\x04"
"""The mark with which the header of an entry begins."""
MAX_IMAGES = 20_000_000
"""Most images that a file may hold; ImageNet-21k has 14 millions."""


@dataclass(frozen=True)
class PackedImages:
    """The images of one file."""

    path: str
    """The file."""
    spans: list[Span]
    """Which part of the file each image is."""
    labels: list[int]
    """Class index of each image."""


def read_packed(path: Path, num_classes: int) -> PackedImages:
    """Find the images in a file; none of them is read.

    Raises:
        DatasetError: the file cannot be read, or is not of the form that this module describes.
    """
    shown = printable(str(path))
    try:
        with open(path, "rb", opener=open_regular) as file, zipfile.ZipFile(file) as archive:
            start, num_bytes = _find_blob(file, archive)
            offsets, labels = _read_numbers(file, archive, "offset"), _read_numbers(file, archive, "label")
    except OSError as error:
        raise DatasetError(f"cannot read {shown}: {error.strerror or error}.") from error
    # These are what zipfile and numpy raise for damaged files and for arrays of objects.
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError, struct.error) as error:
        reason = printable(str(error)).splitlines()[0] or type(error).__name__
        raise DatasetError(
            f"{shown} is damaged, or no .npz file of packed images with blob, offset and label, uncompressed "
            f"({reason})."
        ) from error
    ends = whole_numbers(offsets, 0, num_bytes, f"the offsets in {shown}")
    if ends[0] != 0 or ends[-1] != num_bytes or any(a >= b for a, b in pairwise(ends)):
        raise DatasetError(f"the offsets in {shown} do not rise from 0 to the {num_bytes} bytes of its blob.")
    classes = whole_numbers(labels, 0, num_classes - 1, f"the labels in {shown}")
    if len(classes) != len(ends) - 1:
        raise DatasetError(f"{shown} has {len(ends) - 1} images and {len(classes)} labels.")
    spans = [Span(start + a, b - a) for a, b in pairwise(ends)]
    return PackedImages(str(path), spans, classes)


def _find_blob(file: IO[bytes], archive: zipfile.ZipFile) -> tuple[int, int]:
    """Where in the file the encoded images start, and how many bytes they are."""
    dtype, count = _open_array(file, archive, "blob")
    if dtype != np.uint8:
        raise ValueError(f"blob holds {dtype} instead of uint8")
    return file.tell(), count


def _read_numbers(file: IO[bytes], archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """A list of whole numbers in the archive."""
    dtype, count = _open_array(file, archive, name)
    if dtype.kind not in "ui" or count > MAX_IMAGES + 1:
        raise ValueError(f"{name} holds {count} numbers of type {dtype}, expected whole numbers")
    return np.frombuffer(file.read(count * dtype.itemsize), dtype, count)


def _open_array(file: IO[bytes], archive: zipfile.ZipFile, name: str) -> tuple[np.dtype[Any], int]:
    """Go to the first byte of an array's values; returns its type and its length."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError(f"{name} is compressed or encrypted, write it with numpy.savez")
    file.seek(entry.header_offset)
    mark, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if mark != _MARK:
        raise ValueError(f"there is no {name} where the archive says")
    first = file.seek(name_length + extra_length, 1)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if len(shape) != 1 or shape[0] < 1 or dtype.hasobject:
        raise ValueError(f"{name} has shape {shape} and type {dtype}, expected a list of numbers")
    if file.tell() - first + shape[0] * dtype.itemsize != entry.file_size:
        raise ValueError(f"{name} is cut off")
    return dtype, shape[0]
