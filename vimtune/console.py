"""The console of a command: what is printed can neither stop the work nor vanish without a word.

Standard output may lack characters that a text has, or lead to a full disk or to a program that
has ended. None of these is a reason to lose what hours of work have found. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from vimtune.text import printable

LOG_WIDTH = 110
"""Columns of tables in a file or a pipe, which have no width of their own."""

logger = logging.getLogger(__name__)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the error of a pipe without reader pass on to the caller."""
        raise  # Rich would end the program with the exit code 1; `vimtune.exits` has another one for this.


def build_console(quiet: bool = False, *, is_result: bool = False) -> Console:
    """Console on stdout that takes text as it is: no markup, no emoji codes, no highlighting.

    Args:
        quiet: print nothing.
        is_result: what is printed is written nowhere else. Then it is an error where it cannot be printed,
            and elsewhere a warning.
    """
    file = None if sys.stdout is None else _Output(sys.stdout, strict=is_result)
    console = _Console(
        file=file,  # type: ignore[arg-type]  # as a file
        quiet=quiet,
        highlight=False,
        markup=False,
        emoji=False,
        force_jupyter=False,  # rich would make an output of its own of every line, and pass over `file`
        force_terminal=False if _is_notebook() else None,
    )
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def _is_notebook() -> bool:
    """Whether standard output is a cell of a notebook: no terminal, although its kernel asks for colours."""
    return type(sys.stdout).__module__.partition(".")[0] == "ipykernel"


def neutral(text: str, console: Console) -> str:
    """`text` on one line, with escapes for what is not visible and what the console cannot encode."""
    return _encodable(printable(text), console.encoding)


def print_line(console: Console, text: str, *, wrap: bool = True) -> None:
    """Print `text`, neutral and complete.

    A terminal gets it wrapped between words, except where `wrap` is false: what a user copies, such
    as a command, has to stay one line. In a file every text is one line.
    """
    text = neutral(text, console)
    for line in _wrapped(text, console.width) if wrap and console.is_terminal else [text]:
        console.print(Text(line), soft_wrap=True)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces only: a longer word, such as a path, stays whole."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def fit(parts: Sequence[tuple[str, int]], width: int) -> str:
    """Join texts, each given with a rank, so that they fit in `width` columns.

    The highest ranks are dropped first, and the text of lowest rank always stays.
    """
    kept = list(parts)
    while len(kept) > 1 and sum(len(text) + 2 for text, _ in kept) - 2 > width:
        kept.remove(max(kept, key=lambda part: part[1]))
    return "  ".join(text for text, _ in kept)


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Output:
    """A text stream that escapes what it cannot encode.

    If it cannot be written, a strict one raises OSError, and any other says so once and goes on.
    """

    def __init__(self, stream: TextIO, strict: bool = False) -> None:
        self._stream = stream
        self._strict = strict
        self._lost = False

    def __getattr__(self, name: str) -> Any:  # This hands on `encoding`, `isatty`, `fileno` and the like.
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, with escapes for what the stream cannot encode. Returns its length."""
        self._try(self._stream.write, _encodable(text, getattr(self._stream, "encoding", None) or "utf-8"))
        return len(text)

    def flush(self) -> None:
        """Hand on what the stream still holds."""
        self._try(self._stream.flush)

    def _try(self, action: Any, *arguments: str) -> None:
        if self._lost:
            return
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # A closed stream raises ValueError.
            if self._strict:
                raise
            self._lost = True
            logger.warning("standard output cannot be written any more (%s); the work goes on", error)
            # Python writes what the stream still holds when it ends, which would fail again.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
