"""Tables of MATLAB files (level 5, as MATLAB writes them by default), read as untrusted input.

scipy's reader believes the sizes and types in a file; damaged ones crash the interpreter. Data sets that are
passed on by hand come with such files, so they are read here, where every size is compared with the data.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vimtune.data.errors import DatasetError
from vimtune.data.files.images import open_regular
from vimtune.text import printable

_MAX_FILE = 4 * 2**20
"""Most bytes that a file may have; those of the data sets have far fewer."""
_MAX_UNPACKED = 32 * 2**20
"""Most bytes that the compressed parts of a file may have together, so that a small one cannot fill
memory."""
_MAX_DEPTH = 8
"""How deep cells and structures may be nested, so that a file cannot exhaust the stack."""
_HEADER = 128
"""Bytes of the header of a file of level 5, whose last two tell the byte order."""
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""NumPy's name of each type of numbers in an element."""
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
"""Encoding of each type of text in an element."""
_MATRIX, _COMPRESSED = 14, 15
"""The types of those elements that hold a matrix or another element that is compressed."""
_CELL, _STRUCT, _CHAR, _NUMERIC = 1, 2, 4, range(6, 16)
"""The classes of matrices that are read; all of _NUMERIC hold numbers."""


def read_mat(path: Path, names: list[str]) -> dict[str, Any]:
    """The variables `names` of a file.

    Returns:
        Numbers as a flat array, text as str, a cell array as a list, a struct array as a list of dicts; of
        arrays in column order.

    Raises:
        DatasetError: the file is missing, unreadable, damaged or lacks one of the variables.
    """
    shown = printable(str(path))
    try:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read(_MAX_FILE + 1)
        found = _read(data, names)
    except OSError as error:
        raise DatasetError(f"cannot read {shown}: {error.strerror or error}.") from error
    except (ValueError, struct.error, zlib.error) as error:
        raise DatasetError(f"{shown} is damaged ({error}).") from error
    if missing := [name for name in names if name not in found]:
        raise DatasetError(f"{shown} is damaged (it has no {', '.join(missing)}).")
    return found


def _read(data: bytes, names: list[str]) -> dict[str, Any]:
    if len(data) > _MAX_FILE:
        raise ValueError(f"it has more than {_MAX_FILE:,} bytes")
    order = {b"IM": "<", b"MI": ">"}.get(data[_HEADER - 2 : _HEADER])
    if order is None:
        raise ValueError("no MATLAB file of level 5")
    found, at, room = {}, _HEADER, _MAX_UNPACKED
    while at < len(data):
        kind, content, at = _element(data, at, order, packed=True)
        if kind == _COMPRESSED:
            unpacking = zlib.decompressobj()
            content = unpacking.decompress(content, room)
            if unpacking.unconsumed_tail:
                raise ValueError(f"it unpacks to more than {_MAX_UNPACKED:,} bytes")
            room -= len(content)
            kind, content, _ = _element(content, 0, order)
        if kind == _MATRIX:
            matrix = _Matrix(content, order)
            if matrix.name in names:
                found[matrix.name] = matrix.value(_MAX_DEPTH)
    return found


def _element(data: bytes, at: int, order: str, packed: bool = False) -> tuple[int, bytes, int]:
    """Type, content and end of the element at `at`. Elements are padded to 8 bytes, `packed` ones are not."""
    kind, size = struct.unpack_from(f"{order}II", data, at)
    if kind >> 16:  # A short element has up to 4 bytes of content in place of the size.
        kind, size = kind & 0xFFFF, kind >> 16
        start, end = at + 4, at + 8
        if size > 4:
            raise ValueError("an element is larger than its place")
    else:
        start = at + 8
        end = start + size + (0 if packed and kind == _COMPRESSED else -size % 8)
    if start + size > len(data):
        raise ValueError("it ends early")
    return kind, data[start : start + size], end


class _Matrix:
    """An array of any class: its description, and its parts yet to be read."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order, self._at = data, order, 0
        flags, shape, name = self._next()[1], self._next()[1], self._next()[1]
        self._class = struct.unpack_from(f"{order}I", flags)[0] & 0xFF
        sides = struct.unpack(f"{order}{len(shape) // 4}i", shape)
        if len(sides) < 2 or min(sides) < 0:
            raise ValueError("an array has no shape")
        self._count = math.prod(sides)
        self.name = name.decode("latin-1")

    def value(self, depth: int) -> Any:
        """The array's content, as `read_mat` describes it.

        Args:
            depth: how many levels of arrays within arrays may follow.

        Raises:
            ValueError: the file is damaged, or of a kind that is not read here.
        """
        if depth == 0:
            raise ValueError("arrays are nested too deeply")
        if self._class == _CELL:
            return list(self._parts(self._count, depth))
        if self._class == _STRUCT:
            lengths = self._numbers().tolist()
            text = self._next()[1]
            if not lengths or not isinstance(lengths[0], int) or lengths[0] < 1 or not text:
                raise ValueError("a structure has no fields")
            length = lengths[0]
            fields = [
                text[i : i + length].split(b"\0")[0].decode("latin-1") for i in range(0, len(text), length)
            ]
            values = self._parts(self._count * len(fields), depth)
            return [dict(zip(fields, row, strict=True)) for row in zip(*[values] * len(fields), strict=True)]
        if self._class == _CHAR:
            kind, text = self._next()
            encoding = _TEXTS.get(kind)
            if encoding is None:
                raise ValueError(f"text of type {kind}")
            suffix = {"<": "-le", ">": "-be"}[self._order] if encoding in ("utf-16", "utf-32") else ""
            return text.decode(encoding + suffix)
        if self._class in _NUMERIC:
            numbers = self._numbers()
            if len(numbers) != self._count:
                raise ValueError("an array has another size than it says")
            return numbers
        raise ValueError(f"an array of class {self._class}")

    def _parts(self, count: int, depth: int) -> Iterator[Any]:
        for _ in range(count):
            kind, content = self._next()
            if kind != _MATRIX:
                raise ValueError("an array has other parts than arrays")
            yield _Matrix(content, self._order).value(depth - 1) if content else np.empty(0)

    def _next(self) -> tuple[int, bytes]:
        kind, content, self._at = _element(self._data, self._at, self._order)
        return kind, content

    def _numbers(self) -> np.ndarray:
        kind, content = self._next()
        if kind not in _NUMBERS:
            raise ValueError(f"numbers of type {kind}")
        return np.frombuffer(content, self._order + _NUMBERS[kind])
