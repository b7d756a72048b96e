"""What a user asks about without a data set: texts, files of texts, and standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vimtune import parsers
from vimtune.data.text.lines import SUFFIXES, Line, read_lines, read_texts
from vimtune.data.text.places import TextFormat

STANDARD_INPUT = "-"
"""The argument that stands for standard input, each line of which is a text."""


def read_asked(form: TextFormat, arguments: Sequence[str]) -> list[Line]:
    """The entries that arguments of a command stand for, in order.

    Args:
        form: the data set whose entries they are.
        arguments: names of files, which end in one of `SUFFIXES`, `STANDARD_INPUT`, or texts.

    Raises:
        DatasetError: a file that cannot be read, or a line or text that is wrong.
    """
    lines: list[Line] = []
    for number, argument in enumerate(arguments, 1):
        if argument == STANDARD_INPUT:
            texts = read_texts("standard input", sys.stdin.buffer)
            lines += [form.entry(place, text) for place, text in texts]
        elif argument.lower().endswith(SUFFIXES) or os.path.exists(argument):
            lines += form.ask_about(read_lines(Path(parsers.path(argument))))
        else:
            lines.append(form.entry(f"input {number}", argument))
    return lines
