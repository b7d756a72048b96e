"""Text of users is shown, never obeyed: no escape sequence, no formula, no megabytes."""

from __future__ import annotations

import csv
import io

import pytest

from vimtune.text import counted, csv_cell, csv_text, printable, quote, shorten, unicode_text


@pytest.mark.parametrize("text", ["rose", "Löwenzahn", "桜", "été d'or", "👩‍🌾", "$x_1$", "[red]"])
def test_visible_text_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    "text", ["a\x1b[31m", "a\nb", "a\rb", "a\x07", "a\u202eb", "a\udcffb", "a\u2028", "\x9b2J"]
)
def test_what_a_terminal_would_obey_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable() and shown.encode("utf-8") and "\\" in shown


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, list(range(10**6)), {i: i for i in range(1000)}, 10**9999, b"\0" * 10**6],
    ids=["text", "list", "dict", "number", "bytes"],
)
def test_messages_do_not_repeat_megabytes(value):
    assert len(quote(value)) < 400


def test_quote_of_a_structure_that_contains_itself_ends():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert "nested" in quote(nested)


def test_text_that_is_not_unicode_is_written_out():
    assert unicode_text("é\udce9\n😀") == "é\\udce9\n😀"


def test_shorten_keeps_both_ends():
    short = shorten("a" * 100 + "b" * 100, 40)
    assert short.startswith("aaa") and short.endswith("bbb") and len(short) <= 40
    assert shorten("short", 40) == "short"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_cell_is_never_a_formula(text):
    assert csv_cell(text) == f"'{text}"
    assert csv_cell("rose") == "rose"


@pytest.mark.parametrize(
    "name", ["two\nlines.jpg", "a\rb.jpg", "\x1b[31m.jpg", 'say "x", y.jpg', "桜.jpg", ""]
)
def test_a_file_about_inputs_gives_their_names_back(name):
    text = csv_text([["path", "loss"], [name, -0.5], ["=1+1", None]])
    assert text.startswith("path,loss\n") and text.endswith("\n'=1+1,\n")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows == [["path", "loss"], [name, "-0.5"], ["'=1+1", ""]]


@pytest.mark.parametrize(
    ("number", "what", "expected"),
    [
        (1, "corrupt images", "1 corrupt image"),
        (0, "images", "0 images"),
        (1024, "batches", "1,024 batches"),
        (1, "batches", "1 batch"),
        (1, "classes", "1 class"),
        (1, "processes", "1 process"),
        (1, "examples", "1 example"),
    ],
)
def test_one_is_counted_in_the_singular(number, what, expected):
    assert counted(number, what) == expected
