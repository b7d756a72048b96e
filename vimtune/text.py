"""Text of users and of files, made harmless for the place where it is shown.

Class names, paths and values of options are somebody's words. They may hold escape sequences that
rewrite a terminal, formulas that a spreadsheet runs, bytes that are not UTF-8, or megabytes. Phrases that
many messages have in common, such as counts, durations and suggestions, are made here, too. Nothing here
imports torch.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

MAX_QUOTE = 160
"""Characters of a value that a message repeats."""

# Control, format (which includes the marks that reorder text), surrogate, private use, unassigned,
# and the separators that start a new line.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that spreadsheets would take for a formula and compute."""


def printable(text: str) -> str:
    """`text` on one line, with every character that is not visible written as an escape.

    Joiners between visible characters (as in emoji and Indic scripts) stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _is_visible(character) else _escape(character) for character in text)


def _is_visible(character: str) -> bool:
    return character in "\u200c\u200d" or unicodedata.category(character) not in _HIDDEN


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def unicode_text(text: str) -> str:
    """`text` as a file can hold it: what is no character is written out as the text \\udcXX.

    Python holds a byte of a file name that is not UTF-8 as a surrogate, which no UTF-8 file can take.
    `vimtune.schema` reads such a name from a file as this very text.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(text: str, limit: int = MAX_QUOTE) -> str:
    """`text` with its middle left out if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def quote(value: Any, limit: int = MAX_QUOTE) -> str:
    """`repr(value)` for a message: on one line, visible, and shortened; also for very large values.

    Of arrays of numbers the kind and the shape are said, such as "a Tensor of shape (3, 64, 64)": their
    numbers tell nobody what was given, and bringing them from a device takes long. Likewise inside lists,
    tuples and dictionaries.
    """
    try:
        return printable(shorten(_describe(value, limit), limit))
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    except ValueError:  # Python refuses to write whole numbers of thousands of digits.
        return f"{_a_kind(value)} with a very large number in it"


def _describe(value: Any, limit: int) -> str:
    """`repr(value)`, with something shorter in place of what is longer than `limit` without telling more."""
    if isinstance(value, str | bytes | bytearray) and len(value) > 2 * limit:
        # The repr of the whole would take long, and its middle is left out anyway.
        return repr(value[: 2 * limit])
    if isinstance(value, list | tuple | dict | set | frozenset) and len(value) > limit:
        return f"{_a_kind(value)} of {len(value)} items"
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        return f"a whole number of {value.bit_length()} bits"
    if shape := _shape_of_array(value):
        return f"{_a_kind(value)} of shape {shape}"
    # What writes itself in another way, such as a named tuple, does so here, too.
    written_as: object = type(value).__repr__
    if written_as is dict.__repr__:
        pairs = (f"{_describe(key, limit)}: {_describe(item, limit)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if written_as is list.__repr__:
        return f"[{', '.join(_describe(item, limit) for item in value)}]"
    if written_as is tuple.__repr__:
        comma = "," if len(value) == 1 else ""
        return f"({', '.join(_describe(item, limit) for item in value)}{comma})"
    return repr(value)


def _shape_of_array(value: Any) -> tuple[int, ...] | None:
    """The sizes of an array of numbers; None of a single number and of anything else.

    Arrays are known by what those of torch, NumPy, pandas and others have in common, because none of these
    may be imported here. Much else has a shape, such as a description of an input or a function of that name,
    but no number of dimensions that agrees with it.
    """
    if isinstance(value, type):  # which may state what all its instances have
        return None
    try:
        shape = getattr(value, "shape", None)
        if not isinstance(shape, tuple) or getattr(value, "ndim", None) != len(shape):
            return None
    except Exception:  # A lazy or closed array may raise anything, and a message is made nevertheless.
        return None
    return tuple(shape) if all(isinstance(size, int) for size in shape) else None


def _a_kind(value: Any) -> str:
    """The kind of a value with its article, such as "a list" or "an ndarray"."""
    kind = type(value).__name__
    # The n of "ndarray" is spelled: no vowel follows it.
    return f"{'an' if re.match('[aeiou]|n[^aeiou]', kind, re.IGNORECASE) else 'a'} {kind}"


def counted(number: int, what: str) -> str:
    """A number and what is counted, such as "1 image", "1,024 images" or "0 classes".

    Args:
        number: how many.
        what: their name in the plural.
    """
    if number == 1:
        what = what.removesuffix("es" if what.endswith(("sses", "ches", "shes")) else "s")
    return f"{number:,} {what}"


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """The first names in quotes, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quote(name) for name in names[:limit]) + more


def escape_markdown(text: str) -> str:
    """`text` on one line of a Markdown document that shows it as it is."""
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", printable(text))


def csv_cell(text: str) -> str:
    """`text` as a cell of a CSV file that a spreadsheet takes for text and never for a formula.

    A cell that starts like a formula gets an apostrophe in front, as spreadsheets write it themselves.
    """
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """A CSV file about single inputs, of which nothing is a formula.

    Paths, texts and classes stand in it as they are, line breaks included, so that a path leads to its file
    and rows can be joined with those of other files.
    """
    lines = []
    for row in rows:
        line = io.StringIO()
        # Up to Python 3.12 a carriage return is put in quotes only where it belongs to the end of a line.
        writer = csv.writer(line, lineterminator="\r\n")
        writer.writerow([csv_cell(value) if isinstance(value, str) else value for value in row])
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def table_cell(value: Any) -> Any:
    """A value as a cell of a CSV table that sums up results, which may be those of others: text printable and
    never a formula, anything else as it is."""
    return csv_cell(printable(value)) if isinstance(value, str) else value


def split_outside(text: str, separator: str) -> list[str]:
    """The parts of a text between the separators that stand in no bracket.

    So a regular expression such as `re:(A_log|D){1,2}` stays whole. A bracket after a backslash is a
    character like others, and so is one that is never closed.
    """
    parts, depth = [""], 0
    for token in re.findall(r"\\.|.", text, re.DOTALL):
        depth = max(0, depth + (token in "([{") - (token in ")]}"))
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts if depth == 0 else text.split(separator)


def duration(seconds: float) -> str:
    """`95` -> `1:35`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def suggest(name: str, known: Iterable[str], prefix: str = "", likeness: float = 0.5) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string.

    Args:
        name: what was given.
        known: the names among which it is not.
        prefix: stands before the name that is found.
        likeness: how close a name has to be, from 0 to 1 for the same.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f" Did you mean {prefix + close[0]!r}?" if close else ""
