"""Lines of files of texts: JSON Lines, CSV, TSV. A file may come from anybody: every line meets a schema."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from vimtune.data.errors import DatasetError
from vimtune.schema import MAX_TEXT_BYTES, Schema, check, parse_json
from vimtune.text import printable, quote

LINE = {"extra": "ignore", "strict": True, "allow_inf_nan": False}
"""`__pydantic_config__` of the schema of a line: official files have fields that nobody needs."""

DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
"""Signs that may stand between the cells of a table, by the ending of its name. Where numbers have commas,
spreadsheets write CSV with semicolons."""
SUFFIXES = (".jsonl", ".json", *DELIMITERS)
"""Endings of the files that can be read; a .json file has a JSON text in every line, too."""


class _NotBlank:
    """Annotation of a text: it has more than blanks in it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Pydantic's own hook. It imports pydantic late, as lists of tasks read no file."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._require, handler(source))

    @staticmethod
    def _require(text: str) -> str:
        if not text.strip():
            raise ValueError("expected a text that is not empty")
        return text


Words = Annotated[str, _NotBlank()]
"""A text with more than blanks in it."""


@dataclass(frozen=True)
class Line:
    """One entry of a data set."""

    place: str
    """Where it stands, for messages: "arc.jsonl, line 3"."""
    values: Any
    """Plain values, of which nothing is known yet."""

    @property
    def file(self) -> str:
        """What messages call the file of the entry; the entry itself where it stands in none."""
        return self.place.rpartition(", line ")[0] or self.place

    def read(self, schema: type[Schema]) -> Schema:
        """The entry as an instance of `schema`.

        Raises:
            DatasetError: it has another form; the message names the place, the field and what was expected.
        """
        return check(schema, self.values, self.place, DatasetError)

    def fields(self) -> Iterable[str]:
        """The names of its fields."""
        return self.values if isinstance(self.values, dict) else ()

    def has(self, *fields: str) -> bool:
        """Whether it has all of these fields."""
        return isinstance(self.values, dict) and all(field in self.values for field in fields)

    def field(self, name: str) -> Any:
        """The value of a field; None where there is none."""
        return self.values.get(name) if isinstance(self.values, dict) else None

    def with_field(self, name: str, value: Any) -> Line:
        """The same entry with another value of a field; an entry without fields stays as it is."""
        return Line(self.place, {**self.values, name: value}) if isinstance(self.values, dict) else self

    def with_default(self, name: str, value: Any) -> Line:
        """The same entry with a field that it lacks, or has without a value."""
        return self.with_field(name, value) if self.field(name) in (None, "") else self


def read_lines(path: Path) -> list[Line]:
    """All entries of a file of JSON Lines or, where its name ends in .csv or .tsv, of a table with a header.

    Of its `DELIMITERS` the one that the header has most often stands between the cells, of several the first.

    Raises:
        DatasetError: no such file, a line that is no text, no JSON or no row, or no entry at all.
    """
    shown = printable(str(path))
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DatasetError(f"{shown}: expected a file whose name ends in {', '.join(SUFFIXES)}")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DatasetError(f"{shown} is not a regular file: expected JSON Lines, CSV or TSV")
        with open(path, "rb") as file:
            texts = _decoded(shown, file)
            lines = list(_rows(shown, texts, suffix) if suffix in DELIMITERS else _objects(texts))
    except OSError as error:
        raise DatasetError(f"cannot read {shown}: {error.strerror}") from error
    if not lines:
        raise DatasetError(f"{shown} is empty: expected one example per line")
    return lines


def read_texts(shown: str, file: BinaryIO) -> list[tuple[str, str]]:
    """(place, text) of each line of a stream that has more than blanks in it.

    Args:
        shown: what the stream is called in messages.
        file: the stream.

    Raises:
        DatasetError: a line that is no text, or no line at all.
    """
    texts = [(place, text.rstrip("\r\n")) for place, text in _decoded(shown, file) if text.strip()]
    if not texts:
        raise DatasetError(f"{shown} is empty: expected one text per line")
    return texts


def _decoded(shown: str, file: BinaryIO) -> Iterator[tuple[str, str]]:
    """(place, text) of each line."""
    number = 0
    while raw := file.readline(MAX_TEXT_BYTES + 1):
        number += 1
        place = f"{shown}, line {number}"
        if len(raw) > MAX_TEXT_BYTES:
            raise DatasetError(f"{place} is longer than {MAX_TEXT_BYTES:,} bytes, more than is read")
        try:
            yield place, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{place} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8"
            ) from None


def _objects(texts: Iterator[tuple[str, str]]) -> Iterator[Line]:
    """The entries of JSON Lines; lines with nothing in them are passed over."""
    for place, text in texts:
        if text.strip():
            yield Line(place, parse_json(text.rstrip("\r\n"), place, DatasetError))


def _rows(shown: str, texts: Iterator[tuple[str, str]], suffix: str) -> Iterator[Line]:
    """The entries of a table, whose first row names the fields. A row may go over several lines."""
    kind, delimiters = suffix[1:].upper(), DELIMITERS[suffix]
    _, first = next(texts, ("", ""))
    rest = (text for _, text in texts)
    reader = csv.reader(chain([first], rest), strict=True, delimiter=max(delimiters, key=first.count))
    header: list[str] = []
    begin = 1
    while True:
        place = f"{shown}, line {begin}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            if "field limit" in str(error):
                limit = csv.field_size_limit()
                raise DatasetError(
                    f"{place} has a cell of more than {limit:,} characters, the most that is read of {kind}: "
                    "shorten it, or write the texts as JSON Lines (.jsonl)"
                ) from None
            if "new-line character" in str(error):
                raise DatasetError(
                    f"{place}: lines end with carriage returns alone, as on old Macs: save the file with the "
                    "line ends of Unix or Windows"
                ) from None
            raise DatasetError(f"{place} is not {kind}: {error}") from None
        begin = reader.line_num + 1
        if row is None:
            return
        if not row:
            continue
        if not header:
            header = row
            if len(set(header)) < len(header):
                raise DatasetError(f"{place}: the header names a column twice: {quote(header)}")
        elif len(row) != len(header):
            raise DatasetError(
                f"{place} has {len(row)} cells: expected {len(header)}, one for each of {', '.join(header)}"
            )
        else:
            yield Line(place, dict(zip(header, row, strict=True)))
