"""Printing: complete, neutral, fitted to the terminal, and never a reason to stop."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from nasty import NASTY_NAMES
from rich.console import Console

from vimtune.console import build_console, fit, print_line

PARTS = [("epoch 3/10", 0), ("loss 0.1234", 3), ("top1 50.00 %", 1), ("lr 1.0e-03", 4), ("eta 1:20", 2)]


def terminal(width: int) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(
        file=file, width=width, force_terminal=True, markup=False, emoji=False, highlight=False
    ), file


@pytest.mark.parametrize("width", range(1, 70))
def test_the_least_important_parts_are_left_out_first(width):
    line = fit(PARTS, width)
    assert line.startswith("epoch 3/10")
    assert len(line) <= max(width, len("epoch 3/10"))
    kept = [rank for text, rank in PARTS if text in line]
    assert sorted(kept) == list(range(len(kept)))  # a more important part is never missing
    assert line.split("  ") == [text for text, rank in PARTS if rank in kept]


@pytest.mark.parametrize("width", [1, 10, 20, 40, 80, 200])
def test_lines_break_between_words(width):
    text = "val: folder /a/path/of/some/length, val split (as in val/), 6 images of 2 classes"
    console, file = terminal(width)
    print_line(console, text)
    lines = file.getvalue().splitlines()
    assert " ".join(lines) == text
    assert all(len(line) <= width or " " not in line for line in lines)


def test_a_command_stays_one_line_and_a_file_has_no_breaks(capsys):
    command = "  vimtune train --resume 'a folder/with a name'"
    console, file = terminal(20)
    print_line(console, command, wrap=False)
    assert file.getvalue() == command + "\n"
    print_line(build_console(), "word " * 60)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_notebook_gets_lines_as_a_file_does(monkeypatch):
    """Its kernel asks for colours, and rich would make an output of its own of every line."""
    cell = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stdout", cell)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    console = build_console()
    console.print("word " * 20, style="bold")
    print_line(console, "other " * 60)
    lines = [line.rstrip() for line in cell.getvalue().splitlines()]  # earlier versions of rich strip them
    assert not console.is_terminal and lines == [("word " * 20).rstrip(), ("other " * 60).rstrip()]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "shift_jis"])
@pytest.mark.parametrize("text", NASTY_NAMES)
def test_text_is_shown_and_not_obeyed(monkeypatch, encoding, text):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    print_line(build_console(), text)
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert shown.endswith("\n") and shown[:-1].replace("\u200d", "").isprintable() and shown.count("\n") == 1
    if text.isascii() and text.isprintable():
        assert shown[:-1] == text


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_output_that_cannot_be_written_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdout", Full())
    console = build_console()
    for _ in range(3):
        print_line(console, "result")
    (record,) = caplog.records
    assert "standard output cannot be written any more" in record.getMessage()
    assert "No space left on device" in record.getMessage()


def test_a_result_that_cannot_be_printed_is_an_error(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left on device"):
        print_line(build_console(is_result=True), "result")
    assert not caplog.records


@pytest.mark.parametrize("stream", [None, "closed"])
def test_no_output_at_all(monkeypatch, stream):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", None if stream is None else closed)
    print_line(build_console(), "result")


AFTER_THE_READER = """
import sys
from vimtune.console import build_console, print_line
from vimtune.exits import run_guarded
is_result = {is_result}
console = build_console(is_result=is_result)
sys.stdin.readline()  # until the reader has gone
def work():
    for _ in range(3):
        print_line(console, "x" * 100_000)
    print("done", file=sys.stderr)
    return 0
code = run_guarded(work, show_traceback=False)
assert "torch" not in sys.modules
sys.exit(code)
"""


def after_the_reader(is_result: bool) -> tuple[int, str]:
    """Exit code of a program that prints to nobody, and what it says on stderr."""
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", AFTER_THE_READER.format(is_result=is_result)],
        stdin=subprocess.PIPE,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(write)
        os.close(read)
        _, told = process.communicate("\n", timeout=60)
    return process.returncode, told


def test_a_reader_that_has_gone_does_not_end_the_work():
    code, told = after_the_reader(is_result=False)
    assert code == 0
    assert told.splitlines()[-1] == "done" and told.count("Broken pipe") == 1 and "Traceback" not in told


def test_a_reader_that_has_gone_ends_what_prints_its_result():
    assert after_the_reader(is_result=True) == (141, "")
