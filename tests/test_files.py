"""Files are replaced as a whole or not at all, and what is no file is never replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vimtune.files import atomic_write, atomic_write_text


def hello(path: Path) -> None:
    path.write_text("hello")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, hello)
    assert path.read_text() == "hello"

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fails)
    assert path.read_text() == "hello" and list(tmp_path.iterdir()) == [path]


def test_text_is_utf_8_with_the_line_ends_that_it_has(tmp_path):
    path = tmp_path / "file"
    atomic_write_text(path, "ä\r\n" + os.fsdecode(b"b\xff") + "\n")
    assert path.read_bytes() == "ä\r\nb\\udcff\n".encode()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "place"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    before = sorted(tmp_path.iterdir()), path.lstat().st_mode
    with pytest.raises(OSError):
        atomic_write(path, hello)
    assert (sorted(tmp_path.iterdir()), path.lstat().st_mode) == before
